"""Layers that carry a state of fixed size from token to token: causal convolution and the gated delta rule.

The state is declared: `fixed` [layers, slots, floats], float32; an operator has its own span of a layer's floats,
from `offset` on. Tokens of one slot come in order of position; position 0 starts from zero, whatever the state holds.
"""

import torch
from torch import Tensor

from xllm.ir.dialect.activation import ACTIVATIONS
from xllm.ir.dialect.library import operator, require


def _require_tokens(x: Tensor, positions: Tensor, slots: Tensor) -> None:
    require("positions", tuple(positions.shape), tuple(x.shape[:1]))
    require("slots", tuple(slots.shape), tuple(x.shape[:1]))


def _require_span(fixed: Tensor, offset: int, floats: int) -> None:
    if offset < 0 or offset + floats > fixed.shape[2]:
        raise ValueError(f"floats {offset} to {offset + floats} leave a state of {fixed.shape[2]}")


def _conv_shape(
    fixed: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, slots: Tensor, layer: int,
    offset: int, act: str,
) -> Tensor:  # fmt: skip
    require("rank of the input", x.dim(), 2)
    require("weight", tuple(weight.shape), (x.shape[1], weight.shape[1]))
    if bias is not None:
        require("bias", tuple(bias.shape), tuple(x.shape[1:]))
    if act and act not in ACTIVATIONS:
        raise ValueError(f"{act} is not one of {', '.join(ACTIVATIONS)}")
    _require_tokens(x, positions, slots)
    _require_span(fixed, offset, x.shape[1] * (weight.shape[1] - 1))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(
    "causal_conv(Tensor(a!) fixed, Tensor x, Tensor weight, Tensor? bias, Tensor positions, Tensor slots, int layer,"
    " int offset, str act) -> Tensor",
    shape=_conv_shape,
)
def causal_conv(
    fixed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    layer: int,
    offset: int,
    act: str,
) -> Tensor:
    """Each channel of x [T, C] convolved with its own weight [C, K] over the last K tokens of its sequence: [T, C].

    The newest token meets weight[:, K - 1]. Keeps the last K - 1 inputs, [K - 1, C], oldest first. `act` is a key of
    ACTIVATIONS, or empty.
    """
    channels, taps = weight.shape
    held = fixed[layer, :, offset : offset + channels * (taps - 1)].unflatten(1, (taps - 1, channels))
    out = torch.empty_like(x)
    for token, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        past = torch.zeros_like(held[slot]) if position == 0 else held[slot]
        window = torch.cat((past, x[token : token + 1]))
        out[token] = (window * weight.t()).sum(0)
        held[slot] = window[1:]
    if bias is not None:
        out = out + bias
    return ACTIVATIONS[act](out) if act else out


def _delta_shape(
    fixed: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, positions: Tensor, slots: Tensor,
    layer: int, offset: int, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    require("rank of the values", v.dim(), 3)
    require("keys", tuple(k.shape), tuple(q.shape))
    require("tokens of the query", q.shape[0], v.shape[0])
    require("value heads left over by key heads", v.shape[1] % q.shape[1], 0)
    require("decay", tuple(decay.shape), tuple(v.shape[:2]))
    require("beta", tuple(beta.shape), tuple(v.shape[:2]))
    _require_tokens(v, positions, slots)
    _require_span(fixed, offset, v.shape[1] * q.shape[2] * v.shape[2])
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@operator(
    "gated_delta(Tensor(a!) fixed, Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor positions,"
    " Tensor slots, int layer, int offset, float scale, float eps) -> Tensor",
    shape=_delta_shape,
)
def gated_delta(
    fixed: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer: int,
    offset: int,
    scale: float,
    eps: float,
) -> Tensor:
    """The gated delta rule (arXiv 2412.06464): q, k [T, Hk, D], v [T, Hv, Dv], decay and beta [T, Hv] give [T, Hv, Dv].

    Per value head, token after token, S [D, Dv] of the sequence: S = exp(decay) S; S += k (beta (v - S^T k))^T; the
    result is S^T q. Value head h reads key head h // (Hv / Hk). eps > 0: q and k are first divided by
    sqrt(sum of squares + eps); q is then multiplied by `scale`. Keeps S of every value head, [Hv, D, Dv].
    """
    _, heads, width = v.shape
    share, key_dim = heads // q.shape[1], q.shape[2]
    if eps:
        q, k = (part * torch.rsqrt(part.pow(2).sum(-1, keepdim=True) + eps) for part in (q, k))
    q, k = (part.repeat_interleave(share, 1) for part in (q * scale, k))
    held = fixed[layer, :, offset : offset + heads * key_dim * width].unflatten(1, (heads, key_dim, width))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for token, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        state = torch.zeros_like(held[slot]) if position == 0 else held[slot] * decay[token].exp()[:, None, None]
        seen = torch.einsum("hkv,hk->hv", state, k[token])
        update = (v[token] - seen) * beta[token, :, None]
        held[slot] = state + k[token][:, :, None] * update[:, None]
        out[token] = torch.einsum("hkv,hk->hv", held[slot], q[token])
    return out
