"""Gates of feed-forward blocks."""

import torch
from torch import Tensor
from torch.nn import functional

from xllm.ir.dialect.library import operator

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@operator(
    "gated_act(Tensor x, str act) -> Tensor",
    shape=lambda x, act: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)
def gated_act(x: Tensor, act: str) -> Tensor:
    """x [..., 2W] holds gate then up: act(gate) * up, [..., W]. `act` is a key of ACTIVATIONS."""
    gate, up = torch.chunk(x, 2, dim=-1)
    return ACTIVATIONS[act](gate) * up
