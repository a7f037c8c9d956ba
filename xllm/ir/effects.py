"""What a node touches: computed from operator schemas, never declared a second time."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx


@dataclass(frozen=True)
class Effects:
    """The state inputs a node reads and writes. Nodes that touch one state keep their order when one of them writes."""

    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]


def effects(node: fx.Node, states: frozenset[fx.Node]) -> Effects:
    """Effects of one call. `states` are the program's mutable inputs; writes to anything else are listed as well."""
    found = operator_of(node)
    if found is None:
        return Effects((), ())
    given = named_arguments(node)
    written: list[fx.Node] = []
    for argument in found._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            items = value if isinstance(value, list | tuple) else [value]
            written += [item for item in items if isinstance(item, fx.Node)]
    reads = tuple(arg for arg in node.all_input_nodes if arg in states)
    return Effects(reads, tuple(written))


def operator_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator a node calls; None for inputs, weights, tuple elements and arithmetic on sizes."""
    called = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return node.target if called else None  # pyright: ignore[reportReturnType]  # narrowed on the line above


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """What an operator is given, by schema name, without defaults; empty for calls that are no operator."""
    found = operator_of(node)
    if found is None:
        return {}
    names = (argument.name for argument in found._schema.arguments)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_mutating(node: fx.Node) -> bool:
    """Whether a call writes to any of its arguments, so that it matters even when nobody reads its result."""
    found = operator_of(node)
    return found is not None and found._schema.is_mutable


def is_symbolic(node: fx.Node) -> bool:
    """True for calls that compute sizes, not tensors (they cost nothing at run time)."""
    return node.target is torch.ops.aten.sym_size.int or (
        callable(node.target)
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target is not operator.getitem
        and isinstance(node.meta.get("val"), torch.SymInt)
    )
