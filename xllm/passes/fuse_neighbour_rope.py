"""Rotary position embedding that turns neighbours, dimension 2i with 2i + 1, as one operator over [T, H, D].

before:  %z = aten.mul(view_as_complex(reshape(%t, [H, T, D/2, 2])), complex(%cos[:, ::2], %sin[:, ::2]))
         %r = reshape(view_as_real(%z), [H, T, D])
after:   %r = transpose(xllm.rope(transpose(%t), %cos, %sin, D, True))

before:  %a, %b = %t[..., ::2], %t[..., 1::2];  %r = aten.cat([%a * %c - %b * %s, %b * %c + %a * %s], -1)
after:   %r = transpose(xllm.rope(%x, %cos, %sin, D, False)), %x the even dimensions of transpose(%t), then the odd

`%t` is heads first, [H, T, D]; `%c` and `%s` are the first halves of the rows. Does not fire where the tables are not
constants of the program, or do not repeat each number as the operator reads it: for neighbours, or for both halves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import prune
from xllm.ir.program import arguments
from xllm.ir.verify import same_type
from xllm.ir.weight_rules import Constant
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import (
    Editor,
    Miss,
    Num,
    Op,
    Var,
    is_call,
    is_weight,
    match,
    sizes,
    tokens_first,
    undo_transposes,
    view,
)

aten = torch.ops.aten
xllm = torch.ops.xllm


def _half(name: str) -> Op:
    cut = Op((aten.slice.Tensor,), (Var(name), -1, Num(equals=0), Num("half")), shared=True)
    return Op((aten.reshape.default,), (cut, [1, -1, Num("half")]), shared=True)


def _every_other(start: int) -> Op:
    return Op((aten.slice.Tensor,), (Var("t"), -1, Num(equals=start), Num("width"), Num(equals=2)), shared=True)


def _times(a: Op, b: Op) -> Op:
    return Op((aten.mul.Tensor,), (a, b), commutes=True)


_EVEN, _ODD, _COS, _SIN = _every_other(0), _every_other(1), _half("cos"), _half("sin")
STRIDED = Op(
    (aten.cat.default,),
    (
        [
            Op((aten.sub.Tensor,), (_times(_EVEN, _COS), _times(_ODD, _SIN))),
            Op((aten.add.Tensor,), (_times(_ODD, _COS), _times(_EVEN, _SIN)), commutes=True),
        ],
        -1,
    ),
)
_PARTS = tuple(
    Op((aten.slice.Tensor,), (Var(name), -1, Num(equals=0), Num("width"), Num(equals=2)), shared=True)
    for name in ("cos", "sin")
)
_TURN = Op((aten.complex.default,), _PARTS, shared=True)
COMPLEX = Op(
    (aten.mul.Tensor,),
    (
        Op(
            (aten.view_as_complex.default,),
            (Op((aten.reshape.default,), (Var("t"), [Num("heads"), -1, Num("half"), Num(equals=2)])),),
        ),
        Op((aten.reshape.default,), (_TURN, [1, -1, Num("half")]), shared=True),
    ),
    commutes=True,
)


@dataclass(frozen=True)
class FuseNeighbourRope(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if is_call(node, aten.view_as_real.default):
                _complex(editor, node)
            elif is_call(node, aten.sub.Tensor):
                _strided(editor, node)
        prune(program)
        for node in list(program.calls()):
            undo_transposes(node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))


def _complex(editor: Editor, node: fx.Node) -> None:
    """`node` gives the real pairs of a product of complex numbers."""
    miss = Miss()
    binds = match(COMPLEX, arguments(node)[0], miss)
    if binds is None:
        return editor.miss(node, miss.why)
    joined = next(iter(node.users)) if len(node.users) == 1 else None
    if not is_call(joined, aten.reshape.default) or sizes(joined) != (*sizes(node)[:2], 2 * sizes(node)[2]):
        return editor.miss(node, "the turned pairs are not put back where they were")
    if not same_type(joined.meta["val"], binds["t"].meta["val"]):
        with editor.before(joined):
            wanted = [sizes(joined)[0], -1, sizes(joined)[2]]
            binds["t"] = editor.emit(aten.reshape.default, binds["t"], wanted, like=joined)
    _replace(editor, joined, binds, interleaved=True)


def _strided(editor: Editor, difference: fx.Node) -> None:
    """`difference` is the first half of what a rotation gives; the root is the join above it."""
    miss = Miss()
    for root in difference.users:
        if is_call(root, aten.cat.default) and (binds := match(STRIDED, root, miss)) is not None:
            return _replace(editor, root, binds, interleaved=False)
    if miss.depth > 3:  # halves, and differences of other things, are no near misses
        editor.miss(difference, miss.why)


def _replace(editor: Editor, root: fx.Node, binds: dict[str, Any], interleaved: bool) -> None:
    heads_first, tables = binds["t"], (binds["cos"], binds["sin"])
    shape = sizes(heads_first)
    width = shape[-1]
    if len(shape) != 3 or binds["half"] * 2 != width or binds["width"] < width:
        return editor.miss(root, "the pairs or the head layout are not those of a rotation of neighbours")
    if any(sizes(table) != (shape[1], width) for table in tables):
        return editor.miss(root, f"tables of {list(sizes(tables[0]))} do not rotate heads of {list(shape[1:])}")
    if not all(_repeats(editor.program, table, interleaved) for table in tables):
        return editor.miss(root, "its tables are no constants that hold each number twice")
    with editor.before(root):
        x = tokens_first(editor, heads_first, root)
        if not interleaved:
            pairs = view(editor, x, [-1, shape[0], width // 2, 2], root)
            halves = editor.emit(aten.transpose.int, pairs, 2, 3, like=root)
            x = editor.emit(aten.reshape.default, halves, [-1, shape[0], width], like=root)
        turned = editor.emit(xllm.rope.default, x, *tables, width, interleaved, like=root)
        if shape[0] == 1:
            back = view(editor, turned, [1, -1, width], root)
        else:
            back = editor.emit(aten.transpose.int, turned, 0, 1, like=root)
    root.replace_all_uses_with(back)
    editor.hit(turned)


def _repeats(program: Program, rows: fx.Node, interleaved: bool) -> bool:
    """Whether rows of a constant hold each number twice: side by side, or in either half."""
    table = arguments(rows)[0] if is_call(rows, xllm.rows.default) else None
    rule = program.weights[str(table.target)].rule if is_weight(table) else None
    if not isinstance(rule, Constant):
        return False
    array = program.constants[rule.name]
    half = array.shape[1] // 2
    pair = (array[:, ::2], array[:, 1::2]) if interleaved else (array[:, :half], array[:, half:])
    return np.array_equal(*pair)
