"""Layers that carry a state of fixed size from token to token."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import TOKENS, Cost, KVLayout, Lowering, Operation, Refusal
from xllm.targets.cpu.rules import PLAIN, Reach, Rule, every_token, fixed_place, ints


def _causal_conv(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight, bias = op.args["x"], op.args["weight"], op.args["bias"]
    held = [part for part in (weight, bias) if part is not None]
    if not every_token(x) or x.dtype != "float32":
        return Refusal("it does not convolve [T, C]")
    if any(part.kind != "weight" for part in held):
        return Refusal("its weight is computed")
    channels, taps = ints(weight.shape)
    act = op.args["act"]
    return Lowering(
        f"causal_conv_{act}.f32" if act else "causal_conv.f32",
        {"x": x, "weight": weight, "bias": bias, "out": op.results[0]},
        {**fixed_place(op, kv), "offset": op.args["offset"], "channels": channels, "taps": taps},
        layouts={part.name: PLAIN for part in held},
        cost=Cost(TOKENS.times((2 * taps + 12) * channels), TOKENS.times(8 * channels)),
    )


def _gated_delta(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    q, k, v, decay, beta = (op.args[name] for name in ("q", "k", "v", "decay", "beta"))
    if not all(every_token(x) and x.dtype == "float32" for x in (q, k, v, decay, beta)):
        return Refusal("it does not work on float32 values of every token")
    (k_heads, key_dim), (v_heads, value_dim) = ints(k.shape[1:]), ints(v.shape[1:])
    keys, values = k_heads * key_dim, v_heads * value_dim
    places = {"q_start": 0, "q_stride": keys, "k_start": 0, "k_stride": keys, "v_start": 0, "v_stride": values}
    return Lowering(
        "gated_delta.f32",
        {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "a_log": None, "dt_bias": None, "out": op.results[0]},
        {**fixed_place(op, kv), "offset": op.args["offset"], **_heads(k_heads, v_heads, key_dim, value_dim), **places},
        {"scale": op.args["scale"], "eps": op.args["eps"], "beta_scale": 1.0},
        cost=_delta_cost(v_heads, key_dim, value_dim),
    )


def _gated_delta_mixed(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    mixed, a, b = (op.args[name] for name in ("mixed", "a", "b"))
    weights = {name: op.args[name] for name in ("a_log", "dt_bias")}
    if not all(every_token(x) and x.dtype == "float32" for x in (mixed, a, b)):
        return Refusal("it does not work on float32 values of every token")
    if any(weight.kind != "weight" for weight in weights.values()):
        return Refusal("its rates are computed")
    k_heads, key_dim, width = op.args["k_heads"], op.args["key_dim"], mixed.width
    v_heads, value_dim = ints(op.results[0].shape[1:])
    starts = {"q": 0, "k": k_heads * key_dim, "v": 2 * k_heads * key_dim}
    places = {
        f"{name}_{what}": size for name, at in starts.items() for what, size in (("start", at), ("stride", width))
    }
    return Lowering(
        "gated_delta.f32",
        {**dict.fromkeys(starts, mixed), "decay": a, "beta": b, **weights, "out": op.results[0]},
        {**fixed_place(op, kv), "offset": op.args["offset"], **_heads(k_heads, v_heads, key_dim, value_dim), **places},
        {name: op.args[name] for name in ("scale", "eps", "beta_scale")},
        layouts={weight.name: PLAIN for weight in weights.values()},
        cost=_delta_cost(v_heads, key_dim, value_dim),
    )


def _heads(k_heads: int, v_heads: int, key_dim: int, value_dim: int) -> dict[str, int]:
    return {"k_heads": k_heads, "v_heads": v_heads, "key_dim": key_dim, "value_dim": value_dim}


def _delta_cost(heads: int, key_dim: int, value_dim: int) -> Cost:
    """The state passes through the caches once for each token."""
    state = heads * key_dim * value_dim
    return Cost(TOKENS.times(8 * state), TOKENS.times(8 * state))


def _conv_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    channels, taps = sizes["channels"], sizes["taps"]
    once = {"weight": 4 * channels * taps, "bias": 4 * channels}
    return dict.fromkeys(("x", "out"), 4 * channels), once | _kept(sizes, channels * max(taps - 1, 0))


def _delta_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, keys = sizes["v_heads"], sizes["k_heads"] * sizes["key_dim"]
    values = heads * sizes["value_dim"]
    rows = {name: 4 * max(sizes[f"{name}_stride"], sizes[f"{name}_start"] + keys) for name in ("q", "k")}
    rows |= {"v": 4 * max(sizes["v_stride"], sizes["v_start"] + values), "out": 4 * values}
    once = dict.fromkeys(("a_log", "dt_bias"), 4 * heads)
    return rows | dict.fromkeys(("decay", "beta"), 4 * heads), once | _kept(sizes, values * sizes["key_dim"])


def _kept(sizes: Mapping[str, int], floats: int) -> dict[str, int]:
    """ "fixed": where what a call keeps ends, in bytes from the start of its layer."""
    return {"fixed": 4 * (sizes["offset"] + floats)}


RULES: Mapping[str, Rule] = {
    "xllm.causal_conv": _causal_conv,
    "xllm.gated_delta": _gated_delta,
    "xllm.gated_delta_mixed": _gated_delta_mixed,
}
REACH: Mapping[str, Reach] = {
    **dict.fromkeys(("causal_conv", "causal_conv_silu", "causal_conv_gelu", "causal_conv_gelu_tanh"), _conv_reach),
    "gated_delta": _delta_reach,
}
