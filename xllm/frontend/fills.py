"""A new tensor that is filled part by part becomes a join of its parts: a step program changes nothing but its state.

Done where tracing has left `new_empty`, slices of it and `copy_` into them. A tensor that is filled otherwise stays as
it is, and the verifier names it.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from xllm.ir.build import emit
from xllm.ir.program import Program, arguments

aten = torch.ops.aten
EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def join_fills(program: Program) -> None:
    """Rewrites every such tensor whose parts, along one axis, are each filled once before anything reads it."""
    for node in list(program.calls()):
        if node.target in EMPTY and (parts := _parts(node)):
            _join(program, node, parts)


def _parts(empty: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Slice and fill of every part in order; nothing where they do not make up the whole, or someone reads between."""
    order = {node: index for index, node in enumerate(empty.graph.nodes)}
    found = []
    for user in empty.users:
        fills = list(user.users)
        if user.target is aten.slice.Tensor and len(fills) == 1 and fills[0].target is aten.copy_.default:
            if fills[0].args[0] is not user or fills[0].users:
                return []
            found.append((user, fills[0]))
    if not found:
        return []
    dims = {_bounds(part)[0] for part, _ in found}
    found.sort(key=lambda pair: _bounds(pair[0])[1])
    at = 0
    for part, _ in found:
        _, start, stop = _bounds(part)
        if len(dims) > 1 or start != at:
            return []
        at = stop
    last = max(order[fill] for _, fill in found)
    readers = [user for user in empty.users if user not in {part for part, _ in found}]
    whole = at == empty.meta["val"].shape[dims.pop()]
    return found if whole and all(order[reader] > last for reader in readers) else []


def _bounds(part: fx.Node) -> tuple[int, int, int]:
    """Axis, start and stop of a slice; an empty stretch where it is none of plain numbers."""
    given = arguments(part)
    source: fx.Node = given[0]
    axis: int = given[1] if len(given) > 1 else 0
    start, stop, step = (*given[2:], *(None, None, 1)[max(len(given) - 2, 0) :])
    size = source.meta["val"].shape[axis]
    if step != 1 or not isinstance(size, int) or not all(isinstance(edge, int | None) for edge in (start, stop)):
        return axis, -1, -1
    first, last, _ = slice(start, stop).indices(size)
    return axis % source.meta["val"].dim(), first, last


def _join(program: Program, empty: fx.Node, parts: list[tuple[fx.Node, fx.Node]]) -> None:
    order = list(program.graph.nodes)
    last = max((fill for _, fill in parts), key=order.index)
    with program.graph.inserting_before(last):
        sources = [
            emit(program, aten.expand.default, (fill.args[1], list(part.meta["val"].shape)), like=empty)
            if fill.args[1].meta["val"].shape != part.meta["val"].shape  # pyright: ignore
            else fill.args[1]
            for part, fill in parts
        ]
        joined = emit(program, aten.cat.default, (sources, _bounds(parts[0][0])[0]), like=empty)
    for part, fill in parts:
        program.graph.erase_node(fill)
        program.graph.erase_node(part)
    empty.replace_all_uses_with(joined)
    program.graph.erase_node(empty)
