"""What a node touches: computed from operator schemas, never declared a second time."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx as fx


@dataclass(frozen=True)
class Effects:
    """The state inputs a node reads and writes. A node with writes keeps its place among the other users of that state."""

    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]

    @property
    def pure(self) -> bool:
        return not self.writes


def effects(node: fx.Node, states: frozenset[fx.Node]) -> Effects:
    """Effects of one call. `states` are the program's mutable inputs."""
    if node.op != "call_function":
        return Effects((), ())
    written: list[fx.Node] = []
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                written.append(value)
    reads = tuple(arg for arg in node.all_input_nodes if arg in states)
    return Effects(reads, tuple(written))


def is_symbolic(node: fx.Node) -> bool:
    """True for calls that compute sizes, not tensors (they cost nothing at run time)."""
    return node.target is torch.ops.aten.sym_size.int or (
        callable(node.target)
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target is not operator.getitem
        and isinstance(node.meta.get("val"), torch.SymInt)
    )
