"""Gates, activations and arithmetic, element by element."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import Cost, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import Reach, Rule, last_dim, step_rows


def _gated_act(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, out = op.args["x"], op.results[0]
    if (rows := step_rows(op, x)) is None:
        return Refusal("it does not gate rows of float32")
    width = last_dim(out)
    cost = Cost(rows.times(12 * width), rows.times(12 * width))
    return Lowering(f"gated_{op.args['act']}.f32", {"x": x, "out": out}, {"width": width}, rows=rows, cost=cost)


def _unary(kernel: str) -> Rule:
    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        x = op.args["self"]
        spelled = kernel
        if op.op.startswith("aten.gelu") and op.args.get("approximate", "none") == "tanh":
            spelled = "gelu_tanh"
        if (rows := step_rows(op, x)) is None:
            return Refusal("it does not work on rows of float32")
        width = last_dim(x)
        cost = Cost(rows.times(10 * width), rows.times(8 * width))
        return Lowering(f"{spelled}.f32", {"x": x, "out": op.results[0]}, {"width": width}, rows=rows, cost=cost)

    return rule


def _binary(kernel: str) -> Rule:
    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        a, b = op.args["self"], op.args["other"]
        values = isinstance(a, Tensor) and isinstance(b, Tensor) and b.kind in ("value", "input")
        if not values or a.shape != b.shape or b.dtype != "float32":
            return Refusal("its operands are not two values of one shape")
        if op.args.get("alpha", 1) != 1 or (rows := step_rows(op, a)) is None:
            return Refusal("it does not work on rows of float32")
        width = last_dim(a)
        cost = Cost(rows.times(width), rows.times(12 * width))
        args = {"a": a, "b": b, "out": op.results[0]}
        return Lowering(f"{kernel}.f32", args, {"width": width}, rows=rows, cost=cost)

    return rule


def _gated_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"x": 8 * sizes["width"], "out": 4 * sizes["width"]}, {}


def _pointwise_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return dict.fromkeys(("x", "a", "b", "out"), 4 * sizes["width"]), {}


RULES: Mapping[str, Rule] = {
    "xllm.gated_act": _gated_act,
    "aten.silu.default": _unary("silu"),
    "aten.gelu.default": _unary("gelu"),
    "aten.add.Tensor": _binary("add"),
    "aten.mul.Tensor": _binary("mul"),
}
REACH: Mapping[str, Reach] = {
    **dict.fromkeys(("gated_silu", "gated_gelu", "gated_gelu_tanh"), _gated_reach),
    **dict.fromkeys(("silu", "gelu", "gelu_tanh", "add", "mul"), _pointwise_reach),
}
