"""Gates of feed-forward blocks."""

import torch
from torch import Tensor
from torch.nn import functional

from xllm.ir.dialect.library import operator
from xllm.ir.dialect.linear import linear, linear_shape

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def _gated_shape(x: Tensor, act: str) -> Tensor:
    if act not in ACTIVATIONS or x.shape[-1] % 2:
        raise ValueError(f"{act} of {x.shape[-1]} channels is not one of {', '.join(ACTIVATIONS)} of two halves")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@operator("gated_act(Tensor x, str act) -> Tensor", shape=_gated_shape)
def gated_act(x: Tensor, act: str) -> Tensor:
    """x [..., 2W] holds gate then up: act(gate) * up, [..., W]. `act` is a key of ACTIVATIONS."""
    gate, up = torch.chunk(x, 2, dim=-1)
    return ACTIVATIONS[act](gate) * up


@operator(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    shape=lambda x, weight, bias, act: _gated_shape(linear_shape(x, weight, bias), act),
)
def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """x [..., K] times weight [2W, K] transposed, plus bias [2W], gate then up: act(gate) * up, [..., W]."""
    return gated_act(linear(x, weight, bias), act)
