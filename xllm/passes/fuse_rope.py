"""Rotary position embedding as one operator over [T, H, D].

before:  %a = aten.mul(%t, %cos1)                     after:  %r = xllm.rope(%x, %cos, %sin, rotary_dim, False)
         %h = aten.cat([-%t[half:], %t[:half]], -1)           %t' = aten.transpose(%r, 0, 1)
         %r = aten.add(%a, %h * %sin1)

`%t` is `transpose(%x [T, H, D], 0, 1)` and `%cos1` is `unsqueeze(%cos [T, D], 0)`, as transformers lays heads out; the
transpose that follows cancels with the one made here. In functions `%t` is [B, H, L, D] or [B, L, H, D] and the tables
are [1 or B, 1, L, D] or [1 or B, L, 1, D]: rows are B L tokens, and a table for all of them is made once. A rotation of
the first part of a head, joined with the rest, becomes a partial rotation. In a step, neighbours in place of halves
(`stack([-%t[1::2], %t[::2]], -1)`) give the interleaved form, and halves turned one by one,
`cat([%a * %c - %b * %s, %b * %c + %a * %s], -1)`, read tables that hold each number once: these are doubled.
Does not fire on other pairings of dimensions (they stay as they are and are reported), on halves or tables of another
width, or when a half has another user.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Concat, Program, Weight
from xllm.ir.build import prune
from xllm.ir.program import arguments
from xllm.ir.verify import same_type
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
    shape_arguments,
    sizes,
    undo_transposes,
)  # fmt: skip

aten = torch.ops.aten
xllm = torch.ops.xllm
_SWAP = [0, 2, 1, 3]  # heads and tokens change places
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


def _times(half: Op, table: Var) -> Op:
    return Op((aten.mul.Tensor,), (half, table), commutes=True)


ROPE, INTERLEAVED = _rotation(_HALVES), _rotation(_NEIGHBOURS)
_A, _B = replace(_LOW, shared=True), replace(_HIGH, shared=True)
BY_HALVES = Op(
    (aten.cat.default,),
    (
        [
            Op((aten.sub.Tensor,), (_times(_A, cos), _times(_B, sin))),
            Op((aten.add.Tensor,), (_times(_B, cos), _times(_A, sin)), commutes=True),
        ],
        -1,
    ),
)


@dataclass(frozen=True)
class FuseRope(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor, doubled = Editor(program), {}
        for node in list(program.calls()):
            if node.target is aten.neg.default:
                self._fuse(editor, node)
            elif node.target is aten.sub.Tensor:
                self._fuse_halves(editor, node, doubled)
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

    def _fuse_halves(self, editor: Editor, difference: fx.Node, doubled: dict[fx.Node, fx.Node]) -> None:
        """`difference` is the first half of what a rotation gives; the root is the join above it. doubled: the tables
        made so far, by those they were made of.
        """
        miss = Miss()
        for root in difference.users:
            if is_call(root, aten.cat.default) and (binds := match(BY_HALVES, root, miss)) is not None:
                for name in ("cos", "sin"):
                    half = _row_table(binds[name])
                    if half is None or sizes(half)[-1] != binds["half"]:
                        return editor.miss(root, "its tables do not hold one number for each pair")
                    binds[name] = doubled[half] = doubled.get(half) or _doubled(editor, half)
                return self._replace(editor, root, binds)
        if miss.depth > 3:  # differences of other things are no near misses
            editor.miss(difference, miss.why)

    def _replace(self, editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
        heads_first: fx.Node = binds["t"]
        if len(sizes(heads_first)) == 4:
            return _in_batches(editor, root, binds)
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


def _in_batches(editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
    """The rotation of a function: tokens of all batches as rows."""
    t, cos, sin = (binds[name] for name in ("t", "cos", "sin"))
    width, tables = sizes(t)[3], sizes(cos)
    if "half" not in binds or (2 * binds["half"], binds["end"]) != (width, width) or len(tables) != 4:
        return editor.miss(root, "the halves or the tables are not those of a plain rotation")
    axis = 2 if tables[1] == 1 else 1  # of the tokens
    batch, length = sizes(t)[0], sizes(t)[axis]
    fits = sizes(sin) == tables and tables[3 - axis] == 1 and tables[3] == width
    if not fits or str(tables[axis]) != str(length) or (tables[0] != 1 and str(tables[0]) != str(batch)):
        return editor.miss(root, f"tables of {list(tables)} do not rotate {list(sizes(t))}")
    if (whole := _rest(root, t)) is not None:
        root, t = next(iter(root.users)), whole
    shape = [batch, length, sizes(t)[3 - axis], sizes(t)[3]]
    rows = [_rows(editor, table, batch, axis) for table in (cos, sin)]
    wanted = shape_arguments(editor, shape)
    if wanted is None or None in rows:
        return editor.miss(root, "its sizes cannot be read off the inputs")
    with editor.before(root):
        if axis == 2:
            turned = is_call(t, aten.permute.default) and t.args[1] == _SWAP
            t = arguments(t)[0] if turned else editor.emit(aten.permute.default, t, _SWAP, like=root)
        flat = editor.emit(aten.reshape.default, t, [-1, *shape[2:]], like=root)
        rotated = editor.emit(xllm.rope.default, flat, *rows, width, False, like=root)
        made = editor.emit(aten.reshape.default, rotated, wanted, like=root)
        if axis == 2:
            made = editor.emit(aten.permute.default, made, _SWAP, like=root)
    root.replace_all_uses_with(made)
    editor.hit(rotated)


def _rest(root: fx.Node, t: fx.Node) -> fx.Node | None:
    """The value of whose first numbers `t` are, where the rotated ones are joined with its others, and only that."""
    cat = next(iter(root.users), None)
    if len(root.users) != 1 or not is_call(cat, aten.cat.default) or not is_call(t, aten.slice.Tensor):
        return None
    whole, *ends = arguments(t)
    rest = arguments(cat)[0][-1]
    kept = is_call(rest, aten.slice.Tensor) and arguments(rest) == (whole, -1, ends[2], sizes(whole)[-1])
    joined = len(arguments(cat)[0]) == 2 and arguments(cat)[0][0] is root and kept and ends[:2] == [-1, 0]
    return whole if joined and same_type(cat.meta["val"], whole.meta["val"]) else None


def _rows(editor: Editor, table: fx.Node, batch: Any, axis: int) -> fx.Node | None:
    """[B L, R] of a table, made where the table is, once for all that read it."""
    count, width = sizes(table)[0], sizes(table)[3]
    many, length = shape_arguments(editor, [batch, sizes(table)[axis], width]), sizes(table)[axis]
    short = shape_arguments(editor, [count, length, width])
    for user in table.users:
        held = next((one for one in user.users if is_call(one, aten.expand.default)), user)
        done = next(
            (one for one in held.users if is_call(one, aten.reshape.default) and one.args[1] == [-1, width]), None
        )
        if is_call(user, aten.reshape.default) and done is not None:
            return done
    if many is None or short is None:
        return None
    with editor.before(table.next):
        row = editor.emit(aten.reshape.default, table, short, like=table)
        if str(count) != str(batch):
            row = editor.emit(aten.expand.default, row, [many[0], -1, -1], like=table)
        return editor.emit(aten.reshape.default, row, [-1, width], like=table)


def _seen(join: fx.Node) -> list[fx.Node]:
    """A join of halves, or the views that lay pairs side by side."""
    return list(join.users) if is_call(join, aten.stack.default) else [join]


def _doubled(editor: Editor, half: fx.Node) -> fx.Node:
    """Rows [T, D / 2] twice side by side: rows of a wider table, or a join made where the rows are."""
    table = arguments(half)[0] if is_call(half, xllm.rows.default) else None
    with editor.program.graph.inserting_after(half):
        if not is_weight(table):
            return editor.emit(aten.cat.default, [half, half], -1, like=half)
        held = editor.program.weights[str(table.target)]
        weight = Weight((held.shape[0], 2 * held.shape[1]), Concat((held.rule, held.rule), axis=1))
        wide = editor.weight(f"{table.target}_twice", weight)
        return editor.emit(xllm.rows.default, wide, arguments(half)[1], like=half)


def _row_table(value: fx.Node) -> fx.Node | None:
    """[T, D] as it is, or behind unsqueeze(·, 0) or reshape(·, [1, T, D])."""
    if len(sizes(value)) == 2:
        return value
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
