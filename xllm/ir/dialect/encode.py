"""What encoders need: attention that sees the whole sequence, and the row that stands for a sequence.

These operators need every token of a sequence in one step: position 0 is in it, and nothing is kept for another step.
"""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require

WHOLE_SEQUENCE = ("encode_attention", "first_rows", "mean_rows")  # operators that no step may cut a sequence for


def _attention_shape(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    for name, value in (("query", q), ("key", k), ("value", v)):
        require(f"rank of the {name}", value.dim(), 3)
        require(f"tokens of the {name}", value.shape[0], q.shape[0])
    require("positions", tuple(positions.shape), tuple(q.shape[:1]))
    require("slots", tuple(slots.shape), tuple(q.shape[:1]))
    require("width of the keys", k.shape[2], q.shape[2])
    require("heads of the values", v.shape[1], k.shape[1])
    require("query heads left over by KV heads", q.shape[1] % k.shape[1], 0)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@operator(
    "encode_attention(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor slots, float scale, int window,"
    " float softcap) -> Tensor",
    shape=_attention_shape,
)
def encode_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """q [T, Hq, D] of every token against k [T, Hkv, D] and v [T, Hkv, Dv] of all tokens of its slot: [T, Hq, Dv].

    window 0 means all, otherwise those nearer than `window` positions on either side; softcap 0 means none, otherwise
    scores become softcap * tanh(score / softcap). Query head h reads KV head h // (Hq / Hkv).
    """
    tokens, heads, dim = q.shape
    grouped = q.reshape(tokens, k.shape[1], heads // k.shape[1], dim)
    scores = torch.einsum("tgqd,sgd->gqts", grouped, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = slots[:, None] == slots[None]
    if window:
        seen = seen & ((positions[:, None] - positions[None]).abs() < window)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return torch.einsum("gqts,sgd->tgqd", weights, v).reshape(tokens, heads, v.shape[2])


def _row_shape(x: Tensor, positions: Tensor, last: Tensor) -> Tensor:
    require("rank", x.dim(), 2)
    require("positions", tuple(positions.shape), tuple(x.shape[:1]))
    return x.new_empty((last.shape[0], x.shape[1]))


@operator("first_rows(Tensor x, Tensor positions, Tensor last) -> Tensor", shape=_row_shape)
def first_rows(x: Tensor, positions: Tensor, last: Tensor) -> Tensor:
    """The first row of x [T, H] of each sequence whose last row is last[s]: [S, H]."""
    end = last.long()
    return x[end - positions[end].long()]


@operator("mean_rows(Tensor x, Tensor positions, Tensor last) -> Tensor", shape=_row_shape)
def mean_rows(x: Tensor, positions: Tensor, last: Tensor) -> Tensor:
    """The mean of the rows of x [T, H] of each sequence whose last row is last[s]: [S, H]."""
    row, end = torch.arange(x.shape[0], device=x.device), last.long()[:, None]
    begin = end - positions[last.long()].long()[:, None]
    inside = ((row >= begin) & (row <= end)).to(x.dtype)
    return inside @ x / inside.sum(dim=1, keepdim=True)


def _same_shape(x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("l2_normalize(Tensor x, float eps) -> Tensor", shape=_same_shape)
def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) over the last dimension."""
    return torch.nn.functional.normalize(x, dim=-1, eps=eps)
