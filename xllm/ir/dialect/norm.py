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


def _layer_norm_shape(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    for name, scale in (("weight", weight), ("bias", bias)):
        if scale is not None:
            require(f"{name} of the norm", tuple(scale.shape), tuple(x.shape[-scale.dim() :]))
    if weight is not None and bias is not None:
        require("bias of the norm", tuple(bias.shape), tuple(weight.shape))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", shape=_layer_norm_shape)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the last dimension, then weight and bias (arXiv 1607.06450).

    weight and bias [W], or [H, W] for a norm of each head of x [..., H, W] with numbers of its own.
    """
    centred = x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
