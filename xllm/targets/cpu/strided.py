"""Data movement, and what is computed of operands that broadcast, on any type of number: along strides (`views`)."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from xllm.targets.base import Cost, Extent, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import PLAIN, Reach, Rule
from xllm.targets.cpu.views import ELEMENT, NONE, Size, Walk, broadcast, extent, product, reach_of, strides_of, walk

PARTS = 8


def plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether kernels may read a value in order, as what it is."""
    held = isinstance(tensor, Tensor) and tensor.kind in ("value", "weight")
    return held and tensor.dtype in ELEMENT


def lowered(
    found: Walk, kernel: str, args: Mapping[str, Tensor | None], moved: int, floats: Mapping[str, float] | None = None
) -> Lowering:
    """A kernel that goes through its operands as found; `moved`: bytes per element of its result."""
    elements, weights = elements_of(args["out"]), [arg for arg in args.values() if arg and arg.kind == "weight"]
    layouts, cost = {weight.name: PLAIN for weight in weights}, Cost(elements, elements.times(moved))
    return Lowering(kernel, args, found.ints, floats or {}, found.rows, layouts, cost, extents=found.extents)


def elements_of(tensor: Tensor | None) -> Extent:
    return tensor.rows_of(len(tensor.shape)) if tensor is not None else Extent()


# --- moving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """How a moved value looks at its source: strides along the result's dimensions, and where it begins."""

    strides: Sequence[Extent]
    offset: Extent = NONE


_See = Callable[[Operation, Tensor, list[Extent]], _Seen | None]


def _move(see: _See) -> Rule:
    """The rule of an operator whose result is its first argument seen through `see(op, source, strides)`."""

    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        source, out = next(iter(op.args.values())), op.results[0]
        seen = see(op, source, strides_of(source.shape)) if plain(source) and source.dtype == out.dtype else None
        if seen is None:
            return Refusal("it does not move numbers along known strides")
        found = walk(out.shape, {"x": seen.strides, "out": strides_of(out.shape)})
        if isinstance(found, Refusal):
            return found
        found = found.also("offset", seen.offset)
        return lowered(found.also("offset", seen.offset), f"copy.{ELEMENT[out.dtype]}", {"x": source, "out": out}, 8)

    return rule


