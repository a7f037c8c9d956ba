"""Rotary position embedding (arXiv 2104.09864) from tables of cosines and sines."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require


def _rope_shape(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    require_tables(cos, sin, x.shape[0], rotary_dim)
    require("rank of the rotated value", x.dim(), 3)
    if rotary_dim % 2 or rotary_dim > x.shape[2]:
        raise ValueError(f"{rotary_dim} dimensions of heads of {x.shape[2]} cannot be rotated in pairs")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def require_tables(cos: Tensor, sin: Tensor, tokens: object, rotary_dim: int) -> None:
    """Raises ValueError unless cos and sin are [tokens, rotary_dim]."""
    for name, table in (("cos", cos), ("sin", sin)):
        require(name, tuple(table.shape), (tokens, rotary_dim))


@operator("rope(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved) -> Tensor", shape=_rope_shape)
def rope(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """Rotates the first `rotary_dim` of each head of x [T, H, D] by cos, sin [T, rotary_dim], one row per token.

    Plain style pairs dimension i with i + rotary_dim/2; interleaved style pairs 2i with 2i + 1.
    """
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = rotary_dim // 2
        partner = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    return torch.cat((turned * cos[:, None] + partner * sin[:, None], kept), dim=-1)
