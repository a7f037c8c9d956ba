"""What is legal: a program must pass before and after every pass. One rule a function, each names the offending node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor

from xllm.ir.build import fake_mode
from xllm.ir.effects import effects, is_symbolic
from xllm.ir.program import Program

INPUTS = ("ids", "positions", "slots", "last", "kv")
_NAMESPACES = ("aten", "xllm")


class VerifyError(ValueError):
    """The program is not legal: `node` is where, the message says which rule it breaks."""

    def __init__(self, node: fx.Node | None, message: str) -> None:
        self.node = node
        where = f" at %{node.name} = {node.target}" if node is not None else ""
        super().__init__(f"{message}{where}")


def verify(program: Program) -> None:
    """Raises VerifyError naming the first broken rule; returns None for a legal program."""
    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise VerifyError(None, f"graph is malformed: {error}") from error
    for rule in RULES:
        rule(program)


def inputs_are_the_step(program: Program) -> None:
    names = tuple(node.target for node in program.graph.nodes if node.op == "placeholder")
    if names != INPUTS:
        raise VerifyError(None, f"inputs are {names}, a step takes {INPUTS}")


def calls_are_operators(program: Program) -> None:
    for node in program.calls():
        if node.target is operator.getitem or is_symbolic(node):
            continue
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in _NAMESPACES:
            raise VerifyError(node, f"only operators of {' and '.join(_NAMESPACES)} may be called")


def values_are_typed(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(node, "value has no type (emit nodes with ir.build.emit)")


def nothing_hides_in_meta(program: Program) -> None:
    for node in program.graph.nodes:
        if extra := set(node.meta) - {"val", "custom"}:
            raise VerifyError(node, f"meta holds {sorted(extra)}; plans are side tables")


def weights_exist(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        weight = program.weights.get(str(node.target))
        if weight is None:
            raise VerifyError(node, f"weight {node.target!r} has no entry in the weight table")
        if tuple(node.meta["val"].shape) != weight.shape:
            raise VerifyError(node, f"weight is {weight.shape} in the table, {tuple(node.meta['val'].shape)} in the graph")


def only_state_is_mutated(program: Program) -> None:
    states = frozenset({program.input("kv")})
    for node in program.calls():
        for written in effects(node, states).writes:
            if written not in states:
                raise VerifyError(node, f"writes {written.name}, which is not state")


def layers_are_contiguous(program: Program) -> None:
    """A layer's nodes stand together: folding, stamping and per-layer plans rely on it."""
    seen: list[int | None] = []
    for node in program.calls():
        layer = node.meta.get("custom", {}).get("layer")
        if layer is not None and (not seen or seen[-1] != layer):
            if layer in seen:
                raise VerifyError(node, f"layer {layer} is split: its nodes do not stand together")
            seen.append(layer)


def types_match_operators(program: Program) -> None:
    """Every dialect call, run again on fake values, gives the type its node claims."""
    mode = fake_mode(program)
    for node in program.calls():
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "xllm":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        try:
            with mode:
                result = node.target(*args, **kwargs)
        except Exception as error:
            raise VerifyError(node, f"operator refuses its arguments: {error}") from error
        if not same_type(result, node.meta["val"]):
            raise VerifyError(node, f"operator gives {type_key(result)}, the node claims {type_key(node.meta['val'])}")


def type_key(value: object) -> object:
    """Comparable shape and dtype of a fake value or a tuple of them."""
    if isinstance(value, FakeTensor | torch.Tensor):
        return (tuple(str(size) for size in value.shape), str(value.dtype))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(type_key(item) for item in value)
    return str(value)


def same_type(one: object, other: object) -> bool:
    return type_key(one) == type_key(other)


RULES: tuple[Callable[[Program], None], ...] = (
    inputs_are_the_step,
    calls_are_operators,
    values_are_typed,
    nothing_hides_in_meta,
    weights_exist,
    only_state_is_mutated,
    layers_are_contiguous,
    types_match_operators,
)
