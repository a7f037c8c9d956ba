"""What a program is: one FX graph, the weights it reads, the state it mutates, and how its layers repeat.

A step computes `(ids[T], positions[T], slots[T], last[S], kv) -> rows[S, N]` over the flattened tokens of all
sequences: logits, embeddings or label scores (`Task`). State is its only mutable input: the KV cache, and behind it
`fixed` where layers keep what does not grow. A function computes named outputs from named inputs and keeps nothing.
Weights are `get_attr` nodes; plans are side tables keyed by node name and never live in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch.fx as fx

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
    have length 1. segments: kinds of segment the model tells apart; a step's tokens are all of the first.
    """

    kind: Literal["generate", "embed", "classify"] = "generate"
    pooling: Literal["last", "cls", "mean"] = "last"
    normalize: bool = False
    labels: tuple[str, ...] = ()
    segments: int = 1


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint; `names` are its keys in order of preference (tied weights have several)."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor computed at compile time, found in `Program.constants`."""

    name: str


@dataclass(frozen=True)
class Concat:
    """Parts joined along one axis."""

    parts: tuple[WeightRule, ...]
    axis: int = 0


@dataclass(frozen=True)
class Shift:
    """`of + by`, elementwise: norms that scale by `1 + weight`."""

    of: WeightRule
    by: float


@dataclass(frozen=True)
class Sum:
    """Parts added, broadcast against each other: a table of positions and the row that every token gets beside it."""

    parts: tuple[WeightRule, ...]


@dataclass(frozen=True)
class Stack:
    """Parts of one shape, side by side along a new first axis: the experts of a layer."""

    parts: tuple[WeightRule, ...]


@dataclass(frozen=True)
class Slice:
    """Indices start, start + step, … below stop of one axis."""

    of: WeightRule
    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Reshape:
    """The same numbers in row-major order under another shape."""

    of: WeightRule
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """Axis i of the result is axis `axes[i]` of `of`."""

    of: WeightRule
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Either:
    """The first of several spellings of one weight whose tensors the checkpoint has, all of them: experts are kept
    stacked or one by one.
    """

    options: tuple[WeightRule, ...]


WeightRule = Source | Constant | Concat | Stack | Sum | Shift | Slice | Reshape | Permute | Either


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
    layers_path: module path of the repeated stack, e.g. "model.layers"; empty where nothing repeats.
    task: what the rows of a step are.
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
    task: Task = Task()
    plans: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    dim_symbols: Mapping[str, str] = field(default_factory=dict)

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
        weights, constants = dict(self.weights), dict(self.constants)
        kept = (self.kv, self.layers, self.layers_path, self.task)
        made = Program(self.name, graph, self.dims, weights, constants, *kept)
        return replace(made, outputs=self.outputs, dim_symbols=self.dim_symbols)


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


def move_layer(rule: WeightRule, layers_path: str, to: int) -> WeightRule:
    """The same rule, reading layer `to` of the stack at `layers_path` instead of the layer it was captured from."""
    pattern = re.compile(rf"(^|\.){re.escape(layers_path)}\.\d+\.")

    def moved(name: str) -> str:
        return pattern.sub(lambda m: f"{m.group(1)}{layers_path}.{to}.", name, count=1)

    return renamed(rule, lambda names: tuple(map(moved, names)))


def renamed(rule: WeightRule, names_of: Callable[[tuple[str, ...]], tuple[str, ...]]) -> WeightRule:
    """The same rule over other tensors: the names of every source go through `names_of`."""
    match rule:
        case Source(names):
            return Source(names_of(names))
        case Concat(parts) | Stack(parts) | Sum(parts):
            return replace(rule, parts=tuple(renamed(part, names_of) for part in parts))
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            return replace(rule, of=renamed(of, names_of))
        case Either(options):
            return Either(tuple(renamed(option, names_of) for option in options))
    return rule


def rule_sources(rule: WeightRule) -> Iterator[Source]:
    """Every checkpoint tensor a rule reads, in order."""
    match rule:
        case Source():
            yield rule
        case Concat(parts) | Stack(parts) | Sum(parts) | Either(parts):
            for part in parts:
                yield from rule_sources(part)
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            yield from rule_sources(of)


def resolve(rule: WeightRule, names: Container[str]) -> WeightRule:
    """The rule without `Either`, for a checkpoint that has these names; where no option is whole, the last."""
    match rule:
        case Either(options):
            chosen = [resolve(option, names) for option in options]
            return next((option for option in chosen if not missing(option, names)), chosen[-1])
        case Concat(parts) | Stack(parts) | Sum(parts):
            return replace(rule, parts=tuple(resolve(part, names) for part in parts))
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            return replace(rule, of=resolve(of, names))
    return rule


