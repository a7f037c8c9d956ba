"""Mixtures of experts: router, choice and experts in one kernel, or experts alone for a choice made elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xllm.kernels.cpu import packed_bytes, quantised
from xllm.targets.base import Cost, Extent, KVLayout, Layout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import (
    PANELS,
    PLAIN,
    Reach,
    Rule,
    group_of,
    ints,
    kernel_of,
    last_dim,
    panel_bytes,
    rows_scratch,
    scratch_reach,
    step_rows,
)

_ACTS = ("silu", "gelu", "gelu_tanh", "relu")
_SCORINGS = ("softmax", "sigmoid", "logits")
_MATRICES, _BIASES = ("gate", "up", "down"), ("gate_bias", "up_bias", "down_bias")


def _experts(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, index, weights = op.args["x"], op.args["index"], op.args["weights"]
    rows = _rows(op, x)
    if isinstance(rows, Refusal):
        return rows
    if index.kind != "value" or index.dtype != "int64" or weights.kind != "value" or weights.dtype != "float32":
        return Refusal("its choice is not int64 numbers of experts with float32 weights")
    if index.rows_of(-1) != rows or weights.rows_of(-1) != rows:
        return Refusal("its choice has not one row for each of its input")
    return _lowering("experts", op, rows, last_dim(index), weights_dtype, {"index": index, "weights": weights}, {}, {})


def _moe(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, router = op.args["x"], op.args["router"]
    rows = _rows(op, x)
    if isinstance(rows, Refusal):
        return rows
    given = [op.args[name] for name in ("router", "router_bias", "correction")]
    if any(held is not None and held.kind != "weight" for held in given):
        return Refusal("its router is not made of weights of the program")
    experts, top_k = ints(router.shape)[0], op.args["top_k"]
    made = {
        f"scratch_{name}": Tensor(f"{op.node}.{name}", "value", (rows, width), dtype)
        for name, width, dtype in (
            ("index", top_k, "int32"), ("weights", top_k, "float32"), ("logits", experts, "float32"),
        )
    }  # fmt: skip
    sizes = {
        "scoring": _SCORINGS.index(op.args["scoring"]),
        "groups": op.args["groups"],
        "top_groups": op.args["top_groups"],
        "group_top": 2 if op.args["group_score"] == "sum2" and op.args["groups"] > 1 else 1,
        "renormalise": int(op.args["renormalise"]),
    }
    floats = {"epsilon": op.args["epsilon"], "scale": op.args["scale"]}
    router_args = {name: op.args[name] for name in ("router", "router_bias", "correction")}
    return _lowering("moe", op, rows, top_k, weights_dtype, {**made, **router_args}, sizes, floats)


def _rows(op: Operation, x: Tensor) -> Extent | Refusal:
    held = [op.args[name] for name in (*_MATRICES, *_BIASES)]
    if any(part is not None and part.kind != "weight" for part in held):
        return Refusal("its experts are not weights of the program")
    rows = step_rows(op, x)
    return Refusal("it does not work on rows of float32") if rows is None else rows


def _lowering(
    kernel: str, op: Operation, rows: Extent, top_k: int, weights_dtype: str, args: Mapping[str, Tensor | None],
    sizes: Mapping[str, int], floats: Mapping[str, float],
) -> Lowering:  # fmt: skip
    experts, inner, width = ints(op.args["up"].shape)
    pairs = rows.times(2 * top_k).plus(2 + 2 * experts)
    made = {
        "scratch_pairs": Tensor(f"{op.node}.pairs", "value", (pairs,), "int32"),
        "scratch_hidden": Tensor(f"{op.node}.hidden", "value", (rows, top_k * inner), "float32"),
    }
    if quantised(weights_dtype):
        made |= rows_scratch(op, "rows", rows, width, weights_dtype)
        made |= rows_scratch(op, "hidden_rows", rows.times(top_k), inner, weights_dtype)
    held = {name: op.args[name] for name in (*_MATRICES, *_BIASES)}
    layouts = {held[name].name: Layout(PANELS, weights_dtype) for name in _MATRICES if held[name] is not None}
    layouts |= {held[name].name: PLAIN for name in _BIASES if held[name] is not None}
    # The router decides: it stays float32, whatever the experts are.
    layouts |= {router.name: Layout(PANELS, "float32")} if (router := args.get("router")) is not None else {}
    layouts |= {bias.name: PLAIN for name in ("router_bias", "correction") if (bias := args.get(name)) is not None}
    scratch = (*made.values(), *(tensor for name, tensor in args.items() if tensor and name.startswith("scratch")))
    return Lowering(
        kernel_of(kernel, weights_dtype),
        {"x": op.args["x"], **args, **held, "out": op.results[0], **made},
        {
            "width": width,
            "experts": experts,
            "inner": inner,
            "top_k": top_k,
            "act": _ACTS.index(op.args["act"]),
            **sizes,
            **group_of(weights_dtype),
        },
        {"alpha": op.args["alpha"], "limit": op.args["limit"], "shift": op.args["shift"], **floats},
        rows=rows,
        layouts=layouts,
        cost=_cost(rows, experts, inner, width, top_k, held["gate"] is not None, weights_dtype),
        scratch=scratch,
    )


def _cost(rows: Extent, experts: int, inner: int, width: int, top_k: int, gated: bool, storage: str) -> Cost:
    """Of T rows that choose alike by chance, E (1 - (1 - k/E)^T) experts are read. Costs are polynomials, so that curve
    is bounded from above by its tangent where every expert is chosen once on average, T = E / k.
    """
    matrix = inner * width * (3 if gated else 2)
    left = math.exp(-1.0)  # (1 - k/E)^(E/k), nearly
    stored = packed_bytes(inner, width, storage) * (2 if gated else 1) + packed_bytes(width, inner, storage)
    fixed, each = round(stored * experts * (1 - 2 * left)), round(stored * top_k * left)
    moved = rows.times(each + 4 * (2 * width + experts + 2 * top_k * inner)).plus(fixed + 4 * experts * width)
    return Cost(rows.times(2 * (top_k * matrix + experts * width)), moved)


def _experts_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    width, experts, inner, top_k = (sizes[name] for name in ("width", "experts", "inner", "top_k"))
    rows = {
        "x": 4 * width, "out": 4 * width, "index": 8 * top_k, "weights": 4 * top_k, "scratch_pairs": 8 * top_k,
        "scratch_hidden": 4 * top_k * inner, **scratch_reach("rows", width, element, sizes),
    }  # fmt: skip
    inwards = experts * panel_bytes(inner, width, element, sizes)
    rows |= {name: top_k * size for name, size in scratch_reach("hidden_rows", inner, element, sizes).items()}
    once = {
        "gate": inwards, "up": inwards, "down": experts * panel_bytes(width, inner, element, sizes),
        "gate_bias": 4 * experts * inner,
        "up_bias": 4 * experts * inner, "down_bias": 4 * experts * width, "scratch_pairs": 4 * (2 + 2 * experts),
    }  # fmt: skip
    return rows, once


def _moe_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    rows, once = _experts_reach(sizes, element)
    experts, top_k = sizes["experts"], sizes["top_k"]
    rows |= {"scratch_index": 4 * top_k, "scratch_weights": 4 * top_k, "scratch_logits": 4 * experts}
    once |= {
        "router": panel_bytes(experts, sizes["width"], 4, sizes),
        "router_bias": 4 * experts,
        "correction": 4 * experts,
    }
    return rows, once


RULES: Mapping[str, Rule] = {"xllm.experts": _experts, "xllm.moe": _moe}
REACH: Mapping[str, Reach] = {"experts": _experts_reach, "moe": _moe_reach}
