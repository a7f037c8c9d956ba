"""Data movement, and arithmetic on operands that broadcast: everything is rows times at most three axes with strides.

The one symbolic dimension of a value is its rows, wherever it stands; an axis in front of it has a stride that counts
in rows (heads-first values [H, T, D]). What does not come down to that is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from xllm.targets.base import Cost, Extent, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import PLAIN, Reach, Rule

AXES = 3
PARTS = 8


@dataclass(frozen=True)
class Stride:
    """Elements from one index to the next; `scaled`: times the rows of the call."""

    step: int
    scaled: bool = False


NONE = Stride(0)


@dataclass(frozen=True)
class Axis:
    """One axis of a result: its size, and the stride of every operand and of the result along it."""

    size: int
    strides: tuple[Stride, ...]

    def holds(self, inner: Axis) -> bool:
        """Whether stepping this axis is stepping past all of `inner`, so that the two are one axis."""
        pairs = zip(self.strides, inner.strides, strict=True)
        return all(outer.scaled == one.scaled and outer.step == one.step * inner.size for outer, one in pairs)


def strides_of(shape: Sequence[int | Extent]) -> list[Stride] | None:
    """Strides of a value that lies in memory in order; None with two symbolic dims."""
    found, step, scaled = [], 1, False
    for size in reversed(shape):
        found.append(Stride(step, scaled))
        if isinstance(size, int):
            step *= size
        elif scaled:
            return None
        else:
            scaled = True
    return found[::-1]


def plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether kernels may read a value as float32 in order."""
    return isinstance(tensor, Tensor) and tensor.kind in ("value", "input", "weight") and tensor.dtype == "float32"


def shared_axes(
    shape: Sequence[int | Extent], views: Sequence[Sequence[Stride]]
) -> tuple[Extent, tuple[Stride, ...], list[Axis]] | Refusal:
    """The rows of a result of `shape`, every view's stride along them, and the other axes, alike ones merged."""
    rows, along = Extent.of(1), tuple(NONE for _ in views)
    axes: list[Axis] = []
    for index, size in enumerate(shape):
        strides = tuple(view[index] for view in views)
        if isinstance(size, Extent):
            if any(stride.scaled for stride in strides) or along != tuple(NONE for _ in views):
                return Refusal("two of its dimensions are symbolic")
            rows, along = size, strides
        elif size != 1:
            axis = Axis(size, strides)
            if axes and axes[-1].holds(axis):
                axis = replace(axis, size=axes.pop().size * size)
            axes.append(axis)
    if len(axes) > AXES:
        return Refusal(f"it moves along {len(axes)} axes at once, the kernel along {AXES}")
    return rows, along, [Axis(1, tuple(NONE for _ in views))] * (AXES - len(axes)) + axes


def strided_ints(along: Sequence[Stride], axes: Sequence[Axis], names: Sequence[str]) -> dict[str, int]:
    """The ints n0 n1 n2, every view's strides, and `scaled`: bit 3 v + i for axis i of view v."""
    found = {f"n{index}": axis.size for index, axis in enumerate(axes)}
    scaled = 0
    for view, name in enumerate(names):
        found[f"{name}_row"] = along[view].step
        for index, axis in enumerate(axes):
            found[f"{name}_{index}"] = axis.strides[view].step
            scaled |= int(axis.strides[view].scaled) << 3 * view + index
    return {**found, "scaled": scaled}


# --- moving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """How a moved value looks at its source: strides along the result's dimensions, and where it begins."""

    strides: tuple[Stride, ...]
    offset: Stride = NONE


def _move(see: Any) -> Rule:
    """The rule of an operator whose result is its first argument seen through `see(op, source, strides)`."""

    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        source, out = next(iter(op.args.values())), op.results[0]
        inside = strides_of(source.shape) if plain(source) else None
        outside = strides_of(out.shape)
        seen = see(op, source, inside) if inside is not None else None
        if seen is None or outside is None or seen.offset.scaled:
            return Refusal("it does not move float32 along known strides")
        found = shared_axes(out.shape, (seen.strides, outside))
        if isinstance(found, Refusal):
            return found
        rows, along, axes = found
        ints = {**strided_ints(along, axes, ("x", "out")), "offset": seen.offset.step}
        layouts = {source.name: PLAIN} if source.kind == "weight" else {}
        moved = Cost(bytes=out.rows_of(len(out.shape)).times(8))
        return Lowering("copy.f32", {"x": source, "out": out}, ints, rows=rows, layouts=layouts, cost=moved)

    return rule


