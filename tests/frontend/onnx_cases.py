"""ONNX models of one operator: those the standard tests itself with, and random ones."""

from __future__ import annotations

import importlib
import pkgutil
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from xllm.frontend.onnx import OPERATORS, import_onnx
from xllm.ir.interpret import bind, run_function
from xllm.ir.verify import verify

TYPES = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "j": TensorProto.INT32, "b": TensorProto.BOOL}
LIMITS = {"n": 6, "m": 5}
Feeds = dict[str, np.ndarray]


def model(nodes: list[Any], inputs: Mapping[str, tuple[str, list[Any]]], outputs: Mapping[str, str],
          known: Mapping[str, np.ndarray], opset: int = 18) -> onnx.ModelProto:  # fmt: skip
    """A model of `nodes`; inputs by name as (type, sizes), results by name as types, initializers."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in outputs.items()],
        initializer=[numpy_helper.from_array(array, name) for name, array in known.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def interpreted(made: onnx.ModelProto, dims: Mapping[str, int], several: list[Feeds], folder: Path) -> list[Feeds]:
    """Results of the imported program in torch, for each set of inputs. Raises CompileError."""
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    program, tensors = import_onnx(folder / "m.onnx", dims)
    verify(program)
    weights = bind(program, tensors)
    given = ({key: torch.from_numpy(np.array(value)) for key, value in feeds.items()} for feeds in several)
    return [{key: value.numpy() for key, value in run_function(program, feeds, weights).items()} for feeds in given]


def agrees(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> bool:
    return set(got) == set(want) and all(
        got[key].dtype == value.dtype and got[key].shape == value.shape
        and np.allclose(got[key], value, 1e-4, 1e-5, equal_nan=True) for key, value in want.items()
    )  # fmt: skip


# --- those of the standard ------------------------------------------------------------------------------------------


def official() -> Iterator[tuple[str, onnx.ModelProto, Feeds, Feeds]]:
    """Name, model, inputs and results of every case whose operator we take, as one opset from 18 to 23 has it.

    Integer vectors, which mostly say shapes and axes, are initializers in all but every fourth.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        node = importlib.import_module("onnx.backend.test.case.node")
        taken = {name.lower() for name in OPERATORS} | {"rangeop"}
        for module in pkgutil.iter_modules(node.__path__):
            if module.name.replace("_", "") in taken:
                importlib.import_module(f"{node.__name__}.{module.name}")
    for place, case in enumerate(sorted(node._NodeTestCases, key=lambda case: case.name)):
        kinds = {held.op_type for held in case.model.graph.node}
        opsets = [opset for opset in range(18, 24) if all(_since(kind, opset) == _since(
            kind, case.model.opset_import[0].version) for kind in kinds)]  # fmt: skip
        inputs, results = case.data_sets[0]
        if "expanded" in case.name or not opsets or not kinds <= set(OPERATORS):
            continue
        if not all(isinstance(array, np.ndarray) for array in (*inputs, *results)):
            continue
        made, feeds = onnx.ModelProto.FromString(case.model.SerializeToString()), {}
        made.opset_import[0].version = opsets[place % len(opsets)]
        told = list(made.graph.input)
        del made.graph.input[:]
        for info, array in zip(told, inputs, strict=True):
            if array.dtype == np.int64 and array.ndim <= 1 and place % 4:
                made.graph.initializer.append(numpy_helper.from_array(array, info.name))
            else:
                made.graph.input.append(info)
                feeds[info.name] = array
        yield case.name, made, feeds, dict(zip([info.name for info in made.graph.output], results, strict=True))


def _since(kind: str, opset: int) -> int:
    try:
        return onnx.defs.get_schema(kind, opset, "").since_version
    except onnx.defs.SchemaError:
        return 0


