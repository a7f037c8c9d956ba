"""Rotary position embedding (arXiv 2104.09864) from tables of cosines and sines."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator


@operator(
    "rope(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved) -> Tensor",
    shape=lambda x, cos, sin, rotary_dim, interleaved: torch.empty_like(x, memory_format=torch.contiguous_format),
)
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
