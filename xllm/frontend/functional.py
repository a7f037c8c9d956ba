"""Sums and quotients a model's code makes in place, as the values they are: nothing but the state is written.

A call like `div_` on a fresh value becomes `div`, and whoever read the value afterwards reads the result. Values that
are views, or are seen through views, are left alone: the verifier refuses what is left.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx


def make_functional(graph: fx.Graph) -> None:
    """Replaces in-place calls in `graph`, a torch.export graph, which is changed."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        plain = _plain(node.target)
        held = node.args[0] if node.args else None
        if plain is None or not isinstance(held, fx.Node) or not _fresh(held) or any(_is_view(u) for u in held.users):
            continue
        node.target = plain
        for user in list(held.users):
            if order[user] > order[node]:
                user.replace_input_with(held, node)


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
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)
