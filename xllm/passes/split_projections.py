"""A product whose columns are read out of order becomes one product for each part that is read.

before:  %p = xllm.linear(%x, @qkv [H 3 D, K], None)     after:  %p = xllm.linear(%x, @qkv_0 [H D, K], None)
         %h = aten.reshape(%p, [-1, H, 3 D])                     %q = aten.reshape(%p, [-1, H, D])
         %q = aten.slice(%h, -1, 0, D)                           %k, %v likewise, from @qkv_1 and @qkv_2
         %k, %v = the rest of %h

Heads that hold their query beside its gate, or key and value, or pairs to turn: cuts, views, transposes and joins of
the columns move into the weight's rule, and no column is copied when the program runs. Does not fire when every part is
one range of columns (a cut is as good then), when parts overlap or all columns are read too, or when the weight is
computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.fx as fx

from xllm.ir import Concat, Constant, Permute, Program, Reshape, Slice, Weight, WeightRule
from xllm.ir.program import arguments
from xllm.ir.weight_rules import evaluate
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, is_weight, sizes, undo_transposes

aten = torch.ops.aten
xllm = torch.ops.xllm
Arrange = Callable[[WeightRule, tuple[int, ...]], WeightRule]  # the rows of a weight as columns are; rest of its shape


@dataclass(frozen=True)
class _Columns:
    """A value that holds columns of a product: their shape, the axis of tokens, how they come from the product's."""

    product: fx.Node
    shape: tuple[int, ...]
    tokens: int = 0
    arrange: Arrange = lambda rule, rest: rule
    joined: bool = False

    def numbers(self) -> np.ndarray:
        """The column of the product that each number is."""
        every = np.arange(sizes(self.product)[1])
        return evaluate(self.arrange(Constant("columns"), ()), {}, {"columns": every}).reshape(-1)


