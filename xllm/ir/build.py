"""How nodes are made: one function inserts a call and gives it its type, its name and its place in the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xllm.ir.effects import is_mutating
from xllm.ir.program import Program, Weight, path_of
from xllm.ir.weight_rules import Constant, rule_leaves


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
    """A call at the graph's insertion point: value by fake execution, path and layer taken from `like`.

    Raises what the operator raises on arguments it refuses; the graph is then as it was.
    """
    graph = program.graph
    short = getattr(target, "_opname", None) or getattr(target, "__name__", "call")
    stem = path_of(like).removeprefix(program.layers_path.rpartition(".")[0] + ".").replace(".", "_")
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name=f"{stem}_{short}".strip("_"))
    node.meta["custom"] = dict(like.meta.get("custom", {}))
    try:
        propagate(program, node)
    except Exception:
        graph.erase_node(node)
        raise
    return node


def propagate(program: Program, node: fx.Node) -> None:
    """Recomputes the fake value of a call from those of its inputs. Raises what the operator raises."""
    node.meta["val"] = proven_value(node, fake_mode(program))


def proven_value(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The same as `fake_value`, of an operator that is right at every size. Raises where it is only at some: sizes of
    all programs of one capture are shared, and one that is tried and dropped must not settle them for the others.
    """
    assert mode.shape_env is not None
    with mode.shape_env.error_on_new_guards():
        return fake_value(node, mode)


def fake_value(node: fx.Node, mode: FakeTensorMode) -> Any:
    """What a call gives on the fake values of its inputs; `node` is left as it is."""

    def value(arg: fx.Node) -> Any:
        return arg.meta["val"]

    assert callable(node.target)
    given: Any = fx.map_arg((node.args, node.kwargs), value)
    args, kwargs = given
    if node.target is operator.getitem:
        return args[0][args[1]]
    with mode, torch.no_grad():
        return _SHAPED.get(node.target, node.target)(*args, **kwargs)


def _complex(real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    return (real + imaginary).to(real.dtype.to_complex())


# Operators of torch that look at the numbers behind symbolic sizes, which are then right at these alone.
_SHAPED: Mapping[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.complex.default: _complex}


def emit_weight(program: Program, name: str, weight: Weight, mode: FakeTensorMode | None = None) -> fx.Node:
    """The `get_attr` node of a weight, made at the top of the graph the first time it is asked for.

    A name that another weight holds gets a number behind its module: a.qkv_proj.weight, then a.qkv_proj_1.weight.
    """
    owner, _, leaf = name.rpartition(".")
    count = 0
    while program.weights.setdefault(name, weight) != weight:
        count += 1
        name = f"{owner}_{count}.{leaf}".lstrip(".")
    first = next(iter(program.graph.nodes), None)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node
    with program.graph.inserting_before(first):
        node = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    with mode or fake_mode(program):
        node.meta["val"] = torch.empty(weight.shape, dtype=torch.float32, device="meta")
    node.meta["custom"] = {"path": name.rpartition(".")[0], "layer": None}
    return node


def prune(program: Program) -> None:
    """Removes pure calls nobody uses, weights no node reads any more, and constants no weight is made of."""
    for node in reversed(list(program.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not is_mutating(node):
            program.graph.erase_node(node)
    used = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    program.weights = {name: weight for name, weight in program.weights.items() if name in used}
    leaves = (leaf for weight in program.weights.values() for leaf in rule_leaves(weight.rule))
    read = {leaf.name for leaf in leaves if isinstance(leaf, Constant)}
    program.constants = {name: array for name, array in program.constants.items() if name in read}