# --- random ones ----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model of one operator in the making: what was drawn, and how inputs of given sizes are made."""

    random: random.Random
    opset: int = 18
    attributes: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[str, list[Any]]] = field(default_factory=dict)
    known: dict[str, np.ndarray] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=lambda: {"y": "f"})
    makers: dict[str, Callable[[list[int]], np.ndarray]] = field(default_factory=dict)

    def shape(self, low: int = 0, high: int = 4) -> list[Any]:
        return [self.random.choice(["n", "m", 1, 1, 2, 3, 4]) for _ in range(self.random.randint(low, high))]

    def below(self, shape: list[Any]) -> list[Any]:
        """A shape that broadcasts to `shape`."""
        return [1 if self.random.random() < 0.3 else size for size in shape[self.random.randint(0, len(shape)) :]]

    def read(self, kind: str, shape: list[Any], low: float = -5, high: float = 6) -> None:
        """One more operand of numbers in [low, high): an input, or where sizes are numbers perhaps an initializer."""
        rng, dtype = np.random.default_rng(self.random.randrange(1 << 30)), helper.tensor_dtype_to_np_dtype(TYPES[kind])
        name = f"x{len(self.reads)}"

        def make(sizes: list[int]) -> np.ndarray:
            drawn = rng.uniform(low, high, sizes) if kind == "f" else rng.integers(int(low), int(high), sizes)
            return np.asarray(drawn > 0 if kind == "b" else drawn, dtype)

        if all(isinstance(size, int) for size in shape) and self.random.random() < 0.4:
            self.known[name] = make(shape)
        else:
            self.inputs[name], self.makers[name] = (kind, shape), make
        self.reads.append(name)

    def say(self, values: Any) -> None:
        """One more operand that is known: axes, a shape."""
        name = f"x{len(self.reads)}"
        self.known[name] = np.array(values, np.int64)
        self.reads.append(name)

    def axis(self, rank: int, end: int = 0) -> int:
        at = self.random.randint(0, rank - 1 + end)
        return at - rank if self.random.random() < 0.5 and at < rank else at

    def feeds(self, sizes: Mapping[str, int]) -> Feeds:
        return {name: self.makers[name]([sizes.get(size, size) for size in shape])
                for name, (_, shape) in self.inputs.items()}  # fmt: skip