def missing(rule: WeightRule, names: Container[str]) -> list[str]:
    """The tensors a resolved rule reads and `names` lacks, by their preferred name."""
    return [source.names[0] for source in rule_sources(rule) if not any(name in names for name in source.names)]


def rule_text(rule: WeightRule) -> str:
    """The rule on one line, as `xllm show` prints it and digests cover it."""
    match rule:
        case Source(names):
            return names[0]
        case Constant(name):
            return f"constant {name}"
        case Concat(parts, axis):
            along = f", axis {axis}" if axis else ""
            return "concat(" + ", ".join(rule_text(part) for part in parts) + along + ")"
        case Stack(parts):
            return f"stack({_numbered([rule_text(part) for part in parts])})"
        case Sum(parts):
            return "sum(" + ", ".join(rule_text(part) for part in parts) + ")"
        case Either(options):
            return " or ".join(rule_text(option) for option in options)
        case Shift(of, by):
            return f"{rule_text(of)} + {by!r}"
        case Slice(of, axis, start, stop, step):
            every = f":{step}" if step != 1 else ""
            return f"{rule_text(of)}[{':, ' * axis}{start}:{stop}{every}]"
        case Reshape(of, shape):
            return f"reshape({rule_text(of)}, {'x'.join(map(str, shape))})"
        case Permute(of, axes):
            return f"permute({rule_text(of)}, {' '.join(map(str, axes))})"


def _numbered(texts: Sequence[str]) -> str:
    """Texts that differ in one number, which counts from 0, as one: a.{0..127}.b."""
    for match in re.finditer(r"(?<![\w])0(?![\w])", texts[0]):
        head, tail = texts[0][: match.start()], texts[0][match.end() :]
        if len(texts) > 1 and list(texts) == [f"{head}{i}{tail}" for i in range(len(texts))]:
            return f"{head}{{0..{len(texts) - 1}}}{tail}"
    return ", ".join(texts)


def evaluate(rule: WeightRule, read: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weight as one array: float32, float16, or bfloat16 as uint16, whatever its sources are.

    `read` maps checkpoint names to arrays of these types. Raises KeyError naming a tensor that is missing.
    """
    match rule:
        case Source(names):
            for name in names:
                if name in read:
                    return read[name]
            raise KeyError(f"the checkpoint has no tensor named {' or '.join(names)}")
        case Constant(name):
            return constants[name]
        case Concat(parts) | Stack(parts):
            arrays = [evaluate(part, read, constants) for part in parts]
            if len({array.dtype for array in arrays}) > 1:
                arrays = [widen(array) for array in arrays]
            return np.concatenate(arrays, axis=rule.axis) if isinstance(rule, Concat) else np.stack(arrays)
        case Sum(parts):
            first, *others = (widen(evaluate(part, read, constants)) for part in parts)
            return sum(others, first)
        case Either():
            return evaluate(resolve(rule, read), read, constants)
        case Shift(of, by):
            return widen(evaluate(of, read, constants)) + np.float32(by)
        case Slice(of, axis, start, stop, step):
            return evaluate(of, read, constants)[(slice(None),) * axis + (slice(start, stop, step),)]
        case Reshape(of, shape):
            return evaluate(of, read, constants).reshape(shape)
        case Permute(of, axes):
            return evaluate(of, read, constants).transpose(axes)


def evaluate_item(
    rule: WeightRule, index: int, read: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]
) -> np.ndarray:
    """`evaluate(rule, …)[index]`, without the other items of a stack in memory. The rule is resolved."""
    match rule:
        case Stack(parts):
            return evaluate(parts[index], read, constants)
        case Slice(of, axis) if axis > 0:
            item = evaluate_item(of, index, read, constants)
            return item[(slice(None),) * (axis - 1) + (slice(rule.start, rule.stop, rule.step),)]
        case Concat(parts, axis) if axis > 0:
            items = [evaluate_item(part, index, read, constants) for part in parts]
            return np.concatenate(items, axis=axis - 1)
        case Permute(of, axes) if axes[0] == 0:
            return evaluate_item(of, index, read, constants).transpose([axis - 1 for axis in axes[1:]])
    return evaluate(rule, read, constants)[index]


def widen(array: np.ndarray) -> np.ndarray:
    """float32 of a float32, float16 or bfloat16 (held as uint16) array; exact in every case."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
