"""ONNX operators that compute element by element, or over whole axes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from xllm.frontend.onnx_build import Builder, Value
from xllm.frontend.onnx_file import refuse
from xllm.frontend.onnx_shapes import Attributes, Inputs, axis_of, given, known
from xllm.ir.program import arguments

aten = torch.ops.aten
Rule = Callable[[Builder, Inputs, Attributes, int], list[Value]]


def number(b: Builder, value: Value) -> float | int | None:
    """The one number a value is, if it is known."""
    array = b.known(value) if not value.stored or not value.shape or np.prod(value.shape) == 1 else None
    if array is None or array.size != 1 or value.node is not None or value.dtype == torch.bool:
        return None
    item = array.reshape(-1)[0]
    if isinstance(item, torch.SymInt):
        return None
    return float(item) if value.dtype == torch.float32 else int(item)


def folded(b: Builder, function: Callable[..., Any], *values: Value) -> np.ndarray | None:
    """What a function of known values gives, on numbers and on symbols; None where one is not known."""
    arrays = [b.known(value) if value.node is None else None for value in values]
    held = [array for array in arrays if array is not None]
    if len(held) < len(values) or any(value.stored and value.shape for value in values):
        return None
    made = np.asarray(function(*held))
    if any(array.dtype == object for array in held):
        ones, counted = np.asarray(function(*(_at_one(b, array) for array in held))), _at_one(b, made)
        if not np.array_equal(ones, counted):
            raise refuse("it tells sizes of 1 from larger ones", code="onnx-shape")
    return made


def _at_one(b: Builder, array: np.ndarray) -> np.ndarray:
    counted = [b.at_one(item) for item in array.flat]
    return np.array(counted, dtype=array.dtype if array.dtype != object else None).reshape(array.shape)


def _divided(one: Any, other: Any) -> Any:
    """Quotients; of integers without what is behind the point. Sizes are not negative, and divide or are refused."""
    if one.dtype.kind == "f":
        return one / other
    if object in (one.dtype, other.dtype):
        return np.asarray(np.floor_divide(one, other))
    below = (one % other != 0) & ((one < 0) != (other < 0))
    return np.asarray(one // other + below, one.dtype)


def _binary(target: Any, fold: Callable[..., Any] | None, commutes: bool, gives: torch.dtype | None = None) -> Rule:
    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        one, other = (given(value) for value in inputs)
        if fold is not None and (array := folded(b, fold, one, other)) is not None:
            return [Value(gives or one.dtype, array.shape, known=array)]
        for a, c, swapped in ((one, other, False), (other, one, True)):
            scalar = number(b, c) if a.known is None or a.node is not None else None
            if scalar is not None and len(c.shape) <= len(a.shape) and (commutes or not swapped):
                return [b.emit(getattr(target, "Scalar" if gives is torch.bool else "Tensor"), a, scalar)]
        return [b.emit(target.Tensor, one, other)]

    return rule


def _logic(target: Any, fold: Callable[..., Any]) -> Rule:
    """And, Or, Xor of two truths."""

    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        one, other = (given(value) for value in inputs)
        if (array := folded(b, fold, one, other)) is not None:
            return [Value(torch.bool, array.shape, known=array)]
        if fold is np.logical_and:
            for a, c in ((one, other), (other, one)):
                array = b.known(c) if c.node is None else None
                if array is not None and array.size == 1 and array.all() and len(c.shape) <= len(a.shape):
                    return [a]  # and true
        return [b.emit(target, one, other)]

    return rule


def _sub(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    one, other = (given(value) for value in inputs)
    if (array := folded(b, operator.sub, one, other)) is not None:
        return [Value(one.dtype, array.shape, known=array)]
    if (scalar := number(b, one)) is not None and len(one.shape) <= len(other.shape):
        return [b.emit(aten.rsub.Scalar, other, scalar)]
    if (scalar := number(b, other)) is not None and len(other.shape) <= len(one.shape):
        return [b.emit(aten.add.Tensor, one, -scalar)]
    return [b.emit(aten.sub.Tensor, one, other)]


def _div(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    one, other = (given(value) for value in inputs)
    if (array := folded(b, _divided, one, other)) is not None:
        return [Value(one.dtype, array.shape, known=array)]
    if one.dtype != torch.float32:
        return [b.emit(aten.div.Tensor_mode, one, other, rounding_mode="trunc")]
    if (scalar := number(b, one)) is not None and len(one.shape) <= len(other.shape):
        (inverse,) = _reciprocal(b, [other], {}, opset)
        return [inverse if scalar == 1 else b.emit(aten.mul.Tensor, inverse, scalar)]
    scalar = number(b, other) if len(other.shape) <= len(one.shape) else None
    return [b.emit(aten.div.Tensor, one, other if scalar is None else scalar)]


def _reciprocal(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    """1 / sqrt(x) is one operator."""
    x = given(inputs[0])
    if x.node is not None and x.node.target is aten.sqrt.default:
        inner = arguments(x.node)[0]
        return [b.emit(aten.rsqrt.default, Value(x.dtype, x.shape, inner))]
    return [b.emit(aten.reciprocal.default, x)]


def _pow(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, power = (given(value) for value in inputs)
    scalar = number(b, power)
    if scalar is None or len(power.shape) > len(x.shape):
        return [_typed(b, b.emit(aten.pow.Tensor_Tensor, x, power), x.dtype)]
    made = b.emit(aten.pow.Tensor_Scalar, x, int(scalar) if scalar == int(scalar) else scalar)
    return [_typed(b, made, x.dtype)]


def _typed(b: Builder, value: Value, dtype: torch.dtype) -> Value:
    """Where torch gives a wider type than ONNX: the same in the type of the input."""
    return value if value.dtype == dtype else b.emit(aten.to.dtype, value, dtype)


def _unary(target: Any, *extra: Any) -> Rule:
    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        return [b.emit(target, given(inputs[0]), *extra)]

    return rule


def _neg(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    if (array := folded(b, operator.neg, x)) is not None:
        return [Value(x.dtype, array.shape, known=array)]
    return [b.emit(aten.neg.default, x)]


def _gelu(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    return [b.emit(aten.gelu.default, given(inputs[0]), approximate=attributes.get("approximate", "none"))]


def _softmax(target: Any) -> Rule:
    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        x = given(inputs[0])
        return [b.emit(target, x, axis_of(attributes.get("axis", -1), len(x.shape)) - len(x.shape))]

    return rule


def _clip(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    bounds = []
    for value in (*inputs[1:3], None, None)[:2]:
        bounds.append(None if value is None else number(b, value))
        if value is not None and bounds[-1] is None:
            raise refuse("the bounds of a clip are computed")
    if bounds == [None, None]:
        return [given(inputs[0])]
    return [b.emit(aten.clamp.default, given(inputs[0]), *bounds)]


def _where(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    condition, yes, no = (given(value) for value in inputs)
    if (array := folded(b, np.where, condition, yes, no)) is not None:
        return [Value(yes.dtype, array.shape, known=array)]
    return [b.emit(aten.where.self, condition, *(_readable(b, value) for value in (yes, no)))]


def _readable(b: Builder, value: Value) -> Value:
    """A stored number as a constant: rewrites see what it is."""
    if value.stored and value.dtype == torch.float32 and number(b, value) is not None:
        return Value(value.dtype, value.shape, node=b.constant(np.asarray(b.known(value))))
    return value


def _several(target: Any, fold: Callable[..., Any]) -> Rule:
    """Max, Min, Sum, Mean take any number of inputs."""

    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        made = given(inputs[0])
        for value in inputs[1:]:
            other = given(value)
            array = folded(b, fold, made, other)
            made = Value(made.dtype, array.shape, known=array) if array is not None else b.emit(target, made, other)
        return [made]

    return rule


def _reduce(target: Any, fold: Callable[..., Any] | None = None) -> Rule:
    def rule(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
        x, keep = given(inputs[0]), bool(attributes.get("keepdims", 1))
        if len(inputs) > 1 and inputs[1] is not None and inputs[1].shape != (0,):
            axes = [axis_of(int(axis), len(x.shape)) for axis in known(b, inputs[1], "axes").flat]
        elif attributes.get("noop_with_empty_axes", 0):
            return [x]
        else:
            axes = list(range(len(x.shape)))
        array = b.known(x) if x.node is None and not x.stored else None
        if fold is not None and array is not None:
            made = np.asarray(fold(array, axis=tuple(axes), keepdims=keep))
            return [Value(x.dtype, made.shape, known=made if array.dtype == object else made.astype(array.dtype))]
        counted = [axis - len(x.shape) for axis in axes]
        if target is not aten.prod.dim_int:
            return [_typed(b, b.emit(target, x, counted, keep), x.dtype)]
        product = x
        for axis in sorted(axes, reverse=True):
            product = b.emit(target, product, axis, keep)
        return [_typed(b, product, x.dtype)]

    return rule


def _cumsum(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, axis = given(inputs[0]), axis_of(int(known(b, inputs[1], "axis").item()), len(given(inputs[0]).shape))
    if attributes.get("exclusive", 0) or attributes.get("reverse", 0):
        raise refuse("a running sum that leaves out its own element, or runs backwards")
    return [b.emit(aten.cumsum.default, x, axis, dtype=x.dtype)]


def _mod(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    one, other = (given(value) for value in inputs)
    c_like = bool(attributes.get("fmod", 0))
    if (array := folded(b, np.fmod if c_like else operator.mod, one, other)) is not None:
        return [Value(one.dtype, array.shape, known=array)]
    scalar = number(b, other) if len(other.shape) <= len(one.shape) else None
    target = aten.fmod if c_like else aten.remainder
    return [b.emit(target.Tensor, one, other) if scalar is None else b.emit(target.Scalar, one, scalar)]


_COMPARISONS = {"Equal": (aten.eq, operator.eq), "Greater": (aten.gt, operator.gt),
                "GreaterOrEqual": (aten.ge, operator.ge), "Less": (aten.lt, operator.lt),
                "LessOrEqual": (aten.le, operator.le)}  # fmt: skip
_LOGIC = {"And": (aten.logical_and.default, np.logical_and), "Or": (aten.logical_or.default, np.logical_or),
          "Xor": (aten.logical_xor.default, np.logical_xor)}  # fmt: skip
_UNARY = {"Erf": aten.erf, "Sigmoid": aten.sigmoid, "Tanh": aten.tanh, "Relu": aten.relu, "Sqrt": aten.sqrt,
          "Exp": aten.exp, "Log": aten.log, "Abs": aten.abs, "Cos": aten.cos, "Sin": aten.sin, "Floor": aten.floor,
          "Ceil": aten.ceil, "Round": aten.round, "Not": aten.logical_not, "IsNaN": aten.isnan, "Sign": aten.sign,
          "Softplus": aten.softplus}  # fmt: skip

RULES: Mapping[str, Rule] = {
    "Add": _binary(aten.add, operator.add, True), "Mul": _binary(aten.mul, operator.mul, True),
    "Sub": _sub, "Div": _div, "Reciprocal": _reciprocal, "Pow": _pow, "Neg": _neg, "Mod": _mod,
    **{name: _unary(target.default) for name, target in _UNARY.items()},
    **{name: _binary(target, fold, name == "Equal", torch.bool) for name, (target, fold) in _COMPARISONS.items()},
    **{name: _logic(target, fold) for name, (target, fold) in _LOGIC.items()},
    "CumSum": _cumsum, "Gelu": _gelu, "Clip": _clip,
    "Softmax": _softmax(aten.softmax.int), "LogSoftmax": _softmax(aten.log_softmax.int),
    "Where": _where, "Max": _several(aten.maximum.default, np.maximum),
    "Min": _several(aten.minimum.default, np.minimum),
    "Sum": _several(aten.add.Tensor, operator.add), "ReduceMean": _reduce(aten.mean.dim),
    "ReduceSum": _reduce(aten.sum.dim_IntList, np.sum), "ReduceMax": _reduce(aten.amax.default),
    "ReduceMin": _reduce(aten.amin.default), "ReduceProd": _reduce(aten.prod.dim_int, np.prod),
}  # fmt: skip