def _binary(c: Case, kind: str) -> None:
    t = "b" if kind in ("And", "Or", "Xor") else c.random.choice("ffij")
    first = c.shape()
    second = c.below(first)
    if c.random.random() < 0.5:
        first, second = second, first
    if kind == "Mod":
        c.attributes["fmod"] = 1 if t == "f" else c.random.randint(0, 1)
    low = 1 if kind == "Pow" else -5
    c.read(t, first, low)
    power = c.random.choice("fij") if kind == "Pow" else t
    c.read(power, second, 1 if kind in ("Pow", "Div", "Mod") else -5, 3 if kind == "Pow" else 6)
    logic = kind in ("And", "Or", "Xor", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    c.outputs = {"y": "b" if logic else t}


def _where(c: Case, kind: str) -> None:
    t, shape = c.random.choice("fi"), c.shape()
    for each in ("b", t, t):
        c.read(each, c.below(shape))
    c.outputs = {"y": t}


def _unary(c: Case, kind: str) -> None:
    t = {"Not": "b", "Identity": "i"}.get(kind) or (c.random.choice("fij") if kind in ("Abs", "Neg", "Sign") else "f")
    c.read(t, c.shape())
    c.outputs = {"y": "b" if kind in ("Not", "IsNaN") else t}


def _reduce(c: Case, kind: str) -> None:
    t, shape = "f" if kind == "ReduceMean" else c.random.choice("ffij"), c.shape()
    c.read(t, shape)
    c.attributes |= {"keepdims": c.random.randint(0, 1), "noop_with_empty_axes": c.random.randint(0, 1)}
    axes = c.random.sample(range(len(shape)), c.random.randint(0, len(shape)))
    if c.random.random() < 0.8:
        c.say([axis - c.random.choice([0, len(shape)]) for axis in axes])
    elif c.random.random() < 0.5:
        c.reads.append("")
    c.outputs = {"y": t}


def _move(c: Case, kind: str) -> None:
    t, shape = c.random.choice("fij"), c.shape(1)
    rank, c.outputs = len(shape), {"y": t}
    c.read(t, shape)
    if kind == "Flatten":
        c.attributes["axis"] = c.axis(rank, 1)
    elif kind == "Transpose":
        c.attributes["perm"] = c.random.sample(range(rank), rank)
    elif kind == "Unsqueeze":
        c.say([axis - (rank + 2) * c.random.randint(0, 1) for axis in c.random.sample(range(rank + 2), 2)])
    elif kind == "Squeeze":
        c.say([axis - rank * c.random.randint(0, 1) for axis in range(rank) if shape[axis] == 1])
    elif kind == "Reshape":
        c.say(c.random.choice([[-1], [0] * rank, [0] * (rank - 1) + [-1], [-1, 1], [1, -1, 1]]))
    elif kind == "Expand":
        c.say([2, *(1 if isinstance(size, str) or c.random.random() < 0.5 or size > 1 else 3 for size in shape)])
    elif kind == "Tile":
        c.say([c.random.choice([1, 1, 2, 3]) for _ in shape])
    elif kind == "Slice":
        far = (1 << 63) - 1
        c.say([c.random.choice([0, 1, -1, 2, -9, 9, -far])])
        c.say([c.random.choice([1, -1, 3, 9, far])])
        c.say([c.axis(rank)])
        c.say([c.random.choice([1, 1, 2, 3])])
    elif kind == "Trilu":
        c.attributes["upper"] = c.random.randint(0, 1)
        c.say(c.random.randint(-3, 3))
        c.outputs = c.outputs if rank > 1 else {}
    elif kind == "Cast":
        c.outputs = {"y": c.random.choice("fijb")}
        c.attributes["to"] = TYPES[c.outputs["y"]]


def _join(c: Case, kind: str) -> None:
    t, shape = c.random.choice("fij"), c.shape(1, 3)
    axis = c.attributes["axis"] = c.axis(len(shape))
    c.outputs = {"y": t}
    if kind == "Concat":
        for _ in range(c.random.randint(1, 3)):
            c.read(t, [*shape])
            shape[axis] = c.random.choice(["n", "m", 1, 2])
        return
    if kind == "Split":
        parts = [c.random.randint(1, 3) for _ in range(c.random.randint(1, 3))]
        shape[axis], c.outputs = sum(parts), {f"y{place}": t for place in range(len(parts))}
        c.read(t, shape)
        if c.random.random() < 0.5:
            c.say(parts)
        else:
            c.attributes["num_outputs"] = len(parts)
        return
    c.read(t, shape)
    size = shape[axis] if isinstance(shape[axis], int) else 1
    where = [*shape[:axis], 2, *shape[axis % len(shape) + 1 :]] if kind == "GatherElements" else c.shape(0, 2)
    table = kind == "Gather" and t == "f" and "x0" in c.known and len(shape) == 2  # reads rows from the front alone
    c.read(c.random.choice("ij"), where, 0 if table else -size, size)


def _product(c: Case, kind: str) -> None:
    inner, outer = c.random.choice([1, 3]), c.random.choice([1, 4])
    if kind == "MatMul":
        c.read("f", [*c.random.choice([[], ["n"], [2, "n"]]), inner])
        c.read("f", c.random.choice([[inner], [inner, outer], [2, inner, outer]]))
        return
    c.attributes = {"transA": c.random.randint(0, 1), "transB": c.random.randint(0, 1),
                    "alpha": c.random.choice([0.5, 1.0]), "beta": c.random.choice([0.0, 0.5, 1.0])}  # fmt: skip
    c.read("f", [inner, "n"] if c.attributes["transA"] else ["n", inner])
    c.read("f", [outer, inner] if c.attributes["transB"] else [inner, outer])
    if c.random.random() < 0.8:
        c.read("f", c.random.choice([[], [1], [outer], [1, outer], ["n", 1], ["n", outer]]))


def _norm(c: Case, kind: str) -> None:
    shape = c.shape(1)
    if kind in ("Softmax", "LogSoftmax"):
        c.attributes["axis"] = c.axis(len(shape))
        return c.read("f", shape)
    axis = c.attributes["axis"] = c.axis(len(shape))
    c.attributes["epsilon"] = c.random.choice([1e-5, 1e-2])
    for held in (shape, shape[axis:], shape[axis:])[: 2 if kind == "RMSNormalization" else c.random.randint(2, 3)]:
        c.read("f", held)
    if kind == "RMSNormalization":
        c.opset = 23
    elif c.random.random() < 0.3:
        c.outputs = {"y": "f", "mean": "f", "spread": "f"}


def _conv(c: Case, kind: str) -> None:
    rank, groups = c.random.randint(1, 3), c.random.randint(1, 2)
    kernel, pads = ([c.random.randint(low, low + 2) for _ in range(rank)] for low in (1, 0))
    c.read("f", ["n", 2 * groups, *(c.random.randint(5, 7) for _ in kernel)])
    c.read("f", [3 * groups, 2, *kernel])
    if c.random.random() < 0.5:
        c.read("f", [3 * groups])
    strides = kernel if c.random.random() < 0.5 else [c.random.randint(1, 2) for _ in kernel]
    c.attributes = {"group": groups, "strides": strides, "kernel_shape": kernel}
    c.attributes["pads"] = [0] * 2 * rank if c.random.random() < 0.5 else pads + pads


def _attention(c: Case, kind: str) -> None:
    c.opset, flat, past = 23, c.random.random() < 0.4, c.random.choice([0, 0, 2])
    heads, groups, batch = c.random.randint(1, 2), c.random.randint(1, 2), c.random.choice([1, "n"])
    length = c.random.choice([1, 3, "m"])
    keys = c.random.choice([length, length, 2, 4])
    for count, tokens, width in ((heads * groups, length, 4), (heads, keys, 4), (heads, keys, 6)):
        c.read("f", [batch, tokens, count * width] if flat else [batch, count, tokens, width], -1, 1)
    if flat:
        c.attributes |= {"q_num_heads": heads * groups, "kv_num_heads": heads}
    if isinstance(keys, int) and c.random.random() < 0.6:
        total = keys + past
        held = c.random.choice([[length, total], [1, 1, length, total], [batch, heads * groups, length, total]])
        c.read(c.random.choice("fb"), held, -4, 9)
    elif past:
        c.reads.append("")
    if past:
        for width in (4, 6):
            c.read("f", [batch, heads, past, width], -1, 1)
        c.outputs = {"y": "f", "keys": "f", "values": "f"}
    for name, value in (("is_causal", 1), ("softcap", 1.5), ("scale", 0.3)):
        if c.random.random() < 0.4:
            c.attributes[name] = value


def _rotary(c: Case, kind: str) -> None:
    c.opset, flat, length = 23, c.random.random() < 0.5, c.random.choice([1, 3, "m"])
    turned = c.random.choice([0, 4, 8])
    c.attributes = {"interleaved": c.random.randint(0, 1), "num_heads": 2, "rotary_embedding_dim": turned}
    c.read("f", ["n", length, 16] if flat else ["n", 2, length, 8])
    positions = c.random.random() < 0.5
    for _ in range(2):
        c.read("f", [9, (turned or 8) // 2] if positions else ["n", length, (turned or 8) // 2])
    if positions:
        c.read("i", ["n", length], 0, 9)


_DRAWS: Mapping[Callable[[Case, str], None], str] = {
    _binary: "Add Sub Mul Div Pow Mod Max Min Equal Less Greater LessOrEqual And Or Xor", _where: "Where",
    _unary: "Abs Neg Sign Relu Floor Ceil Round Sigmoid Tanh Erf Softplus Exp Not IsNaN Identity",
    _reduce: "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd", _join: "Concat Split Gather GatherElements",
    _move: "Flatten Transpose Unsqueeze Squeeze Reshape Expand Tile Slice Trilu Cast", _product: "MatMul Gemm",
    _norm: "Softmax LogSoftmax LayerNormalization RMSNormalization", _conv: "Conv", _attention: "Attention",
    _rotary: "RotaryEmbedding",
}  # fmt: skip
RANDOM = {kind: draw for draw, kinds in _DRAWS.items() for kind in kinds.split()}


def drawn(kind: str, source: random.Random) -> tuple[onnx.ModelProto, dict[str, int], list[Feeds]]:
    """A model of one `kind` with what may be said of it said at random, the limits of its dims, and two inputs."""
    case = Case(source, opset=source.randint(20, 23))
    RANDOM[kind](case, kind)
    if not case.inputs or not case.outputs:
        return drawn(kind, source)
    node = helper.make_node(kind, case.reads, list(case.outputs), **case.attributes)
    used = {size for _, shape in case.inputs.values() for size in shape}
    sizes = [{"n": source.choice([1, 2, 5]), "m": source.choice([1, 3, 4])} for _ in range(2)]
    made = model([node], case.inputs, case.outputs, case.known, case.opset)
    return made, {dim: size for dim, size in LIMITS.items() if dim in used}, [case.feeds(each) for each in sizes]
