"""How values look to kernels that walk along strides: rows times at most three axes, and strides of every operand.

Where one dimension is symbolic it is the rows, wherever it stands, and a stride may count in rows (heads-first values
[H, T, D]). Where several are, the outermost axis is the rows, and sizes and strides depend on dims: in functions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from xllm.targets.base import Extent, Refusal
from xllm.targets.cpu.rules import Reach

AXES = 3
Size = int | Extent
ELEMENT = {"float32": "f32", "int64": "i64", "int32": "i32", "bool": "u8"}  # suffixes of kernels on any type
ELEMENT_SIZE = {"f32": 4, "i64": 8, "i32": 4, "u8": 1}
NONE, ONE = Extent(), Extent.of(1)


def extent(size: Size) -> Extent:
    return size if isinstance(size, Extent) else Extent.of(size)


def constant(size: Extent) -> int | None:
    """The number a size is; None where it depends on a dim."""
    return size.const if not any(size.terms.keys() - {""}) else None


def product(sizes: Sequence[Size]) -> Extent:
    total = ONE
    for size in sizes:
        total = total.times(size)
    return total


@dataclass(frozen=True)
class Axis:
    """One axis of a result: its size, and the stride of every operand and of the result along it."""

    size: Size
    strides: tuple[Extent, ...]

    def holds(self, inner: Axis) -> bool:
        """Whether stepping this axis is stepping past all of `inner`, so that the two are one axis. Numbers and dims
        stay apart: what lies side by side in memory is worked on together."""
        pairs = zip(self.strides, inner.strides, strict=True)
        alike = isinstance(self.size, int) == isinstance(inner.size, int)
        return alike and all(outer == one.times(inner.size) for outer, one in pairs)


@dataclass(frozen=True)
class Walk:
    """What a strided kernel is told: its rows, and ints, some of which depend on dims."""

    rows: Extent
    ints: Mapping[str, int]
    extents: Mapping[str, Extent] = field(default_factory=dict)

    def also(self, name: str, size: Extent) -> Walk:
        """One int more."""
        number = constant(size)
        if number is None:
            return replace(self, extents={**self.extents, name: size})
        return replace(self, ints={**self.ints, name: number})


def strides_of(shape: Sequence[Size]) -> list[Extent]:
    """Strides of a value that lies in memory in order."""
    found, step = [], ONE
    for size in reversed(shape):
        found.append(step)
        step = step.times(size)
    return found[::-1]


def broadcast(shape: Sequence[Size], inside: Sequence[Extent], wanted: Sequence[Size]) -> tuple[Extent, ...]:
    """Strides of a value seen under a larger shape: none along what is repeated."""
    lead = len(wanted) - len(shape)
    repeated = [size == 1 and big != 1 for size, big in zip(shape, wanted[lead:], strict=True)]
    kept = (NONE if over else stride for over, stride in zip(repeated, inside, strict=True))
    return (*[NONE] * lead, *kept)


def walk(shape: Sequence[Size], views: Mapping[str, Sequence[Extent]]) -> Walk | Refusal:
    """How a kernel goes through a result of `shape`, every view's strides along it given. The ints are n0 n1 n2, the
    strides <view>_row <view>_0 .. of every view, and `scaled`: bit 3 v + i for axis i of view v, which counts in rows.
    """
    axes: list[Axis] = []
    for index, size in enumerate(shape):
        if size == 1:
            continue
        axis = Axis(size, tuple(view[index] for view in views.values()))
        if axes and axes[-1].holds(axis):
            axis = replace(axis, size=_product(axes.pop().size, size))
        axes.append(axis)
    return _one_symbol(axes, tuple(views)) or _several(axes, tuple(views))


def _product(one: Size, other: Size) -> Size:
    return one * other if isinstance(one, int) and isinstance(other, int) else extent(one).times(other)


def _one_symbol(axes: list[Axis], names: tuple[str, ...]) -> Walk | None:
    """With numbers for all sizes but one, and strides that are numbers or count in that one."""
    symbolic = [axis for axis in axes if isinstance(axis.size, Extent)]
    rest = [axis for axis in axes if axis not in symbolic]
    along = symbolic[0] if symbolic else Axis(ONE, (NONE,) * len(names))
    rows = extent(along.size)
    if len(symbolic) > 1 or len(rest) > AXES or any(constant(stride) is None for stride in along.strides):
        return None
    rest = _padded(rest, names)
    ints = {f"n{index}": extent(axis.size).const for index, axis in enumerate(rest)}
    scaled = 0
    for view, name in enumerate(names):
        ints[f"{name}_row"] = along.strides[view].const
        for index, axis in enumerate(rest):
            step = constant(axis.strides[view])
            if step is None:
                step = next(iter(axis.strides[view].terms.values())) // next(iter(rows.terms.values()))
                if rows.times(step) != axis.strides[view]:
                    return None
                scaled |= 1 << 3 * view + index
            ints[f"{name}_{index}"] = step
    return Walk(rows, {**ints, "scaled": scaled})


def _several(axes: list[Axis], names: tuple[str, ...]) -> Walk | Refusal:
    """With the outermost axis as the rows."""
    if len(axes) > AXES + 1:
        return Refusal(f"it moves along {len(axes)} axes at once, the kernel along {AXES + 1}")
    along, *rest = axes or [Axis(1, (NONE,) * len(names))]
    rest, found = _padded(rest, names), Walk(extent(along.size), {"scaled": 0})
    for index, axis in enumerate(rest):
        found = found.also(f"n{index}", extent(axis.size))
    for view, name in enumerate(names):
        found = found.also(f"{name}_row", along.strides[view])
        for index, axis in enumerate(rest):
            found = found.also(f"{name}_{index}", axis.strides[view])
    return found


def _padded(axes: list[Axis], names: tuple[str, ...]) -> list[Axis]:
    return [Axis(1, (NONE,) * len(names))] * (AXES - len(axes)) + axes


# --- reach -----------------------------------------------------------------------------------------------------------


def reach_of(views: Mapping[str, tuple[int, int]], offset: str = "") -> Reach:
    """The reach of a kernel over views: name -> its first bit of `scaled`, and bytes of an element (0: those of the
    kernel's type). `offset`: the view that begins at the int of that name.
    """

    def touched(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
        rows, once = {}, {}
        if not sizes["n0"] * sizes["n1"] * sizes["n2"]:
            return dict.fromkeys(views, 0), {}
        for name, (bit, held) in views.items():
            size = held or element
            row, span, scaled = sizes[f"{name}_row"], 1 + (sizes["offset"] if name == offset else 0), 0
            for index in range(AXES):
                reached = max(sizes[f"n{index}"] - 1, 0) * sizes[f"{name}_{index}"]
                if sizes["scaled"] >> bit + index & 1:
                    scaled += reached
                else:
                    span += reached
            # Every element of a result has a place of its own: sizes beyond that would only take time.
            row = max(row, sizes["n0"] * sizes["n1"] * sizes["n2"] - scaled) if name == "out" else row
            rows[name], once[name] = size * (row + scaled), size * max(0, span - row)
        return rows, once

    return touched
