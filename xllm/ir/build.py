"""How nodes are made: one function inserts a call and gives it its type, its name and its place in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xllm.ir.program import Program, Weight, path_of


def fake_mode(program: Program) -> FakeTensorMode:
    """The mode the program's fake values live in; new values must join it to share its symbols."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError(f"program {program.name} has no fake tensors")


def emit(
    program: Program,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    like: fx.Node,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """A call at the graph's insertion point: value by fake execution, path and layer taken from `like`."""
    graph = program.graph
    short = getattr(target, "_opname", None) or getattr(target, "__name__", "call")
    stem = path_of(like).removeprefix(program.layers_path.rpartition(".")[0] + ".").replace(".", "_")
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name=f"{stem}_{short}".strip("_"))
    node.meta["custom"] = dict(like.meta.get("custom", {}))
    propagate(program, node)
    return node


def propagate(program: Program, node: fx.Node) -> None:
    """Recomputes the fake value of a call from those of its inputs."""

    def value(arg: fx.Node) -> Any:
        return arg.meta["val"]

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    with fake_mode(program), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def emit_weight(program: Program, name: str, weight: Weight) -> fx.Node:
    """The `get_attr` node of a weight, made at the top of the graph the first time it is asked for."""
    program.weights.setdefault(name, weight)
    first = next(iter(program.graph.nodes))
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node
    with program.graph.inserting_before(first):
        node = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    with fake_mode(program):
        node.meta["val"] = torch.empty(weight.shape, dtype=torch.float32, device="meta")
    node.meta["custom"] = {"path": name.rpartition(".")[0], "layer": None}
    return node


def prune(program: Program) -> None:
    """Removes pure calls nobody uses, and weights no node reads any more."""
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not is_mutating(node):
            program.graph.erase_node(node)
    used = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    program.weights = {name: weight for name, weight in program.weights.items() if name in used}


def is_mutating(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
