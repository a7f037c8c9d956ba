"""Multi-head latent attention on the latent itself (arXiv 2405.04434): one short key for all heads is kept, no values.

before:  %kv = reshape(xllm.linear(%latent [T, C], @kv_b_proj), [T, H, N + V])
         %k = cat([%kv[..., :N], expand(%rope [T, 1, R])], -1);  %v = %kv[..., N:]
         xllm.kv_write(%kv_state, %k, %v, …);  %o = xllm.attention(%kv_state, cat([%q_nope, %q_rope], -1), …)
after:   xllm.latent_write(%kv_state, %latent, %rope, …)
         %l = xllm.latent_attention(%kv_state, xllm.heads_linear(%q_nope, @keys [H, C, N]), %q_rope, …)
         %o = xllm.heads_linear(%l, @values [H, V, C])

Both new weights are parts of @kv_b_proj under other shapes; scale, window and soft-cap stay. Does not fire when keys
and values are not parts of one product per head, when the product has a bias or a computed weight, when the rotated
part differs by head, with sinks, when query heads share keys, or when the latent would take more memory than what it
gives.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program, Weight
from xllm.ir.program import arguments
from xllm.ir.weight_rules import Permute, Reshape, Slice
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import (
    Editor,
    attention_pairs,
    cut_of,
    is_call,
    is_weight,
    sizes,
    tokens_first,
    transposed,
    view,
)

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True)
class AbsorbMla(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for attention, write in attention_pairs(program):
            self._absorb(editor, attention, write)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _absorb(self, editor: Editor, attention: fx.Node, write: fx.Node) -> None:
        parts = _parts(write)
        if parts is None:
            return
        if isinstance(parts, str):
            return editor.miss(attention, parts)
        kv, query, positions, slots, sinks, layer, kv_heads, value_dim, scale, window, softcap = arguments(attention)
        latent_dim, rope_dim = sizes(parts.latent)[-1], sizes(parts.rope)[-1]
        kept, would = latent_dim + rope_dim, kv_heads * (sizes(query)[2] + value_dim)
        checks = (
            (sizes(query)[1] == kv_heads, "query heads share keys"),
            (sinks is None, "sinks join its softmax"),
            (kept < would, f"the latent takes {kept} numbers a token, keys and values {would}"),
        )
        if why := next((why for holds, why in checks if not holds), ""):
            return editor.miss(attention, why)
        keys, values = _weights(editor, parts, kv_heads)
        with editor.before(write):
            latent = view(editor, parts.latent, [-1, latent_dim], write)
            rope = view(editor, parts.rope, [-1, rope_dim], write)
            editor.emit(xllm.latent_write.default, kv, latent, rope, positions, slots, layer, like=write)
        with editor.before(attention):
            nope, turned = _query(editor, query, sizes(query)[2] - rope_dim, attention)
            absorbed = editor.emit(xllm.heads_linear.default, nope, keys, like=attention)
            seen = editor.emit(
                xllm.latent_attention.default,
                *(kv, absorbed, turned, positions, slots, layer, scale, window, softcap),
                like=attention,
            )
            out = editor.emit(xllm.heads_linear.default, seen, values, like=attention)
        attention.replace_all_uses_with(out)
        for node in (attention, write):
            editor.program.graph.erase_node(node)
        layers = list(editor.program.kv)
        layers[layer] = replace(layers[layer], kv_heads=1, key_dim=kept, value_dim=latent_dim, latent=True)
        editor.program.kv = tuple(layers)
        editor.hit(seen)


@dataclass(frozen=True)
class _Parts:
    """What keys and values are made of: two ranges of each head of a product with the latent, and the rotated part."""

    product: fx.Node
    latent: fx.Node
    rope: fx.Node
    keys: tuple[int, int]
    values: tuple[int, int]
    head: int  # numbers of the product for one head


def _parts(write: fx.Node) -> _Parts | str | None:
    """The parts of a write's keys and values, or why they are no such parts; nothing where keys are no join of two."""
    k, v = arguments(write)[1:3]
    joined, first = transposed(k)
    pieces = arguments(joined)[0] if is_call(joined, aten.cat.default) and joined.args[1] == -1 else ()
    if len(pieces) != 2:
        return None
    nope, rope = _range(pieces[0], first), pieces[1]
    value = _range(v, False)
    if isinstance(nope, str) or isinstance(value, str):
        return next(why for why in (nope, value) if isinstance(why, str))
    if nope.product is not value.product or nope.head != value.head:
        return "keys and values come from different products"
    if is_call(rope, aten.expand.default):
        rope = arguments(rope)[0]
    if sizes(rope)[0 if first else 1] != 1:
        return "the rotated part differs by head"
    latent, weight, bias = arguments(nope.product)
    if bias is not None or not is_weight(weight):
        return "the product of the latent has a bias or a computed weight"
    return _Parts(nope.product, latent, rope, nope.span, value.span, nope.head)


@dataclass(frozen=True)
class _Range:
    """Columns span[0] to span[1] of each head, `head` columns wide, of a product."""

    product: fx.Node
    span: tuple[int, int]
    head: int


def _range(value: fx.Node, heads_first: bool) -> _Range | str:
    """A value traced back through cuts and transposes to the product it is a range of, per head."""
    start, stop, node = 0, sizes(value)[-1], value
    while True:
        before, moved = transposed(node)
        if moved:
            heads_first, node = not heads_first, before
        elif (cut := cut_of(node)) is not None:
            node, offset = cut
            start, stop = start + offset, stop + offset
        else:
            break
    source = arguments(node)[0] if is_call(node, aten.reshape.default) else None
    if heads_first or not is_call(source, xllm.linear.default) or len(sizes(node)) != 3:
        return f"%{node.name} is not a product cut into heads"
    return _Range(source, (start, stop), sizes(node)[2])


def _weights(editor: Editor, parts: _Parts, heads: int) -> tuple[fx.Node, fx.Node]:
    """The product's weight [H (N + V), C] as [H, C, N], which takes queries to the latent, and [H, V, C]."""
    name = str(arguments(parts.product)[1].target)
    held = editor.program.weights[name]
    latent = held.shape[1]
    stem = name.removesuffix(".weight")
    by_head = Reshape(held.rule, (heads, parts.head, latent))
    keys, values = (Slice(by_head, 1, *span) for span in (parts.keys, parts.values))
    return (
        editor.weight(f"{stem}_keys.weight", Weight((heads, latent, keys.stop - keys.start), Permute(keys, (0, 2, 1)))),
        editor.weight(f"{stem}_values.weight", Weight((heads, values.stop - values.start, latent), values)),
    )


def _query(editor: Editor, query: fx.Node, nope: int, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The parts of a query [T, H, N + R] on either side of N: those it was joined from, or cuts of it."""
    joined, first = transposed(query)
    pieces = arguments(joined)[0] if is_call(joined, aten.cat.default) and joined.args[1] == -1 else ()
    if [sizes(piece)[-1] for piece in pieces] == [nope, sizes(query)[2] - nope]:
        return tuple(tokens_first(editor, piece, like) if first else piece for piece in pieces)  # pyright: ignore
    bounds = ((0, nope), (nope, sizes(query)[2]))
    return tuple(editor.emit(aten.slice.Tensor, query, -1, *cut, like=like) for cut in bounds)  # pyright: ignore
