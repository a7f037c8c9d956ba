"""Normalisation over the last dimension."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require


def _norm_shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    require("weight of the norm", tuple(weight.shape), tuple(x.shape[-1:]))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_norm_shape(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    require("residual", tuple(residual.shape), tuple(x.shape))
    return _norm_shape(x, weight, eps), torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", shape=_norm_shape)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", shape=_add_norm_shape
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum s = x + residual and its norm: (rms_norm(s, weight), s)."""
    total = x + residual
    return torch.ops.xllm.rms_norm(total, weight, eps), total
