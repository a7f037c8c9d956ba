"""All that stands between the fused projection and attention, with the KV write, as one operator.

before:  %q = xllm.rope(xllm.rms_norm(reshape(%qkv[:, :a]), @q_norm), %cos, %sin)
         %k = xllm.rope(xllm.rms_norm(reshape(%qkv[:, a:b]), @k_norm), %cos, %sin)
         %v = reshape(%qkv[:, b:])
         xllm.kv_write(%kv, %k, %v, …)
after:   %q = xllm.qk_norm_rope_write(%kv, %qkv, @q_norm, @k_norm, %cos, %sin, …)

Norms and rope are each optional but must be alike for query and key. Does not fire when the target lacks the kernel,
when the norm spans all heads, when the slices are not q, k, v of one value, or when keys and values differ in width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, attention_pairs, cut_of, is_call, is_weight, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True)
class FuseQkNormRope(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for attention, write in attention_pairs(program):
            if "qk_norm_rope_write" in context.target.fuses:
                self._fuse(editor, attention, write)
            else:
                editor.miss(attention, f"target {context.target.name} has no kernel for the fused form")
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, attention: fx.Node, write: fx.Node) -> None:
        kv, k_end, v_end, positions, slots, layer = arguments(write)
        q_end = arguments(attention)[1]
        q, k, v = (_peel(end) for end in (q_end, k_end, v_end))
        if why := _mismatch(q, k, v):
            return editor.miss(attention, why)
        heads, head_dim = (q.shape[1], k.shape[1]), q.shape[2]
        cos, sin, rotary_dim, interleaved = q.rope or (None, None, 0, False)
        with editor.before(write):
            fused = editor.emit(
                xllm.qk_norm_rope_write.default,
                *(kv, q.source, q.norm, k.norm, cos, sin, positions, slots, layer),
                *(*heads, head_dim, rotary_dim, interleaved, q.eps),
                like=write,
            )
        attention.replace_input_with(q_end, fused)
        editor.program.graph.erase_node(write)
        editor.hit(fused)


@dataclass(frozen=True)
class _Branch:
    """One of q, k, v traced back to its slice: what was applied on the way, or `why` it is not a slice."""

    shape: tuple[Any, ...]
    source: Any = None
    start: int = 0
    stop: int = 0
    norm: Any = None
    eps: float = 0.0
    rope: tuple[Any, ...] | None = None
    why: str = ""


def _peel(value: fx.Node) -> _Branch:
    """rope?(rms_norm?(reshape(slice(source)))) taken apart; `why` says where it stopped being that."""
    shape = sizes(value)
    rope = norm = None
    eps = 0.0
    if is_call(value, xllm.rope.default):
        value, *rest = arguments(value)
        rope = tuple(rest)
    if is_call(value, xllm.rms_norm.default):
        value, norm, eps = arguments(value)
    part = arguments(value)[0] if is_call(value, aten.reshape.default) else None
    if is_call(part, xllm.rms_norm.default):
        return _Branch(shape, why=f"the norm at %{part.name} spans all heads, not one")
    if not is_call(part, aten.slice.Tensor):
        return _Branch(shape, why=f"%{value.name} is not a part of one fused projection")
    cut = cut_of(part)
    if cut is None or len(sizes(cut[0])) != 2 or shape[1:] != sizes(value)[1:]:
        return _Branch(shape, why=f"%{part.name} is not cut along the width of a projection")
    source, start = cut
    return _Branch(shape, source, start, start + sizes(part)[1], norm, eps, rope)


def _mismatch(q: _Branch, k: _Branch, v: _Branch) -> str:
    """Why the three branches are not one fused operator; empty when they are."""
    for branch in (q, k, v):
        if branch.why:
            return branch.why
    width = sizes(q.source)[1]
    norms = [norm for norm in (q.norm, k.norm) if norm is not None]
    checks = (
        (q.source is k.source is v.source, "q, k and v are parts of different values"),
        ((q.start, q.stop, k.stop, v.stop) == (0, k.start, v.start, width), "q, k and v do not lie in this order"),
        (q.shape[2] == k.shape[2] == v.shape[2], "keys and values differ in width"),
        (k.shape == v.shape, "keys and values differ in heads"),
        (len(norms) != 1 and q.eps == k.eps, "only one of q and k is normalised, or with another eps"),
        (all(is_weight(norm) for norm in norms), "the weight of a norm is computed"),
        (q.rope == k.rope, "q and k are rotated by different tables"),
        (v.norm is None and v.rope is None, "v is normalised or rotated"),
    )
    return next((why for holds, why in checks if not holds), "")
