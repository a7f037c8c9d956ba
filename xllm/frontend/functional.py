"""Sums and quotients a model's code makes in place, as the values they are: nothing but the state is written. And
operators under other names, by the one the rest of the compiler knows.

A call like `div_` on a value becomes `div`, and whoever read the value afterwards reads the result; where it was a cut
of a value, the value is joined of what stood beside the cut and the result. What is read afterwards by yet another
name, a view, is left alone: the verifier refuses what is left.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from xllm.frontend.fills import EMPTY

_SAME = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "clip": "clamp", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "concat": "cat", "concatenate": "cat",
}  # fmt: skip


def name_plainly(graph: fx.Graph) -> None:
    """Calls in `graph`, a torch.export graph, of an operator that torch has under two names take the first."""
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and target._opname in _SAME:
            node.target = getattr(getattr(torch.ops.aten, _SAME[target._opname]), target._overloadname)


def make_functional(graph: fx.Graph) -> None:
    """Replaces in-place calls in `graph`, a torch.export graph, which is changed."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    placed: dict[fx.Node, tuple[object, ...]] = {}  # a join -> what was put into it and where
    twins: dict[fx.Node, fx.Node] = {}  # that and the join, either way: two values of what was one memory
    for node in list(graph.nodes):
        plain = _plain(node.target)
        held = node.args[0] if node.args else None
        if plain is None or not isinstance(held, fx.Node):
            continue
        if not _alone(node, order, twins, held):
            base = _cut_of(held)
            fill = plain is torch.ops.aten.copy.default and base is not None and base.target in EMPTY
            if base is None or fill or not _alone(node, order, twins, held, base):
                continue  # of fills, `join_fills` takes care
            if not node.users and placed.get(base) == (node.args[1], *held.args[1:]):
                graph.erase_node(node)  # `x[1:] += y` stores what it has added in place once more
                continue
            joined = _joined(graph, base, held, node)
            placed[joined] = node, *held.args[1:]
            twins |= {joined: node, node: joined}
            order.update((made, order[node]) for made in (joined, *joined.all_input_nodes) if made not in order)
            for user in list(base.users):
                if order[user] > order[node]:
                    user.replace_input_with(base, joined)
        node.target = plain
        for user in list(held.users):
            if order[user] > order[node]:
                user.replace_input_with(held, node)


def _cut_of(node: fx.Node) -> fx.Node | None:
    """What a value is a cut of, where all sizes are numbers and no step leaves elements out."""
    if node.target is not torch.ops.aten.slice.Tensor or len(node.args) == 5 or node.kwargs:
        return None
    base, axis, *_ = (*node.args, 0)
    numbers = isinstance(base, fx.Node) and isinstance(base.meta["val"].shape[axis], int)
    return base if numbers and not any(isinstance(arg, fx.Node) for arg in node.args[1:]) else None  # pyright: ignore


def _joined(graph: fx.Graph, base: fx.Node, cut: fx.Node, new: fx.Node) -> fx.Node:
    """`base` with `new` in the place of `cut`, a slice of it, made behind `new`."""
    _, axis, start, stop, *_ = (*cut.args, *(None, 0, None, None)[len(cut.args) :])
    held, size = base.meta["val"], base.meta["val"].shape[axis]
    first, last, _ = slice(start, stop).indices(size)
    parts = [new]
    for at, (begin, end) in enumerate(((0, first), (last, size))):
        if begin < end:
            with graph.inserting_after(new):
                part = graph.call_function(torch.ops.aten.slice.Tensor, (base, axis, begin, end))
            part.meta = {**new.meta, "val": held.narrow(axis, begin, end - begin)}
            parts.insert(at * len(parts), part)
    with graph.inserting_after(max(parts, key=list(graph.nodes).index)):
        joined = graph.call_function(torch.ops.aten.cat.default, (parts, axis))
    joined.meta = {**new.meta, "val": held}
    return joined


def _alone(node: fx.Node, order: dict[fx.Node, int], twins: dict[fx.Node, fx.Node], *held: fx.Node) -> bool:
    """Whether nothing behind `node` reads the memory of what is held but through these, and nobody else owns it."""
    root = held[0]
    while _is_view(root):
        root = root.all_input_nodes[0]
    if not _fresh(root):
        return False
    names, seen = [root], {root}
    for name in names:
        views = [user for user in name.users if _is_view(user) and order[user] < order[node]]
        views = [view for view in (*views, *filter(None, (twins.get(name),))) if view not in seen]
        names += views
        seen.update(views)
    return all(name in held or order[user] <= order[node] for name in names for user in name.users)


def _plain(target: object) -> torch._ops.OpOverload | None:
    """div.Tensor for div_.Tensor; None for what is not in place."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    name = target._opname.removesuffix("_")
    if name == target._opname:
        return None
    return getattr(getattr(torch.ops.aten, name, None), target._overloadname, None)


def _fresh(node: fx.Node) -> bool:
    """Whether a value has memory of its own."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _fresh(node.args[0])
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in target._schema.returns)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)