def _slice(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    axis, start = op.args.get("dim", 0) % len(inside), op.args.get("start") or 0
    size, step = source.shape[axis], op.args.get("step", 1)
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(op.args.get("end") or 0, int):
        return None
    start = min(max(start + size if start < 0 else start, 0), size)
    return _Seen(_with(inside, axis, _times(inside[axis], step)), _times(inside[axis], start))


def _select(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    axis, index = op.args["dim"] % len(inside), op.args["index"]
    size = source.shape[axis]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    rest = (*inside[:axis], *inside[axis + 1 :])
    return _Seen(rest, _times(inside[axis], index % size))


def _transpose(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    one, other = op.args["dim0"], op.args["dim1"]
    turned = list(inside)
    turned[one], turned[other] = turned[other], turned[one]
    return _Seen(tuple(turned))


def _permute(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    return _Seen(tuple(inside[dim] for dim in op.args["dims"]))


def _expand(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    return _Seen(broadcast(source.shape, inside, op.results[0].shape))


def _same(op: Operation, source: Tensor, inside: list[Stride]) -> _Seen | None:
    return _Seen(tuple(inside))


def broadcast(
    shape: Sequence[int | Extent], inside: Sequence[Stride], wanted: Sequence[int | Extent]
) -> tuple[Stride, ...]:
    """Strides of a value seen under a larger shape: none along what is repeated."""
    lead = len(wanted) - len(shape)
    repeated = [size == 1 and big != 1 for size, big in zip(shape, wanted[lead:], strict=True)]
    kept = (NONE if over else stride for over, stride in zip(repeated, inside, strict=True))
    return (*[NONE] * lead, *kept)


def _times(stride: Stride, factor: int) -> Stride:
    return Stride(stride.step * factor, stride.scaled and factor != 0)


def _with(strides: Sequence[Stride], axis: int, stride: Stride) -> tuple[Stride, ...]:
    return (*strides[:axis], stride, *strides[axis + 1 :])


def _join(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    """cat and stack: parts side by side, row by row."""
    parts, out = op.args["tensors"], op.results[0]
    axis = op.args.get("dim", 0) % len(out.shape)
    if not 1 <= len(parts) <= PARTS or not all(plain(part) and part.kind != "weight" for part in parts):
        return Refusal(f"it does not join up to {PARTS} values of float32")
    widths = [_known(part.shape[axis:]) for part in parts]
    if axis == 0 or None in widths or 0 in widths:
        return Refusal("its parts have no known width behind the joined axis")
    rows = out.rows_of(axis)
    return Lowering(
        "concat.f32",
        {**{f"x{index}": part for index, part in enumerate(parts)}, "out": out},
        {f"w{index}": (widths[index] or 0) if index < len(parts) else 0 for index in range(PARTS)},
        rows=rows,
        cost=Cost(bytes=out.rows_of(len(out.shape)).times(8)),
    )


def _known(sizes: Sequence[int | Extent]) -> int | None:
    """The product of sizes; None where one is symbolic."""
    width = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        width *= size
    return width


# --- arithmetic ------------------------------------------------------------------------------------------------------


def arithmetic(kernel: str) -> Rule:
    """The rule of a sum, difference, product or quotient of two operands that broadcast, or of one and a number."""

    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        a, b, out = op.args["self"], op.args["other"], op.results[0]
        if op.args.get("alpha", 1) != 1 or op.args.get("rounding_mode") is not None:
            return Refusal("it scales or rounds what it computes")
        operands = {"a": a, "b": b}
        shapes = _joined(
            {name: value.shape for name, value in operands.items() if isinstance(value, Tensor)}, out.shape
        )
        views, numbers, outside = [], {}, strides_of(shapes["out"])
        for name, value in operands.items():
            inside = strides_of(shapes[name]) if plain(value) else None
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                views.append(tuple(NONE for _ in shapes["out"]))
                numbers[f"{name}_number"] = float(value)
            elif isinstance(value, Tensor) and inside is not None:
                views.append(broadcast(shapes[name], inside, shapes["out"]))
                numbers[f"{name}_number"] = 0.0
            else:
                return Refusal("its operands are not float32 values, weights or finite numbers")
        if outside is None:
            return Refusal("two of its dimensions are symbolic")
        found = shared_axes(shapes["out"], (*views, outside))
        if isinstance(found, Refusal):
            return found
        rows, along, axes = found
        tensors = {name: value if isinstance(value, Tensor) else None for name, value in operands.items()}
        layouts = {value.name: PLAIN for value in tensors.values() if value is not None and value.kind == "weight"}
        elements = out.rows_of(len(out.shape))
        return Lowering(
            f"strided_{kernel}.f32",
            {**tensors, "out": out},
            strided_ints(along, axes, ("a", "b", "out")),
            numbers,
            rows,
            layouts,
            Cost(elements, elements.times(12)),
        )

    return rule


def _joined(
    operands: Mapping[str, Sequence[int | Extent]], out: Sequence[int | Extent]
) -> dict[str, tuple[int | Extent, ...]]:
    """Shapes where neighbouring symbolic dimensions that every operand has in full, or not at all, are one."""
    shapes = {name: [*[1] * (len(out) - len(shape)), *shape] for name, shape in (*operands.items(), ("out", out))}
    whole = shapes["out"]
    for at in range(len(whole) - 2, -1, -1):
        one, other = whole[at : at + 2]
        if not isinstance(one, Extent) or not isinstance(other, Extent):
            continue
        if all(shape[at : at + 2] in ([one, other], [1, 1]) for shape in shapes.values()):
            both = one.times(other)
            for shape in shapes.values():
                shape[at : at + 2] = [both if shape[at] == one else 1]
    return {name: tuple(shape) for name, shape in shapes.items()}


# --- reach -----------------------------------------------------------------------------------------------------------


def _view_reach(sizes: Mapping[str, int], name: str, bit: int, offset: int = 0) -> tuple[int, int]:
    """Bytes a view touches: per row, and once where nothing of it depends on the row."""
    row, span, scaled = sizes[f"{name}_row"], offset + 1, 0
    for index in range(AXES):
        reached = (sizes[f"n{index}"] - 1) * sizes[f"{name}_{index}"]
        if sizes["scaled"] >> bit + index & 1:
            scaled += reached
        else:
            span += reached
    if row == scaled == 0:
        return 0, 4 * span
    # The last row reaches `span` from its start: more than a row only in a hostile plan, and then once per row.
    return 4 * (row + scaled + max(0, span - row)), 0


def _reach(*views: tuple[str, int]) -> Reach:
    def touched(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
        rows, once = {}, {}
        for name, bit in views:
            per_row, fixed = _view_reach(sizes, name, bit, sizes.get("offset", 0) if name == "x" else 0)
            if fixed:
                once[name] = fixed
            else:
                rows[name] = per_row
        # Every element is written to a place of its own: sizes beyond that would only take time.
        rows["out"] = max(rows.get("out", 0), 4 * sizes["n0"] * sizes["n1"] * sizes["n2"])
        once.pop("out", None)
        return rows, once

    return touched


def _concat_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    widths = [sizes[f"w{index}"] for index in range(PARTS)]
    return {**{f"x{index}": 4 * width for index, width in enumerate(widths)}, "out": 4 * sum(widths)}, {}


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
}
REACH: Mapping[str, Reach] = {
    "copy": _reach(("x", 0), ("out", 3)),
    "concat": _concat_reach,
    **dict.fromkeys(
        (f"strided_{name}" for name in ("add", "sub", "mul", "div")), _reach(("a", 0), ("b", 3), ("out", 6))
    ),
}