def _slice(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    axis, start, step = op.args.get("dim", 0) % len(inside), op.args.get("start") or 0, op.args.get("step", 1)
    first = _first(start, source.shape[axis])
    strides = [*inside[:axis], inside[axis].times(step), *inside[axis + 1 :]]
    return _Seen(strides, inside[axis].times(first))


def _select(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    axis = op.args["dim"] % len(inside)
    first = _first(op.args["index"], source.shape[axis])
    return _Seen([*inside[:axis], *inside[axis + 1 :]], inside[axis].times(first))


def _first(start: Size, size: Size) -> Size:
    """Where a cut begins, counted from the front."""
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    return extent(size).plus(start) if isinstance(start, int) and start < 0 else start


def _transpose(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    one, other = op.args["dim0"], op.args["dim1"]
    turned = list(inside)
    turned[one], turned[other] = turned[other], turned[one]
    return _Seen(turned)


def _permute(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    return _Seen([inside[dim] for dim in op.args["dims"]])


def _expand(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    return _Seen(broadcast(source.shape, inside, op.results[0].shape))


def _same(op: Operation, source: Tensor, inside: list[Extent]) -> _Seen:
    return _Seen(inside)


def _join(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    """cat and stack: parts side by side, row by row."""
    parts, out = op.args["tensors"], op.results[0]
    axis = op.args.get("dim", 0) % len(out.shape)
    if not 1 <= len(parts) <= PARTS or not all(plain(part) and part.dtype == out.dtype for part in parts):
        return Refusal(f"it does not join up to {PARTS} values of one type")
    found = Walk(out.rows_of(axis), {f"w{index}": 0 for index in range(len(parts), PARTS)})
    for index, part in enumerate(parts):
        found = found.also(f"w{index}", product(part.shape[axis:]))
    args = {**{f"x{index}": part for index, part in enumerate(parts)}, "out": out}
    return lowered(found, f"concat.{ELEMENT[out.dtype]}", args, 8)


# --- computing -------------------------------------------------------------------------------------------------------


def over(kernel: str, out: Tensor, operands: Mapping[str, Any], floats: Mapping[str, float]) -> Lowering | Refusal:
    """A kernel over operands that broadcast to `out`; those that are numbers stand among `floats`."""
    views = {
        name: broadcast(value.shape, strides_of(value.shape), out.shape)
        if isinstance(value, Tensor)
        else (NONE,) * len(out.shape)
        for name, value in operands.items()
    }
    found = walk(out.shape, {**views, "out": strides_of(out.shape)})
    if isinstance(found, Refusal):
        return found
    tensors = {name: value if isinstance(value, Tensor) else None for name, value in operands.items()}
    return lowered(found, kernel, {**tensors, "out": out}, 12, floats)


def arithmetic(kernel: str, *types: str) -> Rule:
    """The rule of an operation on two operands that broadcast, or on one and a number, of one of `types`."""

    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        if op.args.get("alpha", 1) != 1 or op.args.get("rounding_mode") is not None:
            return Refusal("it scales or rounds what it computes")
        operands = {"a": op.args["self"], "b": op.args["other"]}
        held = {value.dtype for value in operands.values() if isinstance(value, Tensor)}
        dtype = min(held) if len(held) == 1 else ""
        if dtype not in types or not all(plain(value) or _exact(value, dtype) for value in operands.values()):
            return Refusal(f"its operands are not values of one of {', '.join(types)}, or finite numbers of that")
        if op.results[0].dtype not in (dtype, "bool"):
            return Refusal("it gives another type than it takes")
        floats = {
            f"{name}_number": 0.0 if isinstance(value, Tensor) else float(value) for name, value in operands.items()
        }
        return over(f"strided_{kernel}.{ELEMENT[dtype]}", op.results[0], operands, floats)

    return rule


def _exact(value: Any, dtype: str) -> bool:
    """Whether a kernel that is handed a number as float32 gets that number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return dtype == "float32" or (abs(value) < 1 << 62 and struct.unpack("f", struct.pack("f", value))[0] == value)


def _where(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    seen, a, b = (op.args[name] for name in ("condition", "self", "other"))
    out = op.results[0]
    if not all(map(plain, (seen, a, b))) or (seen.dtype, a.dtype, b.dtype) != ("bool", out.dtype, out.dtype):
        return Refusal("it does not choose between values of one type")
    return over(f"strided_where.{ELEMENT[out.dtype]}", out, {"seen": seen, "a": a, "b": b}, {})


# --- reach -----------------------------------------------------------------------------------------------------------


def _concat_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    widths = [element * sizes[f"w{index}"] for index in range(PARTS)]
    return {**{f"x{index}": width for index, width in enumerate(widths)}, "out": sum(widths)}, {}


ARITHMETIC = ("add", "sub", "mul", "div", "max", "min")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
LOGIC = ("and", "or", "xor")
_WHOLE = ("int64", "int32")

RULES: Mapping[str, Rule] = {
    "aten.slice.Tensor": _move(_slice),
    "aten.select.int": _move(_select),
    "aten.transpose.int": _move(_transpose),
    "aten.permute.default": _move(_permute),
    "aten.expand.default": _move(_expand),
    "aten.clone.default": _move(_same),
    "aten.contiguous.default": _move(_same),
    "aten.cat.default": _join,
    "aten.stack.default": _join,
    "aten.where.self": _where,
    "aten.maximum.default": arithmetic("max", "float32", *_WHOLE),
    "aten.minimum.default": arithmetic("min", "float32", *_WHOLE),
    **{f"aten.{name}.{kind}": arithmetic(name, "float32", *_WHOLE, *(["bool"] if name in ("eq", "ne") else []))
       for name in COMPARISONS for kind in ("Tensor", "Scalar")},
    **{f"aten.{kind}_{name}.{form}": arithmetic(name, "bool")
       for name in LOGIC for kind, form in (("logical", "default"), ("bitwise", "Tensor"))},
}  # fmt: skip
_TWO = {"a": (0, 0), "b": (3, 0)}
REACH: Mapping[str, Reach] = {
    "copy": reach_of({"x": (0, 0), "out": (3, 0)}, offset="x"),
    "concat": _concat_reach,
    **dict.fromkeys((f"strided_{name}" for name in ARITHMETIC), reach_of({**_TWO, "out": (6, 0)})),
    **dict.fromkeys((f"strided_{name}" for name in (*COMPARISONS, *LOGIC)), reach_of({**_TWO, "out": (6, 1)})),
    "strided_where": reach_of({"seen": (0, 1), "a": (3, 0), "b": (6, 0), "out": (9, 0)}),
}
