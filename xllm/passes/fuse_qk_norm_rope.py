"""All that stands between the fused projection and attention, with the KV write, as one operator.

before:  %q = xllm.rope(xllm.rms_norm(reshape(%qkv[:, :a]), @q_norm), %cos, %sin)      after:  %q = xllm.qk_norm_rope_write(
         %k = xllm.rope(xllm.rms_norm(reshape(%qkv[:, a:b]), @k_norm), %cos, %sin)                 %kv, %qkv, @q_norm, @k_norm,
         %v = reshape(%qkv[:, b:])                                                                  %cos, %sin, …)
         xllm.kv_write(%kv, %k, %v, …)

Norms and rope are each optional but must be alike for query and key. Does not fire when the target lacks the kernel, when
the norm spans all heads, when the slices are not q, k, v of one value, or when keys and values differ in width.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, attention_pairs

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
        q, k, v = (_peel(end) for end in (attention.args[1], write.args[1], write.args[2]))  # pyright: ignore
        if why := _mismatch(q, k, v):
            return editor.miss(attention, why)
        kv, _, _, positions, slots, layer = write.args
        q_heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
        norms = (q.norm, k.norm) if q.norm is not None else (None, None)
        rope = q.rope or (None, None, head_dim, False)
        with editor.before(write):
            fused = editor.emit(
                xllm.qk_norm_rope_write.default,
                *(kv, q.source, *norms, *rope[:2], positions, slots, layer),
                *(q_heads, kv_heads, head_dim, rope[2], rope[3], q.eps),
                like=write,
            )
        attention.replace_input_with(attention.args[1], fused)  # pyright: ignore[reportArgumentType]
        editor.program.graph.erase_node(write)
        editor.hit(fused)


@dataclass(frozen=True)
class _Branch:
    """One of q, k, v traced back to its slice: what was applied on the way."""

    source: Any
    start: int
    stop: int
    shape: tuple[Any, ...]
    norm: Any = None
    eps: float = 0.0
    rope: tuple[Any, ...] | None = None
    why: str = ""


def _peel(value: fx.Node) -> _Branch:
    """rope?(rms_norm?(reshape(slice(source)))) taken apart; `why` says where it stopped being that."""
    shape = tuple(value.meta["val"].shape)
    rope = norm = None
    eps = 0.0
    if value.target is xllm.rope.default:
        value, *rest = value.args  # pyright: ignore[reportAssignmentType]
        rope = tuple(rest)
    if value.target is xllm.rms_norm.default:
        value, norm, eps = value.args  # pyright: ignore[reportAssignmentType]
        if tuple(value.meta["val"].shape[1:]) != shape[1:]:
            return _Branch(None, 0, 0, shape, why=f"the norm at {value.name} spans all heads, not one")
    if value.target is not aten.reshape.default or value.args[0].target is not aten.slice.Tensor:  # pyright: ignore
        return _Branch(None, 0, 0, shape, why=f"%{value.name} is not a part of one fused projection")
    source, axis, start, stop = value.args[0].args  # pyright: ignore
    if axis != -1:
        return _Branch(None, 0, 0, shape, why=f"%{value.name} is cut along axis {axis}")
    return _Branch(source, start, stop, shape, norm, eps, rope)  # pyright: ignore[reportArgumentType]


def _mismatch(q: _Branch, k: _Branch, v: _Branch) -> str:
    """Why the three branches are not one fused operator; empty when they are."""
    for branch in (q, k, v):
        if branch.why:
            return branch.why
    width = q.source.meta["val"].shape[1]
    checks = (
        (q.source is k.source is v.source, "q, k and v are parts of different values"),
        ((q.start, q.stop, k.stop, v.stop) == (0, k.start, v.start, width), "q, k and v do not lie in this order"),
        (q.shape[2] == k.shape[2] == v.shape[2], "keys and values differ in width"),
        ((q.norm is None) == (k.norm is None) and q.eps == k.eps, "only one of q and k is normalised, or with another eps"),
        (q.rope == k.rope, "q and k are rotated by different tables"),
        (v.norm is None and v.rope is None, "v is normalised or rotated"),
    )
    return next((why for holds, why in checks if not holds), "")
