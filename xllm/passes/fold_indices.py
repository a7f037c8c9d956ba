"""Index arithmetic of exporters that says nothing goes: masks are read where they lie.

before:  %p = aten.cat([%rows, %columns], -1)                after:  %v = aten.reshape(%mask, [batch, 1, 1, seq])
         %r = aten.slice(%p, -1, 0, 1)                               %s = aten.expand(%v, [batch, 1, seq, seq])
         %v = aten.index(%mask, [%r, %c])
         %s = aten.logical_and(aten.ge(%queries, 0), %v)

where rows, columns and queries count 0, 1, … along an axis of their own (`counted`). A cut of a join at the borders of
a part is the part; picking by counts is the value, or picks along the one axis that has more; what always holds is no
condition. Does not fire where counts begin elsewhere, share an axis or lie in another order, and where a mask is
expanded over axes that are not one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import prune
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments
from xllm.ir.verify import same_type
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, shape_arguments, sizes

aten = torch.ops.aten
_BOUNDS = {aten.ge.Scalar: operator.ge, aten.gt.Scalar: operator.gt}  # of what counts upwards


@dataclass(frozen=True)
class Counted:
    """start, start + 1, … along `axis` (from the end), the same everywhere else. `base`: the range [n] it is made of;
    start: a number, or a symbolic size."""

    base: fx.Node
    axis: int
    start: Any


@dataclass(frozen=True)
class FoldIndices(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for step in (_cut_of_join, _expanded_twice, _picked, _always):
            for node in list(program.calls()):
                step(editor, node)
            prune(program)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))


def counted(node: Any) -> Counted | None:
    """What a value counts, behind views, expansions, casts to whole numbers and an offset."""
    if is_call(node, aten.arange.start):
        start, _ = arguments(node)[:2]
        return Counted(node, -1, start if isinstance(start, int) else start.meta["val"])
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        inner, by = counted(node.args[0]), _number(node.args[1])
        return Counted(inner.base, inner.axis, inner.start + by) if inner is not None and by is not None else None
    if not is_call(node, aten.reshape.default, aten.expand.default):
        return None
    source = arguments(node)[0]
    inner = counted(source)
    if inner is None:
        return None
    before, after = sizes(source), sizes(node)
    if is_call(node, aten.expand.default):
        return inner if str(before[inner.axis]) == str(after[inner.axis]) else None
    kept, there = _not_one(before), _not_one(after)
    if [str(before[axis]) for axis in kept] != [str(after[axis]) for axis in there] or inner.axis not in kept:
        return None
    return Counted(inner.base, there[kept.index(inner.axis)], inner.start)


def _not_one(shape: tuple[Any, ...]) -> list[int]:
    """Axes from the end whose size is not one."""
    return [axis for axis in range(-len(shape), 0) if not (isinstance(shape[axis], int) and shape[axis] == 1)]


def _number(value: Any) -> Any:
    """A whole number or a size, as an argument or as a value of no dimensions."""
    if isinstance(value, int):
        return value
    while is_call(value, aten.reshape.default):
        value = arguments(value)[0]
    if is_call(value, aten.stack.default) and len(arguments(value)[0]) == 1:
        return _number(arguments(value)[0][0])
    if not is_call(value, aten.scalar_tensor.default):
        return None
    held = value.args[0]
    return held.meta["val"] if isinstance(held, fx.Node) else held


def _cut_of_join(editor: Editor, node: fx.Node) -> None:
    if not is_call(node, aten.slice.Tensor) or not is_call(node.args[0], aten.cat.default):
        return
    join, given = node.args[0], named_arguments(node)
    parts, axis = arguments(join)[0], named_arguments(join).get("dim", 0) % len(sizes(join))
    if given.get("dim", 0) % len(sizes(join)) != axis or given.get("step", 1) != 1:
        return
    at = 0
    for part in parts:
        width = sizes(part)[axis]
        if not isinstance(width, int):
            return
        if (given.get("start") or 0, given.get("end")) == (at, at + width):
            node.replace_all_uses_with(part)
            return editor.hit(node)
        at += width


def _expanded_twice(editor: Editor, node: fx.Node) -> None:
    """An expansion of an expansion is one."""
    if is_call(node, aten.expand.default) and is_call(inner := node.args[0], aten.expand.default):
        source = arguments(inner)[0]
        wanted = shape_arguments(editor, sizes(node)) if len(sizes(source)) == len(sizes(node)) else None
        if wanted is not None:
            node.args = (source, wanted)
            editor.hit(node)


def _picked(editor: Editor, node: fx.Node) -> None:
    if not is_call(node, aten.index.Tensor):
        return
    source, indices = arguments(node)
    found = [counted(index) for index in indices]
    shape = sizes(node)
    if len(indices) != len(sizes(source)) or any(one is None for one in found):
        return
    axes = [one.axis for one in found if one is not None]
    others = [size for axis, size in enumerate(shape, -len(shape)) if axis not in axes]
    if any(one.start != 0 for one in found if one) or sorted(set(axes)) != axes or any(size != 1 for size in others):
        return editor.miss(node, "its indices do not count from 0 along axes of their own, in order")
    wanted = shape_arguments(editor, shape)
    if wanted is None:
        return editor.miss(node, "its shape cannot be read off the inputs")
    with editor.before(node):
        for axis, one in enumerate(found):
            if one is not None and str(sizes(one.base)[0]) != str(sizes(source)[axis]):
                source = editor.emit(aten.index.Tensor, source, [*[None] * axis, one.base], like=node)
        made = editor.emit(aten.reshape.default, source, wanted, like=node)
    node.replace_all_uses_with(made)
    editor.hit(made)


def _always(editor: Editor, node: fx.Node) -> None:
    """`and` with what always holds is the other side, seen under the shape of both."""
    if not is_call(node, aten.logical_and.default):
        return
    for truth, other in (arguments(node), arguments(node)[::-1]):
        if not is_call(truth, *_BOUNDS):
            continue
        found, least = counted(truth.args[0]), truth.args[1]
        if found is None or not isinstance(found.start, int) or not _BOUNDS[truth.target](found.start, least):  # pyright: ignore
            continue
        if same_type(node.meta["val"], other.meta["val"]):
            node.replace_all_uses_with(other)
            return editor.hit(node)
        wanted = shape_arguments(editor, sizes(node))
        if wanted is not None:
            with editor.before(node):
                made = editor.emit(aten.expand.default, other, wanted, like=node)
            node.replace_all_uses_with(made)
            return editor.hit(made)
