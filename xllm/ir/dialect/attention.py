"""Attention over the KV state, and the writes that fill it.

The state is declared, not allocated here: `kv` [layers, slots, tokens, width] in the torch bodies, keys of all KV heads
then values of all KV heads in the last dimension (width is that of the widest layer). A target chooses its own layout.
"""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require
from xllm.ir.dialect.rope import require_tables


def _write_shape(kv: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, layer: int) -> None:
    require("tokens and heads of the values", tuple(v.shape[:2]), tuple(k.shape[:2]))
    require("positions", tuple(positions.shape), tuple(k.shape[:1]))
    require("slots", tuple(slots.shape), tuple(k.shape[:1]))


@operator(
    "kv_write(Tensor(a!) kv, Tensor k, Tensor v, Tensor positions, Tensor slots, int layer) -> ()", shape=_write_shape
)
def kv_write(kv: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, layer: int) -> None:
    """Stores k [T, Hkv, D] and v [T, Hkv, Dv] of token t at kv[layer, slots[t], positions[t]]."""
    row = torch.cat((k.flatten(1), v.flatten(1)), dim=1)
    kv[layer, slots.long(), positions.long(), : row.shape[1]] = row.to(kv.dtype)


def _attention_shape(
    kv: Tensor, q: Tensor, positions: Tensor, slots: Tensor, sinks: Tensor | None, layer: int, kv_heads: int,
    value_dim: int, scale: float, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    require("positions", tuple(positions.shape), tuple(q.shape[:1]))
    require("slots", tuple(slots.shape), tuple(q.shape[:1]))
    require("rank of the query", q.dim(), 3)
    require("query heads left over by KV heads", q.shape[1] % kv_heads, 0)
    if sinks is not None:
        require("sinks", tuple(sinks.shape), tuple(q.shape[1:2]))
    return q.new_empty((q.shape[0], q.shape[1], value_dim))


@operator(
    "attention(Tensor kv, Tensor q, Tensor positions, Tensor slots, Tensor? sinks, int layer, int kv_heads,"
    " int value_dim, float scale, int window, float softcap) -> Tensor",
    shape=_attention_shape,
)
def attention(
    kv: Tensor,
    q: Tensor,
    positions: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    layer: int,
    kv_heads: int,
    value_dim: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q [T, Hq, D] of token t against positions max(0, p - window + 1)..p of its own slot: [T, Hq, Dv].

    window 0 means all; softcap 0 means none, otherwise scores become softcap * tanh(score / softcap); sinks [Hq] join
    the softmax denominator only. Grouped queries: query head h reads KV head h // (Hq / kv_heads).
    """
    tokens, heads, key_dim = q.shape
    upto = int(positions.max()) + 1 if tokens else 0
    held = kv[layer, slots.long(), :upto].to(q.dtype)
    keys = held[..., : kv_heads * key_dim].reshape(tokens, upto, kv_heads, key_dim)
    values = held[..., kv_heads * key_dim : kv_heads * (key_dim + value_dim)].reshape(tokens, upto, kv_heads, value_dim)
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, key_dim)
    scores = torch.einsum("tgqd,tsgd->tgqs", grouped, keys).reshape(tokens, heads, upto) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(upto, device=q.device)
    seen = at[None] <= positions[:, None]
    if window:
        seen &= at[None] > positions[:, None] - window
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.reshape(1, heads, 1).expand(tokens, heads, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :upto].reshape(tokens, kv_heads, heads // kv_heads, upto)
    # Rows that were never written may hold anything: they carry weight zero and must not turn into NaN.
    values = torch.where(seen[:, :, None, None], values, 0.0)
    return torch.einsum("tgqs,tsgd->tgqd", weights, values).reshape(tokens, heads, value_dim)


def _fused_shape(
    kv: Tensor, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    positions: Tensor, slots: Tensor, layer: int, q_heads: int, kv_heads: int, head_dim: int, rotary_dim: int,
    interleaved: bool, eps: float,
) -> Tensor:  # fmt: skip
    require("projection", tuple(qkv.shape), (qkv.shape[0], (q_heads + 2 * kv_heads) * head_dim))
    require("query heads left over by KV heads", q_heads % kv_heads, 0)
    require("positions", tuple(positions.shape), tuple(qkv.shape[:1]))
    require("slots", tuple(slots.shape), tuple(qkv.shape[:1]))
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            require(name, tuple(norm.shape), (head_dim,))
    if cos is not None and sin is not None:
        require_tables(cos, sin, qkv.shape[0], rotary_dim)
    else:
        require("tables that are missing", (cos is None) + (sin is None), 2)
    return qkv.new_empty((qkv.shape[0], q_heads, head_dim))


@operator(
    "qk_norm_rope_write(Tensor(a!) kv, Tensor qkv, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin,"
    " Tensor positions, Tensor slots, int layer, int q_heads, int kv_heads, int head_dim, int rotary_dim,"
    " bool interleaved, float eps) -> Tensor",
    shape=_fused_shape,
)
def qk_norm_rope_write(
    kv: Tensor,
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    layer: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    eps: float,
) -> Tensor:
    """All that stands between a fused projection and attention, in one pass over qkv [T, (Hq + 2 Hkv) D].

    Optional norms per head (q_norm, k_norm [D]), optional rope (cos, sin [T, rotary_dim]), the write of k and v.
    Returns q [T, Hq, D].
    """
    heads = qkv.reshape(qkv.shape[0], q_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None:
        q = torch.ops.xllm.rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = torch.ops.xllm.rms_norm(k, k_norm, eps)
    if cos is not None:
        q = torch.ops.xllm.rope(q, cos, sin, rotary_dim, interleaved)
        k = torch.ops.xllm.rope(k, cos, sin, rotary_dim, interleaved)
    torch.ops.xllm.kv_write(kv, k, v, positions, slots, layer)
    return q.contiguous()
