"""How an ONNX graph becomes a program: values that are known now, and nodes for those that are not.

What ONNX computes of shapes is computed here, on symbols; what is left are calls of aten and xllm operators. Sizes that
a call needs are arithmetic on the sizes of inputs, made once and placed in front.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
import torch.fx as fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from xllm.frontend.onnx_file import OnnxCheckpoint, refuse
from xllm.ir.build import emit_weight, fake_value
from xllm.ir.program import Dim, Program, Weight
from xllm.ir.weight_rules import Constant, Source, WeightRule, widen

aten = torch.ops.aten
MAX_KNOWN = 1 << 14  # elements of a tensor that is computed with here
MAX_DIMS = 64


@dataclass(frozen=True)
class Value:
    """One ONNX value. `node` computes it; `known` is it (integers may be symbols, in an array of objects); `stored` is
    the initializer it is. At least one of the three is there; dtype as torch has it.
    """

    dtype: torch.dtype
    shape: tuple[Any, ...]
    node: fx.Node | None = None
    known: np.ndarray | None = None
    stored: str = ""


class Builder:
    """The program in the making."""

    def __init__(self, name: str, tensors: OnnxCheckpoint, limits: Mapping[str, int]) -> None:
        self.tensors, self._limits, self._plain = tensors, limits, frozenset[str]()
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=False)
        self.mode.cache_enabled = False  # making what it holds again costs more than working it out
        self.program = Program(name, fx.Graph(), (), {}, {}, ())
        self.symbols: dict[str, Any] = {}
        self._sizes: dict[str, fx.Node] = {}
        self._hints: set[int] = set()
        self._path = ""

    # --- inputs and sizes ---------------------------------------------------------------------------------------------

    def dims_are(self, names: Iterable[str]) -> None:
        """All that the inputs call their dims: a name may spell a sum of others."""
        self._plain = frozenset(name for name in names if re.fullmatch(r"[^\W\d]\w*", name))

    def dim(self, name: str) -> Any:
        """The size an input's dimension `name` has: a symbol, or a sum or product of those its name spells."""
        if name in self.symbols:
            return self.symbols[name]
        if not re.fullmatch(r"\w+", name):
            return self._spelled(name)
        if len(self.symbols) == MAX_DIMS:
            raise refuse(f"it has more than {MAX_DIMS} dims")
        limit = self._limits.get(name, 0)
        hint, source = self._hint(limit), ConstantSource(f"dim_{len(self.symbols)}")
        reach = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(2, max(limit, hint)))
        symbol = self.env.create_symbol(hint, source, DimDynamic.DYNAMIC, reach)
        self._hints.add(hint)
        size = self.env.create_symintnode(symbol, hint=hint, source=source)
        self.symbols[name] = size
        self.program.dim_symbols = {**self.program.dim_symbols, str(symbol): name}
        self.program.dims = (*self.program.dims, Dim(name, 0, limit))
        return size

    def _hint(self, limit: int) -> int:
        """A size to try out conditions with: prime, and no other dim's."""
        sizes = (
            size
            for size in range(min(limit, 4093), 2, -1)
            if all(size % factor for factor in range(2, 64) if factor < size)
        )
        return next((size for size in sizes if size not in self._hints), 4099 + len(self._hints))

    def _spelled(self, text: str) -> Any:
        """A name like "past + seq" is what it says where those are dims too; any other text is one of its own."""
        words = re.findall(r"\w+|[+*-]", text)
        if (
            len(text) > 200
            or "".join(words) != re.sub(r"\s+", "", text)
            or not re.fullmatch(r"\w+([+*-]\w+)*", "".join(words))
            or not self._plain.issuperset(re.findall(r"\b[^\W\d]\w*", text))
        ):
            return self.dim(re.sub(r"\W+", "_", text).strip("_") or "dim")
        total: Any = 0
        sign, term = 1, None
        for word in [*words, "+"]:
            if word in "+-":
                total, sign, term = total + sign * (0 if term is None else term), 1 if word == "+" else -1, None
            elif word != "*":
                size = int(word) if word.isdigit() else self.dim(word)
                term = size if term is None else term * size
        return total

    def input(self, name: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> Value:
        node = self.program.graph.create_node("placeholder", name, name=re.sub(r"\W+", "_", f"in_{name}"))
        with self.mode:
            node.meta = {"val": torch.empty(shape, dtype=dtype, device="meta"), "custom": {"path": "", "layer": None}}
        for axis, size in enumerate(shape):
            key = str(size)
            if not isinstance(size, int) and key in self.program.dim_symbols and key not in self._sizes:
                self._sizes[key] = self._call(aten.sym_size.int, (node, axis), size)
        return Value(dtype, shape, node)

    def size(self, size: Any) -> int | fx.Node:
        """A size as an argument: a number, or the node that computes it from sizes of inputs."""
        if isinstance(size, int):
            return size
        return self._expression(sympy.expand(size.node.expr))

    def _expression(self, expression: Any) -> int | fx.Node:
        if expression.is_Integer:
            return int(expression)
        key = str(expression)
        if key not in self._sizes:
            function = {sympy.Add: operator.add, sympy.Mul: operator.mul}.get(type(expression))
            if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 1:
                parts, function = [expression.base] * int(expression.exp), operator.mul
            elif function is None:
                raise refuse(f"the size {self.named(key)} is no polynomial of the model's dims", code="onnx-shape")
            else:
                parts = list(expression.args)
            made = self._expression(parts[0])
            for part in parts[1:]:
                other = self._expression(part)
                one, two = (arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in (made, other))
                made = self._call(function, (made, other), function(one, two))
            assert isinstance(made, fx.Node)
            self._sizes[key] = made
        return self._sizes[key]

    def _call(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self.program.graph.create_node("call_function", target, args, name="size")
        node.meta = {"val": value, "custom": {"path": "", "layer": None}}
        return node

    def at_one(self, size: Any) -> Any:
        """A size, or a truth about sizes, where every dim is 1: what torch takes for granted of dims is from 2 on."""
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))

    def named(self, text: str) -> str:
        return re.sub(r"\w+", lambda word: self.program.dim_symbols.get(word[0], word[0]), text)

    # --- values -----------------------------------------------------------------------------------------------------

    def at(self, path: str) -> None:
        """Where in the model the nodes made from now on belong."""
        self._path = path

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """A call; symbolic sizes among its arguments become nodes. Raises what the operator raises."""
        made = self.call(target, *args, **kwargs)
        value = made.meta["val"]
        shape = tuple(value.shape)
        if 0 in [size for size in shape if isinstance(size, int)] and all(isinstance(size, int) for size in shape):
            return Value(value.dtype, shape, known=np.zeros(shape, str(value.dtype).removeprefix("torch.")))
        return Value(value.dtype, shape, made)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """The node of a call, whatever it gives."""
        args, kwargs = self._argument(args), self._argument(kwargs)
        graph = self.program.graph
        stem = re.sub(r"\W+", "_", f"{self._path}_{getattr(target, '_opname', getattr(target, '__name__', 'call'))}")
        node = graph.create_node("call_function", target, tuple(args), kwargs, name=stem.strip("_"))
        node.meta["custom"] = {"path": self._path, "layer": None}
        try:
            node.meta["val"] = fake_value(node, self.mode)
        except Exception:
            graph.erase_node(node)
            raise
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Value):
            return self.node(value)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, dict):
            return {name: self._argument(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._argument(item) for item in value)
        return value

    def node(self, value: Value) -> fx.Node:
        """The node of a value: an initializer is read as a weight, what is known becomes a constant."""
        if value.node is not None:
            return value.node
        if 0 in value.shape:  # nothing to store
            return self.call(aten.full.default, list(value.shape), 0, dtype=value.dtype, device=torch.device("meta"))
        if value.stored and self.tensors.is_float(value.stored):
            return self.weight(value.stored, value.shape, Source((value.stored,)))
        assert value.known is not None
        if value.known.dtype == object and not all(isinstance(item, int) for item in value.known.flat):
            parts = [self.emit(aten.scalar_tensor.default, item, dtype=value.dtype, device=torch.device("meta"))
                     for item in value.known.flat]  # fmt: skip
            return self.node(self.reshape(self.emit(aten.stack.default, parts), value.shape))
        array = value.known.astype(np.float32)
        exact = value.known.dtype.kind not in "iO" or _same(array, value.known.astype(np.int64))
        if value.dtype == torch.float32 or (value.shape and exact):
            made = self.constant(array)
            return made if value.dtype == torch.float32 else self.call(aten.to.dtype, made, value.dtype)
        item = value.known.flat[0]
        if not (value.known == item).all():
            raise refuse(f"the constants {item}, … of {value.dtype} are not exact in float32")
        item = item if isinstance(item, int) else item.item()
        return self.call(aten.full.default, list(value.shape), item, dtype=value.dtype, device=torch.device("meta"))

    def constant(self, array: np.ndarray) -> fx.Node:
        name = next((held for held, other in self.program.constants.items()
                     if other.shape == array.shape and other.tobytes() == array.tobytes()), "")  # fmt: skip
        if not name:
            name = f"constant.{len(self.program.constants)}"
            self.program.constants[name] = np.ascontiguousarray(array)
        return self.weight(name, array.shape, Constant(name))

    def weight(self, name: str, shape: Sequence[int], rule: WeightRule) -> fx.Node:
        return emit_weight(self.program, name, Weight(tuple(shape), rule), self.mode)

    def known(self, value: Value) -> np.ndarray | None:
        """The value as an array, if it can be had now."""
        if value.known is None and value.stored and int(np.prod(value.shape)) <= MAX_KNOWN:
            return widen(self.tensors[value.stored])
        return value.known

    def fact(self, array: Any, dtype: torch.dtype = torch.int64) -> Value:
        """A value that is known."""
        held = array if isinstance(array, np.ndarray) else np.array(array, dtype=object)
        return Value(dtype, held.shape, known=held)

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """A view of the same numbers in order."""
        if list(map(str, shape)) == list(map(str, value.shape)):
            return value
        return self.emit(aten.reshape.default, value, list(shape))


def _same(floats: np.ndarray, integers: np.ndarray) -> bool:
    return bool((np.abs(floats) < 1 << 62).all() and (floats.astype(np.int64) == integers).all())
