"""Products with weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from xllm.kernels.cpu import packed_bytes, quantised
from xllm.targets.base import Cost, KVLayout, Layout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import (
    GATES,
    PANELS,
    PLAIN,
    Reach,
    Rule,
    floating,
    group_of,
    ints,
    kernel_of,
    last_dim,
    panel_bytes,
    rows_scratch,
    scratch_reach,
    step_rows,
)


def _linear(op: Operation, kv: KVLayout, weights_dtype: str, rounded: bool = False) -> Lowering | Refusal:
    x, weight, bias = op.args["x"], op.args["weight"], op.args["bias"]
    if weight.kind != "weight" or (bias is not None and bias.kind != "weight"):
        return Refusal("its weight is not a weight of the program")
    if (rows := step_rows(op, x)) is None:
        return Refusal("it does not multiply rows of float32")
    n, k = ints(weight.shape)
    moved = rows.times(4 * (last_dim(op.results[0]) + k)).plus(packed_bytes(n, k, weights_dtype))
    scratch = rows_scratch(op, "rows", rows, k, weights_dtype, rounded)
    name, sizes = _name(weights_dtype, rounded), {"k": k, "n": n, **group_of(weights_dtype)}
    if act := op.args.get("act"):
        name, sizes = f"gated_{name}", {**sizes, "n": n // 2, "act": GATES.index(act)}
    return Lowering(
        kernel_of(name, weights_dtype),
        {"x": x, "weight": weight, "bias": bias, "out": op.results[0], **scratch},
        sizes,
        rows=rows,
        layouts={weight.name: Layout(PANELS, weights_dtype), **({bias.name: PLAIN} if bias else {})},
        cost=Cost(rows.times(2 * n * k), moved),
        scratch=tuple(scratch.values()),
    )


def _name(storage: str, rounded: bool) -> str:
    """Rows beside int8 are rounded by groups of inputs as weights are, or each by one scale as their outputs are."""
    whole = (kind := quantised(storage)) is not None and kind.bits == 8 and not kind.group
    return "linear" if not rounded else "linear_rounded_row" if whole else "linear_rounded"


def _heads_linear(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight = op.args["x"], op.args["weight"]
    if weight.kind != "weight" or not isinstance(x, Tensor) or x.kind != "value" or x.dtype != "float32":
        return Refusal("it does not multiply heads of float32 with a weight of the program")
    heads, n, k = ints(weight.shape)
    rows, storage = x.rows_of(-2), floating(weights_dtype)
    moved = rows.times(4 * heads * (n + k)).plus(heads * packed_bytes(n, k, storage))
    return Lowering(
        kernel_of("heads_linear", storage),
        {"x": x, "weight": weight, "out": op.results[0]},
        {"k": k, "n": n, "heads": heads},
        rows=rows,
        layouts={weight.name: Layout(PANELS, storage)},
        cost=Cost(rows.times(2 * heads * n * k), moved),
    )


def _linear_reach(
    sizes: Mapping[str, int], element: int, rounded: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    n, k, outputs = sizes["n"], sizes["k"], sizes["n"] * (2 if "act" in sizes else 1)
    rows, once = {"x": 4 * k, "out": 4 * n}, {"weight": panel_bytes(outputs, k, element, sizes), "bias": 4 * outputs}
    return rows | scratch_reach("rows", k, element, sizes, rounded), once


def _heads_linear_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, n, k = sizes["heads"], sizes["n"], sizes["k"]
    return {"x": 4 * heads * k, "out": 4 * heads * n}, {"weight": heads * panel_bytes(n, k, element, sizes)}


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("xllm.linear", "xllm.gated_linear"), _linear),
    "xllm.heads_linear": _heads_linear,
}
# Where rows of activations are rounded.
ROUNDED: Mapping[str, Rule] = dict.fromkeys(("xllm.linear", "xllm.gated_linear"), partial(_linear, rounded=True))
REACH: Mapping[str, Reach] = {
    **dict.fromkeys(("linear", "gated_linear"), _linear_reach),
    **{
        f"{gated}linear_{rounded}": partial(_linear_reach, rounded=True)
        for gated in ("", "gated_")
        for rounded in ("rounded", "rounded_row")
    },
    "heads_linear": _heads_linear_reach,
}
