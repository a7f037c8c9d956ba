"""Rotary position embedding as one operator over [T, H, D].

before:  %a = aten.mul(%t, %cos1)                     after:  %r = xllm.rope(%x, %cos, %sin, rotary_dim, False)
         %h = aten.cat([-%t[half:], %t[:half]], -1)           %t' = aten.transpose(%r, 0, 1)
         %r = aten.add(%a, %h * %sin1)

`%t` is `transpose(%x [T, H, D], 0, 1)` and `%cos1` is `unsqueeze(%cos [T, D], 0)`, as transformers lays heads out; the
transpose that follows cancels with the one made here. A rotation of the first part of a head, joined with the rest,
becomes a partial rotation. Neighbours in place of halves (`stack([-%t[1::2], %t[::2]], -1)`) give the interleaved form.
Does not fire on other pairings of dimensions (they stay as they are and are reported), on halves or tables of another
width, or when a half has another user.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import prune
from xllm.ir.program import arguments
from xllm.ir.verify import same_type
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, Miss, Num, Op, Var, is_call, match, sizes, undo_transposes

aten = torch.ops.aten
xllm = torch.ops.xllm
t, cos, sin = Var("t"), Var("cos"), Var("sin")

_LOW = Op((aten.slice.Tensor,), (t, -1, Num(equals=0), Num("half")))
_HIGH = Op((aten.slice.Tensor,), (t, -1, Num("half"), Num("end")))
_HALVES = Op((aten.cat.default,), ([Op((aten.neg.default,), (_HIGH,)), _LOW], -1))
_EVEN = Op((aten.slice.Tensor,), (t, -1, Num(equals=0), Num("end"), Num(equals=2)))
_ODD = Op((aten.slice.Tensor,), (t, -1, Num(equals=1), Num("end"), Num(equals=2)))
_PAIRS = Op((aten.stack.default,), ([Op((aten.neg.default,), (_ODD,)), _EVEN], Num("axis")))
_NEIGHBOURS = Op((aten.reshape.default,), (_PAIRS, [Num(), Num(), Num("width")]))


def _rotation(partner: Op) -> Op:
    turned = Op((aten.mul.Tensor,), (partner, sin), commutes=True)
    return Op((aten.add.Tensor,), (Op((aten.mul.Tensor,), (t, cos), commutes=True), turned), commutes=True)


ROPE, INTERLEAVED = _rotation(_HALVES), _rotation(_NEIGHBOURS)


@dataclass(frozen=True)
class FuseRope(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if node.target is aten.neg.default:
                self._fuse(editor, node)
        prune(program)
        for node in list(program.calls()):
            if node.target is aten.cat.default:
                _widen(editor, node)
        prune(program)
        for node in list(program.calls()):
            undo_transposes(node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, anchor: fx.Node) -> None:
        """`anchor` is the negated part every rotation has; the root is the sum three users up, or four."""
        miss = Miss()
        joined = {joined for user in anchor.users for joined in _seen(user)}
        roots = {root for cat in joined for product in cat.users for root in product.users}
        for root in sorted(roots, key=lambda node: node.name):
            for pattern in (ROPE, INTERLEAVED):
                binds = match(pattern, root, miss)
                if binds is not None:
                    return self._replace(editor, root, binds)
        editor.miss(anchor, miss.why or "a negated half that no rotation uses")

    def _replace(self, editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
        heads_first: fx.Node = binds["t"]
        cos_row, sin_row = _row_table(binds["cos"]), _row_table(binds["sin"])
        shape, interleaved = sizes(heads_first), "half" not in binds
        paired = len(shape) == 3 and binds["end"] >= shape[2]
        paired &= (
            (binds["axis"] in (3, -1) and binds["width"] == shape[2]) if interleaved else binds["half"] * 2 == shape[2]
        )
        if not paired or cos_row is None or sin_row is None:
            return editor.miss(root, "the halves, the tables or the head layout are not those of a plain rotation")
        if sizes(cos_row) != (shape[1], shape[2]) or sizes(sin_row) != sizes(cos_row):
            return editor.miss(root, f"tables of {list(sizes(cos_row))} do not rotate heads of {list(shape[1:])}")
        with editor.before(root):
            tokens_first = editor.emit(aten.transpose.int, heads_first, 0, 1, like=root)
            turned = editor.emit(xllm.rope.default, tokens_first, cos_row, sin_row, shape[2], interleaved, like=root)
            back = editor.emit(aten.transpose.int, turned, 0, 1, like=root)
        root.replace_all_uses_with(back)
        editor.hit(turned)


def _seen(join: fx.Node) -> list[fx.Node]:
    """A join of halves, or the views that lay pairs side by side."""
    return list(join.users) if is_call(join, aten.stack.default) else [join]


def _row_table(value: fx.Node) -> fx.Node | None:
    """[T, D] behind unsqueeze(·, 0) or reshape(·, [1, T, D])."""
    if is_call(value, aten.unsqueeze.default, aten.reshape.default):
        source = arguments(value)[0]
        if sizes(value) == (1, *sizes(source)):
            return source
    return None


def _widen(editor: Editor, cat: fx.Node) -> None:
    """cat([transpose(rope(transpose(x[..., :r]))), x[..., r:]], -1): a rotation of the first r of each head of x."""
    parts = arguments(cat)[0]
    if len(parts) != 2 or not is_call(parts[0], aten.transpose.int) or not is_call(parts[1], aten.slice.Tensor):
        return
    turned, rest = parts
    rope = arguments(turned)[0]
    if not is_call(rope, xllm.rope.default):
        return
    inner, *tables, r, interleaved = arguments(rope)
    head = arguments(inner)[0] if is_call(inner, aten.transpose.int) else None
    whole, *kept = arguments(rest)
    ends = is_call(head, aten.slice.Tensor) and arguments(head) == (whole, -1, 0, r) and kept[:2] == [-1, r]
    if not ends or not same_type(cat.meta["val"], whole.meta["val"]) or cat.args[1:] != (-1,):
        return editor.miss(cat, "the rotated and the kept part are not two ends of one value")
    with editor.before(cat):
        tokens_first = editor.emit(aten.transpose.int, whole, 0, 1, like=cat)
        wide = editor.emit(xllm.rope.default, tokens_first, *tables, r, interleaved, like=cat)
        back = editor.emit(aten.transpose.int, wide, 0, 1, like=cat)
    cat.replace_all_uses_with(back)
    editor.hit(wide)
