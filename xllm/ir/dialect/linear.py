"""Products with weights and row gathers."""

import torch
from torch import Tensor

from xllm.ir.dialect.library import operator, require


def linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require("width of the weight", tuple(weight.shape[1:]), (x.shape[-1],))
    if bias is not None:
        require("bias", tuple(bias.shape), tuple(weight.shape[:1]))
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", shape=linear_shape)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N]."""
    return torch.nn.functional.linear(x, weight, bias)


def _heads_linear_shape(x: Tensor, weight: Tensor) -> Tensor:
    require("heads and width of the weight", (weight.shape[0], weight.shape[2]), tuple(x.shape[-2:]))
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@operator("heads_linear(Tensor x, Tensor weight) -> Tensor", shape=_heads_linear_shape)
def heads_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H, K] with a weight of its own for each head, [H, N, K]: [..., H, N]."""
    return torch.einsum("...hk,hnk->...hn", x, weight).contiguous()


@operator(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    shape=lambda ids, weight: weight.new_empty((*ids.shape, weight.shape[1])),
)
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of the vocabulary weight [V, H] for ids [T]: [T, H]."""
    return weight[ids.long()]


@operator(
    "rows(Tensor table, Tensor index) -> Tensor",
    shape=lambda table, index: table.new_empty((*index.shape, *table.shape[1:])),
)
def rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a plain table [R, W], an activation or a constant, for index [M]: [M, W]."""
    return table[index.long()]
