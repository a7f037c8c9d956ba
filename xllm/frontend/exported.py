"""From a torch.export program to ours: flat graph, named weights, names made of module path and operator.

What is kept of each node is its operator, its arguments, its fake value, its module path and its layer. Device
arguments stay `meta`: a program says what is computed, and `meta` in it means wherever it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from xllm.errors import CompileError
from xllm.ir.program import Weight


@dataclass(frozen=True)
class Place:
    """Where nodes belong: the path of the layer stack, the captured index of each model layer, and what checkpoints
    call the stack besides.
    """

    layers_path: str
    captured: Mapping[int, int]
    named: tuple[str, ...] = ()

    def renumber(self, path: str) -> str:
        """The module path (or tensor name) with the layer's captured index."""
        stacks = "|".join(map(re.escape, (self.layers_path, *self.named)))
        match = re.match(rf"({stacks})\.(\d+)(?=\.|$)", path) if self.layers_path else None
        if match is None or int(match.group(2)) not in self.captured:
            return path
        return f"{match.group(1)}.{self.captured[int(match.group(2))]}{path[match.end() :]}"

    def layer(self, path: str) -> int | None:
        """Captured layer of an already renumbered path."""
        match = re.match(rf"{re.escape(self.layers_path)}\.(\d+)(\.|$)", path) if self.layers_path else None
        return int(match.group(1)) if match else None

    def node_name(self, path: str, operator: str) -> str:
        """`model.layers.0.self_attn.q_proj`, `linear` -> `layers_0_self_attn_q_proj_linear`."""
        base = self.layers_path.rpartition(".")[0]
        inner = path if path != base else ""
        inner = inner.removeprefix(f"{base}.") if base else inner
        return re.sub(r"\W+", "_", f"{inner}_{operator}").strip("_")


def to_graph(
    exported: ExportedProgram, place: Place, tensor_of: Callable[[str], tuple[str, Weight]]
) -> tuple[fx.Graph, dict[str, Weight]]:
    """The exported step as a flat graph and the weights it reads.

    The first module of each path is the wrapper that was exported and is dropped. `tensor_of` gives the name in the
    program and the weight of a parameter or buffer (by its path without the wrapper) or lifted constant (by its
    name).
    """
    tensors = {
        spec.arg.name: str(spec.target) if spec.kind is InputKind.CONSTANT_TENSOR else _inner(str(spec.target))
        for spec in exported.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    graph = fx.Graph()
    weights: dict[str, Weight] = {}
    made: dict[fx.Node, fx.Node] = {}
    reads: dict[str, fx.Node] = {}
    names: set[str] = set()

    def create(op: str, target: Any, args: Any, kwargs: Any, wanted: str, path: str, val: Any) -> fx.Node:
        node = graph.create_node(op, target, args, kwargs, name=_unique(wanted, names))
        node.meta = {"val": val, "custom": {"path": path, "layer": place.layer(path)}}
        return node

    def read(node: fx.Node) -> fx.Node:
        if node in made:
            return made[node]
        target, weight = tensor_of(tensors[node.name])
        if target not in reads:
            weights[target] = weight
            path, _, leaf = target.rpartition(".")
            val = node.meta["val"]
            if val.dtype is torch.float64:  # weights are float32, whatever the model keeps beside its parameters
                val = val.new_empty(val.shape, dtype=torch.float32)
            reads[target] = create("get_attr", target, (), {}, place.node_name(path, leaf), path, val)
        return reads[target]

    for node in _sizes_first(exported.graph, tensors):
        if node.op == "placeholder" and node.name not in tensors:
            made[node] = create("placeholder", node.name, (), {}, node.name, "", node.meta["val"])
        elif node.op == "call_function":
            path = "" if _is_size(node) else place.renumber(_path(node))
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise _nested(node, path)
            args, kwargs = fx.map_arg(node.args, read), fx.map_arg(node.kwargs, read)
            wanted = place.node_name(path, _operator(node))
            made[node] = create("call_function", node.target, args, kwargs, wanted, path, node.meta.get("val"))
        elif node.op == "output":
            result = fx.map_arg(node.args[0], read)
            logits = result[0] if isinstance(result, (tuple, list)) else result
            assert isinstance(logits, fx.Node)
            output = graph.output(logits)
            output.meta = {"val": logits.meta["val"], "custom": {"path": "", "layer": None}}
        elif node.op == "get_attr":
            raise _nested(node, place.renumber(_path(node)))
    return graph, weights


def _sizes_first(graph: fx.Graph, tensors: Mapping[str, str]) -> list[fx.Node]:
    """The nodes, with sizes that follow from the inputs right behind them: tracing leaves each in the layer that
    asked first.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    known = {node for node in inputs if node.name not in tensors}
    sizes = []
    for node in graph.nodes:
        if node.op == "call_function" and _is_size(node) and known.issuperset(node.all_input_nodes):
            known.add(node)
            sizes.append(node)
    front = {*inputs, *sizes}
    return [*inputs, *sizes, *(node for node in graph.nodes if node not in front)]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return re.sub(r"@\d+", "", _inner(list(stack.values())[-1][0])) if stack else ""


def _inner(path: str) -> str:
    return path.partition(".")[2]


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def _unique(wanted: str, names: set[str]) -> str:
    name, count = wanted, 0
    # A bare builtin ("slice", "input") is no legal node name; fx would rename it on its own.
    while name in names or name in __builtins__:
        count += 1
        name = f"{wanted}_{count}"
    names.add(name)
    return name


def _nested(node: fx.Node, path: str) -> CompileError:
    return CompileError(
        "control flow was captured as a nested graph, which a step program cannot hold",
        code="nested-graph",
        pass_name="capture",
        node=node.name,
        where=path,
        try_="a model whose forward has no torch.cond, scan or autocast region",
    )
