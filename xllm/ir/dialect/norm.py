"""Normalisation over the last dimension."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    shape=lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    shape=lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + residual and its norm: (rms_norm(s, weight), s)."""
    total = x + residual
    return torch.ops.xllm.rms_norm(total, weight, eps), total
