"""Attention of a function: queries, keys and values side by side in memory, no state."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require


def _shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool, tokens_first: bool
) -> Tensor:
    require("ranks of query, key and value", (q.dim(), k.dim(), v.dim()), (4, 4, 4))
    (batch, heads, length, _), keys, values = (_heads_first(x.shape, tokens_first) for x in (q, k, v))
    require("batch, heads and length of the values", values[:3], keys[:3])
    require("width of the keys", k.shape[3], q.shape[3])
    require("batch of the keys", k.shape[0], batch)
    require("query heads left over by KV heads", heads % keys[1], 0)
    if mask is not None:
        torch.broadcast_shapes(mask.shape, (batch, heads, length, keys[2]))
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _heads_first(shape: torch.Size, tokens_first: bool) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1], shape[3]) if tokens_first else tuple(shape)


@operator(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float softcap, bool causal, bool tokens_first) "
    "-> Tensor",
    shape=_shape,
)
def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, causal: bool, tokens_first: bool
) -> Tensor:
    """q [B, H, L, D] against k [B, Hkv, S, D] and v [B, Hkv, S, Dv]: [B, H, L, Dv]; query head h reads h // (H / Hkv).

    tokens_first: all four have heads and tokens the other way round, [B, L, H, D] and so on. mask broadcasts to
    [B, H, L, S]: booleans say what is seen, floats are added to the scores, after the soft-cap (0 for none). causal:
    query i sees keys up to i + S - L. A query that sees nothing gives zeros.
    """
    if tokens_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1)
    weights = weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    made = weights @ v.repeat_interleave(share, 1)
    return made.transpose(1, 2).contiguous() if tokens_first else made
