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


def _mixed_shape(
    fixed: Tensor, mixed: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, positions: Tensor,
    slots: Tensor, layer: int, offset: int, k_heads: int, key_dim: int, scale: float, eps: float, beta_scale: float,
) -> Tensor:  # fmt: skip
    require("rank of the decay", a.dim(), 2)
    require("beta", tuple(b.shape), tuple(a.shape))
    require("a_log", tuple(a_log.shape), tuple(a.shape[1:]))
    require("dt_bias", tuple(dt_bias.shape), tuple(a.shape[1:]))
    heads, rest = a.shape[1], mixed.shape[1] - 2 * k_heads * key_dim
    require("tokens of the values", mixed.shape[0], a.shape[0])
    require("value heads left over by key heads", heads % k_heads, 0)
    if rest < heads or rest % heads:
        raise ValueError(f"{rest} columns are not the values of {heads} heads")
    _require_tokens(mixed, positions, slots)
    _require_span(fixed, offset, key_dim * rest)
    return mixed.new_empty((mixed.shape[0], heads, rest // heads))


@operator(
    "gated_delta_mixed(Tensor(a!) fixed, Tensor mixed, Tensor a, Tensor b, Tensor a_log, Tensor dt_bias,"
    " Tensor positions, Tensor slots, int layer, int offset, int k_heads, int key_dim, float scale, float eps,"
    " float beta_scale) -> Tensor",
    shape=_mixed_shape,
)
def gated_delta_mixed(
    fixed: Tensor,
    mixed: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    positions: Tensor,
    slots: Tensor,
    layer: int,
    offset: int,
    k_heads: int,
    key_dim: int,
    scale: float,
    eps: float,
    beta_scale: float,
) -> Tensor:
    """`gated_delta` on what layers have: queries, keys and values side by side in mixed [T, 2 Hk D + Hv Dv].

    The decay is -exp(a_log) softplus(a + dt_bias), beta is beta_scale sigmoid(b); a, b [T, Hv], a_log, dt_bias [Hv].
    """
    heads, keys = a.shape[1], k_heads * key_dim
    q, k, v = mixed.split((keys, keys, mixed.shape[1] - 2 * keys), dim=1)
    q, k, v = q.unflatten(1, (k_heads, key_dim)), k.unflatten(1, (k_heads, key_dim)), v.unflatten(1, (heads, -1))
    decay = -a_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    beta = beta_scale * torch.sigmoid(b)
    place = (positions, slots, layer, offset)
    return torch.ops.xllm.gated_delta(fixed, q, k, v.contiguous(), decay, beta, *place, scale, eps)
