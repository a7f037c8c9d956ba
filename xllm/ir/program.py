"""What a program is: one FX graph, the weights it reads, the state it mutates, and how its layers repeat.

A step computes `(ids[T], positions[T], slots[T], last[S], kv) -> rows[S, N]` over the flattened tokens of all
sequences: logits, embeddings or label scores (`Task`). State is its only mutable input: the KV cache, and behind it
`fixed` where layers keep what does not grow. A function computes named outputs from named inputs and keeps nothing.
Weights are `get_attr` nodes; plans are side tables keyed by node name and never live in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch.fx as fx

from xllm.ir.weight_rules import WeightRule

STATES = ("kv", "fixed")


@dataclass(frozen=True)
class Dim:
    """A symbolic dimension: its printed name and the inclusive range a plan must cover."""

    name: str
    min: int
    max: int


@dataclass(frozen=True)
class Task:
    """What the rows [S, N] of a step are: "generate" gives logits, "embed" embeddings, "classify" scores of `labels`.

    pooling: which row stands for a sequence: its last, its first ("cls"), or the mean of all. normalize: embeddings
    have length 1. segments: kinds of segment a step's tokens may be of: token t of segment s is id s * vocab + t.
    """

    kind: Literal["generate", "embed", "classify"] = "generate"
    pooling: Literal["last", "cls", "mean"] = "last"
    normalize: bool = False
    labels: tuple[str, ...] = ()
    segments: int = 1


@dataclass(frozen=True)
class Weight:
    """One weight as the graph sees it: float32 semantics, `shape`, and the rule that makes it from the checkpoint."""

    shape: tuple[int, ...]
    rule: WeightRule


@dataclass(frozen=True)
class KVLayer:
    """What one layer keeps: per token `kv_heads` keys of `key_dim` and values of `value_dim`, and per sequence
    `fixed_floats` float32 that do not grow (recurrent layers). latent: the values are the first `value_dim` numbers of
    the keys, and only the keys are kept. A layer that keeps no keys has zero heads.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    fixed_floats: int = 0


@dataclass(frozen=True)
class LayerSource:
    """A group of nodes that stands for layers of the model: `index` in this program, `stands_for` in the model."""

    index: int
    stands_for: tuple[int, ...]


@dataclass
class Program:
    """One step of a model, or a function.

    graph: flat FX graph; every node carries `meta["val"]` (fake tensor) and `meta["custom"]` = {"path", "layer"}.
    dims: of a step T (tokens) and S (rows whose logits are wanted), of a function what its inputs name.
    weights: by `get_attr` target. constants: float32 arrays made at compile time.
    kv: what each layer of this program keeps; `layers`: how groups of nodes repeat (see `frontend/stamp.py`).
    layers_path: module path of the repeated stack, e.g. "model.layers"; empty where nothing repeats. layers_named: what
    checkpoints call it besides.
    task: what the rows of a step are. notes: what its user has to know of how it was captured, a sentence each.
    outputs: names of a function's results, in order; a step has none. dim_symbols: of a function, the symbol in its
    shapes -> the dim it is.
    """

    name: str
    graph: fx.Graph
    dims: tuple[Dim, ...]
    weights: dict[str, Weight]
    constants: dict[str, np.ndarray]
    kv: tuple[KVLayer, ...]
    layers: tuple[LayerSource, ...] = ()
    layers_path: str = ""
    layers_named: tuple[str, ...] = ()
    task: Task = Task()
    notes: tuple[str, ...] = ()
    plans: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    dim_symbols: Mapping[str, str] = field(default_factory=dict)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Every name of the repeated stack, its module path first."""
        return (self.layers_path, *self.layers_named)

    @property
    def is_function(self) -> bool:
        return bool(self.outputs)

    def symbols(self) -> dict[str, str]:
        """The symbols that shapes of this program are written in, and the dim each is."""
        if self.is_function:
            return dict(self.dim_symbols)
        return {str(self.input(source).meta["val"].shape[0]): name for source, name in (("ids", "T"), ("last", "S"))}

    def inputs(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def calls(self) -> Iterator[fx.Node]:
        """The computing nodes in program order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def input(self, name: str) -> fx.Node:
        """The placeholder called `name` (ids, positions, slots, last, kv; fixed where a layer is recurrent)."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.target == name:
                return node
        raise KeyError(f"program {self.name} has no input {name!r}")

    def states(self) -> frozenset[fx.Node]:
        """The mutable inputs."""
        held = () if self.is_function else STATES
        return frozenset(node for node in self.inputs() if node.target in held)

    def output(self) -> fx.Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def copy(self) -> Program:
        """A program whose graph and tables can be changed without touching this one. Plans are not carried over."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, mapping)
        graph.output(result)
        new_output, old_output = next(iter(reversed(graph.nodes))), self.output()
        new_output.meta = dict(old_output.meta)
        for old, new in mapping.items():
            new.meta = {**old.meta, "custom": dict(old.meta.get("custom", {}))}
        return replace(self, graph=graph, weights=dict(self.weights), constants=dict(self.constants), plans={})


def state_shapes(program: Program, slots: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shape of each state input, as the dialect declares it: kv [layers, slots, tokens, width], fixed [layers, slots,
    floats], each as wide as the layer that needs most.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    width = max(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in program.kv)
    shapes["kv"] = (len(program.kv), slots, tokens, width)
    if floats := max(layer.fixed_floats for layer in program.kv):
        shapes["fixed"] = (len(program.kv), slots, floats)
    return shapes


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments of a call, for readers that know which operator they look at."""
    return node.args


def path_of(node: fx.Node) -> str:
    """Module path the node came from, e.g. "model.layers.0.self_attn.q_proj"; empty outside any module."""
    return node.meta.get("custom", {}).get("path", "")


def layer_of(node: fx.Node) -> int | None:
    """Index of the layer group (in this program) the node belongs to, or None for prologue and epilogue."""
    return node.meta.get("custom", {}).get("layer")
