"""Gates, activations and arithmetic, element by element."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xllm.targets.base import Cost, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import GATES, Reach, Rule, last_dim, step_rows
from xllm.targets.cpu.strided import arithmetic

_UNARY = ("relu", "sigmoid", "tanh", "erf", "exp", "neg", "abs", "sqrt", "rsqrt", "cos", "sin")
_ARITHMETIC = ("add", "sub", "mul", "div")
_TYPES = {**dict.fromkeys(_ARITHMETIC, ("float32", "int64", "int32")), "div": ("float32",)}


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
        rows, width = step_rows(op, x), 1
        if rows is not None:
            width = last_dim(x)
        elif isinstance(x, Tensor) and x.kind == "value" and x.dtype == "float32":
            rows = x.rows_of(len(x.shape))  # one number each, where the last dimension is a symbol
        else:
            return Refusal("it does not work on values of float32")
        cost = Cost(rows.times(10 * width), rows.times(8 * width))
        return Lowering(f"{spelled}.f32", {"x": x, "out": op.results[0]}, {"width": width}, rows=rows, cost=cost)

    return rule


def _clamp(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["self"]
    bounds = {name: op.args.get(key) for name, key in (("low", "min"), ("high", "max"))}
    if (rows := step_rows(op, x)) is None or not all(
        bound is None or math.isfinite(bound) for bound in bounds.values()
    ):
        return Refusal("it does not work on rows of float32 between finite numbers")
    width = last_dim(x)
    sizes = {"width": width, **{f"has_{name}": int(bound is not None) for name, bound in bounds.items()}}
    floats = {name: float(bound or 0.0) for name, bound in bounds.items()}
    cost = Cost(rows.times(2 * width), rows.times(8 * width))
    return Lowering("clamp.f32", {"x": x, "out": op.results[0]}, sizes, floats, rows, cost=cost)


def _power(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    """The few powers that products and roots compute to the last bit."""
    exponent, x = op.args["exponent"], op.args["self"]
    if exponent == 2:
        return _binary("mul")(Operation(op.node, op.op, {"self": x, "other": x}, op.results), kv, weights_dtype)
    kernel = {3: "cube", 0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
    if kernel is None:
        return Refusal(f"there is no kernel for the power {exponent}")
    return _unary(kernel)(op, kv, weights_dtype)


def _square(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["self"]
    return _binary("mul")(Operation(op.node, op.op, {"self": x, "other": x}, op.results), kv, weights_dtype)


def _binary(kernel: str) -> Rule:
    """Two values of one shape in one sweep; whatever else broadcasts by strides."""

    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        a, b = op.args["self"], op.args["other"]
        values = all(isinstance(one, Tensor) and one.kind == "value" and one.dtype == "float32" for one in (a, b))
        plain = values and a.shape == b.shape and op.args.get("alpha", 1) == 1 and not op.args.get("rounding_mode")
        if not plain or (rows := step_rows(op, a)) is None:
            return arithmetic(kernel, *_TYPES[kernel])(op, kv, weights_dtype)
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
    **{f"aten.{name}.default": _unary(name) for name in _UNARY},
    "aten.square.default": _square,
    "aten.pow.Tensor_Scalar": _power,
    "aten.clamp.default": _clamp,
    **{f"aten.{name}.{kind}": _binary(name) for name in _ARITHMETIC for kind in ("Tensor", "Scalar")},
}
ANY_TYPE = frozenset(f"aten.{name}.{kind}" for name in _ARITHMETIC for kind in ("Tensor", "Scalar"))
REACH: Mapping[str, Reach] = {
    **dict.fromkeys((f"gated_{name}" for name in GATES), _gated_reach),
    **dict.fromkeys((*GATES, *_UNARY, *_ARITHMETIC, "cube", "clamp"), _pointwise_reach),
}
