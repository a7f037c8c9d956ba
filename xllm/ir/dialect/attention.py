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
    keys, values = kv_heads * q.shape[2], kv_heads * value_dim
    held = _held(kv, layer, slots, positions, keys + values).to(q.dtype)
    heads = held[..., :keys].unflatten(-1, (kv_heads, -1)), held[..., keys:].unflatten(-1, (kv_heads, -1))
    return _attend(q, *heads, positions, sinks, scale, window, softcap)


def _held(kv: Tensor, layer: int, slots: Tensor, positions: Tensor, width: int) -> Tensor:
    """What each token's slot holds up to the last position of the step: [T, P, width]."""
    upto = int(positions.max()) + 1 if len(positions) else 0
    return kv[layer, slots.long(), :upto, :width]


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, sinks: Tensor | None, scale: float, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D] against keys [T, P, Hkv, D] and values [T, P, Hkv, Dv] of its own slot: [T, Hq, Dv]."""
    (tokens, heads, _), (upto, kv_heads) = q.shape, keys.shape[1:3]
    scores = torch.einsum("tgqd,tsgd->tgqs", q.unflatten(1, (kv_heads, -1)), keys).reshape(tokens, heads, upto) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(upto, device=q.device)
    seen = at[None] <= positions[:, None]
    if window:
        seen &= at[None] > positions[:, None] - window
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.reshape(1, heads, 1).expand(tokens, heads, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :upto].unflatten(1, (kv_heads, -1))
    # Rows that were never written may hold anything: they carry weight zero and must not turn into NaN.
    values = torch.where(seen[:, :, None, None], values, 0.0)
    return torch.einsum("tgqs,tsgd->tgqd", weights, values).flatten(1, 2)


def _latent_write_shape(kv: Tensor, latent: Tensor, rope: Tensor, positions: Tensor, slots: Tensor, layer: int) -> None:
    for name, value in (("rotated part", rope), ("positions", positions), ("slots", slots)):
        require(f"tokens of the {name}", value.shape[0], latent.shape[0])
    require("rank of the latent and of the rotated part", (latent.dim(), rope.dim()), (2, 2))


@operator(
    "latent_write(Tensor(a!) kv, Tensor latent, Tensor rope, Tensor positions, Tensor slots, int layer) -> ()",
    shape=_latent_write_shape,
)
def latent_write(kv: Tensor, latent: Tensor, rope: Tensor, positions: Tensor, slots: Tensor, layer: int) -> None:
    """Stores the key of token t, latent [T, C] then rope [T, R], at kv[layer, slots[t], positions[t]]."""
    row = torch.cat((latent, rope), dim=1)
    kv[layer, slots.long(), positions.long(), : row.shape[1]] = row.to(kv.dtype)


def _latent_attention_shape(
    kv: Tensor, q_latent: Tensor, q_rope: Tensor, positions: Tensor, slots: Tensor, layer: int, scale: float,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    require("positions", tuple(positions.shape), tuple(q_latent.shape[:1]))
    require("slots", tuple(slots.shape), tuple(q_latent.shape[:1]))
    require("rank of the query's parts", (q_latent.dim(), q_rope.dim()), (3, 3))
    require("tokens and heads of the rotated part", tuple(q_rope.shape[:2]), tuple(q_latent.shape[:2]))
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format)


@operator(
    "latent_attention(Tensor kv, Tensor q_latent, Tensor q_rope, Tensor positions, Tensor slots, int layer,"
    " float scale, int window, float softcap) -> Tensor",
    shape=_latent_attention_shape,
)
def latent_attention(
    kv: Tensor,
    q_latent: Tensor,
    q_rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention whose keys are [latent C | rope R], one for all heads, and whose values are their first C numbers.

    The query of head h is [q_latent [T, H, C] | q_rope [T, H, R]]; scale, window and softcap as in `attention`. Returns
    the weighted latents [T, H, C].
    """
    latent = q_latent.shape[2]
    q = torch.cat((q_latent, q_rope), dim=-1)
    keys = _held(kv, layer, slots, positions, q.shape[2]).to(q.dtype).unsqueeze(2)
    return _attend(q, keys, keys[..., :latent], positions, None, scale, window, softcap)


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
