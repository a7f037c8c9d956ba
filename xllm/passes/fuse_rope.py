"""Rotary position embedding as one operator over [T, H, D].

before:  %a = aten.mul(%t, %cos1)                     after:  %r = xllm.rope(%x, %cos, %sin, rotary_dim, interleaved=False)
         %h = aten.cat([-%t[half:], %t[:half]], -1)           %t' = aten.transpose(%r, 0, 1)
         %r = aten.add(%a, %h * %sin1)

`%t` is `transpose(%x [T, H, D], 0, 1)` and `%cos1` is `unsqueeze(%cos [T, D], 0)`, as transformers lays heads out; the
transpose that follows cancels with the one made here. A rotation of the first part of a head, joined with the rest, becomes
a partial rotation. Does not fire on other pairings of dimensions (they stay as they are and are reported).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import prune
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, Miss, Num, Op, Var, match

aten = torch.ops.aten
xllm = torch.ops.xllm
t, cos, sin = Var("t"), Var("cos"), Var("sin")

_LOW = Op((aten.slice.Tensor,), (t, Num("axis"), Num(equals=0), Num("half")))
_HIGH = Op((aten.slice.Tensor,), (t, Num("axis"), Num("half"), Num("end")))
_PARTNER = Op((aten.cat.default,), ([Op((aten.neg.default,), (_HIGH,)), _LOW], -1))
ROPE = Op(
    (aten.add.Tensor,),
    (Op((aten.mul.Tensor,), (t, cos), commutes=True), Op((aten.mul.Tensor,), (_PARTNER, sin), commutes=True)),
    commutes=True,
)


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
            if node.target is aten.transpose.int:
                _cancel(node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, anchor: fx.Node) -> None:
        """`anchor` is the negated half every rotation has; the root is the sum three users up."""
        miss = Miss()
        roots = {root for cat in anchor.users for product in cat.users for root in product.users}
        for root in sorted(roots, key=lambda node: node.name):
            binds = match(ROPE, root, miss)
            if binds is not None:
                return self._replace(editor, root, binds)
        editor.miss(anchor, miss.why or "a negated half that no rotation uses")

    def _replace(self, editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
        heads_first, width = binds["t"], binds["t"].meta["val"].shape[-1]
        cos_row, sin_row = _row_table(binds["cos"]), _row_table(binds["sin"])
        if binds["half"] * 2 != width or cos_row is None or sin_row is None or heads_first.meta["val"].dim() != 3:
            return editor.miss(root, "the halves, the tables or the head layout are not those of a plain rotation")
        with editor.before(root):
            tokens_first = editor.emit(aten.transpose.int, heads_first, 0, 1, like=root)
            turned = editor.emit(xllm.rope.default, tokens_first, cos_row, sin_row, width, False, like=root)
            back = editor.emit(aten.transpose.int, turned, 0, 1, like=root)
        root.replace_all_uses_with(back)
        editor.hit(turned)


def _row_table(value: fx.Node) -> fx.Node | None:
    """[T, D] behind unsqueeze(·, 0) or reshape(·, [1, T, D])."""
    if value.target in (aten.unsqueeze.default, aten.reshape.default):
        source = value.args[0]
        shape = value.meta["val"].shape
        if isinstance(source, fx.Node) and source.meta["val"].dim() == 2 and len(shape) == 3 and shape[0] == 1:
            return source
    return None


def _widen(editor: Editor, cat: fx.Node) -> None:
    """cat([transpose(rope(transpose(x[..., :r]))), x[..., r:]], -1): a rotation of the first r of each head of x."""
    parts = cat.args[0]
    if not (isinstance(parts, list | tuple) and len(parts) == 2 and cat.args[1:] == (-1,)):
        return
    turned, rest = parts
    rope = turned.args[0] if turned.target is aten.transpose.int else None  # pyright: ignore
    if rope is None or rope.target is not xllm.rope.default or rest.target is not aten.slice.Tensor:  # pyright: ignore
        return
    head = rope.args[0].args[0]  # pyright: ignore  # behind the transpose made by FuseRope
    r = rope.args[3]  # pyright: ignore
    if head.target is not aten.slice.Tensor or head.args[0] is not rest.args[0] or head.args[3] != r or rest.args[2] != r:  # pyright: ignore
        return editor.miss(cat, "the rotated and the kept part are not two ends of one value")
    with editor.before(cat):
        tokens_first = editor.emit(aten.transpose.int, rest.args[0], 0, 1, like=cat)  # pyright: ignore
        whole = editor.emit(xllm.rope.default, tokens_first, *rope.args[1:], like=cat)  # pyright: ignore
        back = editor.emit(aten.transpose.int, whole, 0, 1, like=cat)
    cat.replace_all_uses_with(back)
    editor.hit(whole)


def _cancel(node: fx.Node) -> None:
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is aten.transpose.int and set(source.args[1:]) == set(node.args[1:]):
        node.replace_all_uses_with(source.args[0])  # pyright: ignore[reportArgumentType]
