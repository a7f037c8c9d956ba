"""What depends on nothing but a token's position is computed once for every position, when compiling.

before:  %c = aten.reshape(xllm.rows(@cos, %positions), [1, -1, 8])       after:  %t = xllm.rows(@tables.0, %positions)
         %h = aten.slice(%c, -1, 0, 4)                                            %r = aten.reshape(%t, [1, -1, 8])
         %r = aten.repeat_interleave(%h, 2, 2)

Rotary tables in another order, scales that grow with the position, sinusoids: the value of position p is row p of a
table. Tables of equal content are one. Does not fire when the value reads a tensor of the checkpoint, when an operator
on the way may mix tokens, when tokens are not the first dimension behind ones, or when a token's value, computed
alone, is another than in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.fx as fx

from xllm.ir import Constant, Program, Weight
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm

# Each treats every token alone, as long as no axis it names is that of the tokens.
_PER_TOKEN = frozenset((
    xllm.rows.default, aten.reshape.default, aten.unsqueeze.default, aten.repeat_interleave.self_int, aten.slice.Tensor,
    aten.cat.default, aten.stack.default, aten.select.int, aten.neg.default, aten.cos.default, aten.sin.default,
    aten.exp.default, aten.log.default, aten.log1p.default, aten.floor.default, aten.sqrt.default, aten.rsqrt.default,
    aten.tanh.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar,
    aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.to.dtype, aten.clamp.default, aten.div.Tensor_mode,
    aten.gt.Scalar, aten.where.self, aten.reciprocal.default, aten.clone.default, aten.floor_divide.default,
))  # fmt: skip
_SAMPLES = 8


@dataclass(frozen=True)
class TabulatePositions(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor, names = Editor(program), {}
        known = _known(program)
        for node in [node for node in program.calls() if node in known and not _is_row(node)]:
            if any(user not in known for user in node.users):
                self._tabulate(editor, node, names)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _tabulate(self, editor: Editor, node: fx.Node, names: dict[bytes, str]) -> None:
        program, shape = editor.program, sizes(node)
        lead = next((place for place, size in enumerate(shape) if not isinstance(size, int)), None)
        if node.meta["val"].dtype != torch.float32 or lead is None or any(size != 1 for size in shape[:lead]):
            return editor.miss(node, "it is no float32 value with tokens in front")
        length = int(program.input("kv").meta["val"].shape[2])
        table = _value(program, node, torch.arange(length, dtype=torch.int32)).reshape(length, -1)
        for position in sorted({length * sample // _SAMPLES for sample in range(_SAMPLES)}):
            alone = _value(program, node, torch.tensor([position, 0], dtype=torch.int32)).reshape(2, -1)
            if not torch.equal(alone[0], table[position]):
                return editor.miss(node, f"the value of position {position} depends on other tokens of the step")
        array = np.ascontiguousarray(table.numpy())
        name = names.setdefault(repr(array.shape).encode() + array.tobytes(), f"tables.{len(names)}")
        program.constants[name] = array
        with editor.before(node):
            weight = editor.weight(name, Weight(tuple(array.shape), Constant(name)))
            row = editor.emit(xllm.rows.default, weight, program.input("positions"), like=node)
            behind = [size if isinstance(size, int) else -1 for size in shape]
            new = row if sizes(row) == shape else editor.emit(aten.reshape.default, row, behind, like=node)
        node.replace_all_uses_with(new)
        editor.hit(new)


def _known(program: Program) -> set[fx.Node]:
    """Calls whose value follows from the positions and from constants of the program, token by token."""
    positions = program.input("positions")
    known = {positions}
    for node in program.calls():
        if node.target not in _PER_TOKEN or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        inputs = node.all_input_nodes
        if known.isdisjoint(inputs) or not all(one in known or _is_constant(program, one) for one in inputs):
            continue
        if not _names_tokens(node):
            known.add(node)
    return known - {positions}


def _is_constant(program: Program, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(program.weights[str(node.target)].rule, Constant)


def _is_row(node: fx.Node) -> bool:
    """Already a row of a table, maybe seen in another shape."""
    while is_call(node, aten.reshape.default):
        node = node.all_input_nodes[0]
    return is_call(node, xllm.rows.default)


def _names_tokens(node: fx.Node) -> bool:
    """Whether a call cuts, joins or repeats along the axis of the tokens, or gathers by something else."""
    if is_call(node, xllm.rows.default):
        return node.args[1].op != "placeholder"  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    places: dict[Any, int] = {aten.slice.Tensor: 1, aten.cat.default: 1, aten.stack.default: 1, aten.select.int: 1,
              aten.repeat_interleave.self_int: 2}  # fmt: skip
    if node.target not in places:
        return False
    place: Any = places[node.target]
    axis: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    shape = sizes(node) if not is_call(node, aten.select.int) else sizes(node.all_input_nodes[0])
    return axis is None or not isinstance(shape[axis], int)


def _value(program: Program, node: fx.Node, positions: torch.Tensor) -> torch.Tensor:
    """The node for these positions, by running what it follows from."""

    def of(one: fx.Node) -> Any:
        if one.op == "placeholder":
            return positions
        if one.op == "get_attr":
            rule = program.weights[str(one.target)].rule
            assert isinstance(rule, Constant)
            return torch.from_numpy(program.constants[rule.name])
        assert callable(one.target)
        return one.target(*fx.map_arg(one.args, of), **fx.map_arg(one.kwargs, of))  # pyright: ignore[reportCallIssue]

    with torch.no_grad():
        return of(node)
