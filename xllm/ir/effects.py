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


# Sound operators that torch neither calls core or pointwise nor takes apart, and parts of names that are not sound.
_PLAIN = (
    "arange", "baddbmm", "complex", "eye", "floor_divide", "glu", "hardsigmoid", "hardswish", "lift_fresh_copy",
    "linspace", "logsumexp", "new_full", "new_ones", "new_zeros", "norm", "ones", "ones_like", "polar", "roll", "split",
    "split_with_sizes", "stack", "t", "tril", "triu", "unbind", "unfold", "view_as_complex", "view_as_real", "zeros",
    "zeros_like",
)  # fmt: skip
_UNSOUND = ("empty", "from_file", "_unsafe", "unsafe_", "batch_norm", "sparse", "resize", "set_data")


def runs_alone(found: torch._ops.OpOverload) -> bool:
    """Whether an operator only makes values from values, the same each time, so that any plan may call it.

    An artifact names operators: none of those it can name may write, draw at random, open anything, skip its checks,
    or hand out memory that nobody wrote.
    """
    schema, name = found._schema, found._opname
    if found.namespace not in ("aten", "xllm") or schema.is_mutable or torch.Tag.nondeterministic_seeded in found.tags:
        return False
    if not schema.returns or not all(str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns):
        return False
    if any(argument.name == "unsafe" for argument in schema.arguments) or any(part in name for part in _UNSOUND):
        return False
    if found.namespace == "xllm" or torch.Tag.core in found.tags or torch.Tag.pointwise in found.tags:
        return True
    return name in _PLAIN or (not name.startswith("_") and found._can_decompose())


def is_symbolic(node: fx.Node) -> bool:
    """True for calls that compute sizes, not tensors (they cost nothing at run time)."""
    return node.target is torch.ops.aten.sym_size.int or (
        callable(node.target)
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target is not operator.getitem
        and isinstance(node.meta.get("val"), torch.SymInt)
    )