@dataclass(frozen=True)
class SplitProjections(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        found: dict[fx.Node, _Columns] = {}
        for node in program.calls():
            if (columns := _columns(node, found)) is not None:
                found[node] = columns
        read: dict[fx.Node, list[fx.Node]] = {}
        for node, columns in found.items():
            if any(user not in found for user in node.users):
                read.setdefault(columns.product, []).append(node)
        for product, parts in read.items():
            self._split(editor, product, parts, found)
        editor.finish()
        for node in list(program.calls()):
            undo_transposes(node)
            while is_call(node, aten.reshape.default) and is_call(node.args[0], aten.reshape.default):
                node.replace_input_with(node.args[0], arguments(node.args[0])[0])
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _split(self, editor: Editor, product: fx.Node, parts: list[fx.Node], found: dict[fx.Node, _Columns]) -> None:
        numbers = [found[part].numbers() for part in parts]
        ranges = [np.array_equal(held, held[0] + np.arange(len(held))) for held in numbers]
        if all(ranges) and not any(found[part].joined for part in parts):
            return
        x, *tensors = arguments(product)
        if not all(is_weight(tensor) for tensor in tensors if tensor is not None):
            return editor.miss(product, "its weight is computed")
        if len(np.unique(np.concatenate(numbers))) < sum(map(len, numbers)):
            return editor.miss(product, "parts that are read of it overlap")
        for index, part in enumerate(parts):
            columns = found[part]
            weight, bias = (_part(editor, tensor, columns, index) for tensor in tensors)
            with editor.before(product):
                made = editor.emit(xllm.linear.default, x, weight, bias, like=product)
            with editor.before(part):
                wanted = [-1, *columns.shape]
                value = editor.emit(aten.reshape.default, made, wanted, like=part) if len(wanted) > 2 else made
                for axis in range(columns.tokens):
                    value = editor.emit(aten.transpose.int, value, axis, axis + 1, like=part)
            part.replace_all_uses_with(value)
        editor.hit(product)


def _columns(node: fx.Node, found: dict[fx.Node, _Columns]) -> _Columns | None:
    """What `node` holds, from what its inputs hold; nothing where it computes."""
    if is_call(node, xllm.linear.default) and len(sizes(node)) == 2:
        return _Columns(node, (sizes(node)[1],))
    sources = [found[part] for part in node.all_input_nodes if part in found]
    if not sources or len(sources) != len(node.all_input_nodes) or node.kwargs:
        return None
    held, args = sources[0], arguments(node)[1:]
    if is_call(node, aten.reshape.default):
        return _reshaped(held, node)
    if is_call(node, aten.transpose.int):
        return _transposed(held, *(axis % len(sizes(node)) for axis in args))
    if is_call(node, aten.slice.Tensor) and len(args) in (3, 4) and all(isinstance(number, int) for number in args):
        return _cut(held, node)
    if is_call(node, aten.cat.default) and all(part in found for part in arguments(node)[0]):
        return _joined([found[part] for part in arguments(node)[0]], node)
    return None


def _reshaped(held: _Columns, node: fx.Node) -> _Columns | None:
    shape = sizes(node)
    tokens = str(sizes(held.product)[0])
    places = [axis for axis, size in enumerate(shape) if str(size) == tokens]
    # Tokens must stay what they are: only axes of one may stand before them, here and there.
    if len(places) != 1 or math.prod(shape[: places[0]]) != 1 or math.prod(held.shape[: held.tokens]) != 1:
        return None
    columns = (*shape[: places[0]], *shape[places[0] + 1 :])
    if not all(isinstance(size, int) for size in columns):
        return None

    def arrange(rule: WeightRule, rest: tuple[int, ...]) -> WeightRule:
        return Reshape(held.arrange(rule, rest), (*columns, *rest))

    return _Columns(held.product, columns, places[0], arrange, held.joined)


def _transposed(held: _Columns, one: int, other: int) -> _Columns:
    axes: list[int | None] = [*range(len(held.shape))]
    axes.insert(held.tokens, None)
    axes[one], axes[other] = axes[other], axes[one]
    order = [axis for axis in axes if axis is not None]
    shape = tuple(held.shape[axis] for axis in order)
    if order == sorted(order):
        return _Columns(held.product, shape, axes.index(None), held.arrange, held.joined)

    def arrange(rule: WeightRule, rest: tuple[int, ...]) -> WeightRule:
        kept = range(len(order), len(order) + len(rest))
        return Permute(held.arrange(rule, rest), (*order, *kept))

    return _Columns(held.product, shape, axes.index(None), arrange, held.joined)


def _cut(held: _Columns, node: fx.Node) -> _Columns | None:
    _, dim, start, stop, *step = arguments(node)
    dim %= len(sizes(node))
    if dim == held.tokens:
        return None
    axis = dim - (dim > held.tokens)
    bounds = range(*slice(start, stop, *step).indices(held.shape[axis]))

    def arrange(rule: WeightRule, rest: tuple[int, ...]) -> WeightRule:
        return Slice(held.arrange(rule, rest), axis, bounds.start, bounds.stop, bounds.step)

    shape = (*held.shape[:axis], len(bounds), *held.shape[axis + 1 :])
    return _Columns(held.product, shape, held.tokens, arrange, held.joined)


def _joined(parts: list[_Columns], node: fx.Node) -> _Columns | None:
    dim = (arguments(node)[1:] or (0,))[0] % len(sizes(node))
    if dim == parts[0].tokens or len({(part.product, part.tokens) for part in parts}) > 1:
        return None
    axis = dim - (dim > parts[0].tokens)

    def arrange(rule: WeightRule, rest: tuple[int, ...]) -> WeightRule:
        return Concat(tuple(part.arrange(rule, rest) for part in parts), axis)

    shape = tuple(size for at, size in enumerate(sizes(node)) if at != parts[0].tokens)
    return _Columns(parts[0].product, shape, parts[0].tokens, arrange, joined=True)


def _part(editor: Editor, tensor: Any, columns: _Columns, index: int) -> fx.Node | None:
    """The rows of a weight or bias that make `columns`, under a name of their own."""
    if tensor is None:
        return None
    held = editor.program.weights[str(tensor.target)]
    rest = held.shape[1:]
    shape = (math.prod(columns.shape), *rest)
    owner, _, kind = str(tensor.target).rpartition(".")
    return editor.weight(f"{owner}_{index}.{kind}", Weight(shape, Reshape(columns.arrange(held.rule, rest), shape)))
