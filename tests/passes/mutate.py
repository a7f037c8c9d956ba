"""Random programs that contain what a rewrite looks for: captured models, changed in ways a rewrite must survive.

A change makes a near miss, lets an inner value escape, shares an input, or only spells the same thing differently.
What is legal is for the verifier to say; a change it refuses is not made.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import emit
from xllm.ir.effects import is_mutating, is_symbolic
from xllm.ir.verify import VerifyError, type_key, verify

aten = torch.ops.aten
Change = Callable[[Program, random.Random], bool]


def mutated(program: Program, rng: random.Random, changes: int) -> Program | None:
    """A copy with that many random changes, or None when they led to something illegal."""
    copy = program.copy()
    for _ in range(changes):
        if not rng.choice(CHANGES)(copy, rng):
            return None
    try:
        verify(copy)
    except VerifyError:
        return None
    return copy


def escape(program: Program, rng: random.Random) -> bool:
    """A value gets one more user: its mean over everything but the tokens joins the step's last rows; or it is one more
    result of a function.
    """
    if program.is_function:
        return _further_result(program, rng)
    rows = _last_rows(program)
    tokens = program.input("ids").meta["val"].shape[0]
    choices = [node for node in _values(program) if node.meta["val"].dim() and node.meta["val"].shape[0] == tokens]
    if rows is None or not choices:
        return False
    value, (target, index) = rng.choice(choices), rows.args[:2]
    assert isinstance(target, fx.Node)
    with program.graph.inserting_before(rows):
        flat = emit(program, aten.reshape.default, (value, [tokens_of(program), -1]), like=rows)
        mean = emit(program, aten.mean.dim, (flat, [-1], True), like=rows)
        total = emit(program, aten.add.Tensor, (target, mean), like=rows)
    rows.args = (total, index)
    return True


def _further_result(program: Program, rng: random.Random) -> bool:
    output, value = program.output(), rng.choice(_values(program))
    held: Any = output.args[0]
    if value in held:
        return False
    results = (*held, value)
    output.args = (results,)
    output.meta["val"] = tuple(node.meta["val"] for node in results)
    program.outputs = (*program.outputs, f"further_{len(results)}")
    return True


def perturb(program: Program, rng: random.Random) -> bool:
    """One operand of one call is negated or scaled on the way: often a near miss, always another program."""
    edge = _edge(program, rng)
    if edge is None:
        return False
    node, operand = edge
    with program.graph.inserting_before(node):
        how = rng.choice(((aten.neg.default, ()), (aten.mul.Tensor, (1.5,)), (aten.add.Tensor, (0.25,))))
        changed = emit(program, how[0], (operand, *how[1]), like=node)
    _replace_once(node, operand, changed)
    return True


def share(program: Program, rng: random.Random) -> bool:
    """One operand becomes another value of its type that was made before."""
    edge = _edge(program, rng)
    if edge is None:
        return False
    node, operand = edge
    earlier = []
    for other in program.graph.nodes:
        if other is node:
            break
        held = other.meta.get("val") if other.op in ("call_function", "get_attr") and other is not operand else None
        if held is not None and type_key(held) == type_key(operand.meta["val"]):
            earlier.append(other)
    if not earlier:
        return False
    _replace_once(node, operand, rng.choice(earlier))
    return True


def duplicate(program: Program, rng: random.Random) -> bool:
    """A call is made twice and one of its users takes the copy."""
    choices = [node for node in _values(program) if node.users]
    node = rng.choice(choices)
    user = rng.choice(sorted(node.users, key=lambda other: other.name))
    with program.graph.inserting_after(node):
        twin = program.graph.node_copy(node)
    twin.meta = {**node.meta, "custom": dict(node.meta["custom"])}
    user.replace_input_with(node, twin)
    return True


def commute(program: Program, rng: random.Random) -> bool:
    """The two sides of a sum or a product change places."""
    choices = [
        node
        for node in program.calls()
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs and isinstance(node.args[1], fx.Node)
    ]
    if not choices:
        return False
    node = rng.choice(choices)
    node.args = (node.args[1], node.args[0])
    return True


def retune(program: Program, rng: random.Random) -> bool:
    """A literal number (eps, scale, cap) is another one."""
    choices = [
        (node, index)
        for node in program.calls()
        for index, value in enumerate(node.args)
        if isinstance(value, float) and 0 < value < 1e4
    ]
    if not choices:
        return False
    node, index = rng.choice(choices)
    node.update_arg(index, node.args[index] * rng.choice((0.5, 1.25, 2.0)))  # pyright: ignore[reportOperatorIssue]
    return True


CHANGES: tuple[Change, ...] = (escape, escape, perturb, share, duplicate, commute, retune)


def tokens_of(program: Program) -> fx.Node | int:
    """The node that holds the step's number of tokens, made where the graph has none."""
    ids = program.input("ids")
    for node in ids.users:
        if node.target is aten.sym_size.int and node.args == (ids, 0):
            return node
    first = next(iter(node for node in program.graph.nodes if node.op != "placeholder"))
    with program.graph.inserting_before(first):
        return emit(program, aten.sym_size.int, (ids, 0), like=ids)


def _last_rows(program: Program) -> fx.Node | None:
    last = program.input("last")
    return next((node for node in last.users if node.target is torch.ops.xllm.rows.default), None)


def _values(program: Program) -> list[fx.Node]:
    """Calls that make one float32 value and change nothing."""
    return [
        node
        for node in program.calls()
        if not is_symbolic(node)
        and not is_mutating(node)
        and node.target is not operator.getitem
        and isinstance(node.meta["val"], torch.Tensor)
        and node.meta["val"].dtype == torch.float32
    ]


def _edge(program: Program, rng: random.Random) -> tuple[fx.Node, fx.Node] | None:
    """A call and one float32 operand of it that is no state."""
    node = rng.choice(list(program.calls()))
    operands = [
        source
        for source in node.all_input_nodes
        if source.op != "placeholder"
        and isinstance(source.meta.get("val"), torch.Tensor)
        and source.meta["val"].dtype == torch.float32
    ]
    return (node, rng.choice(operands)) if operands and not is_symbolic(node) else None


def _replace_once(node: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """The first place where `node` takes `old` takes `new`."""
    seen = False

    def swap(arg: fx.Node) -> fx.Node:
        nonlocal seen
        if arg is old and not seen:
            seen = True
            return new
        return arg

    node.args = fx.map_arg(node.args, swap)  # pyright: ignore[reportAttributeAccessIssue]
