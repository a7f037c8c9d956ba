"""Causal convolution and the gated delta rule against float64, and the same bits however a sequence is cut."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oracle import ACTIVATIONS, KernelRun, aligned, batch, relative_error
from xllm.kernels import cpu

LENGTHS = (37, 1, 18)  # of three sequences in one step
CUTS = {"whole": (), "token by token": tuple(range(1, 37)), "uneven": (1, 16, 17, 30)}
EPS = 1e-6


def silu(x: np.ndarray) -> np.ndarray:
    return ACTIVATIONS["silu"](x)


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, act: str) -> np.ndarray:
    """x [T, C], weight [C, K] of one sequence, in float64."""
    taps = weight.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x.astype(np.float64)])
    out = np.sum([padded[j : j + len(x)] * weight[:, j] for j in range(taps)], axis=0)
    out = out if bias is None else out + bias
    return ACTIVATIONS[act](out) if act else out


def delta(q, k, v, decay, beta, scale, eps) -> np.ndarray:
    """q, k [T, Hk, D], v [T, Hv, Dv], decay, beta [T, Hv] of one sequence, in float64."""
    q, k, v, decay, beta = (part.astype(np.float64) for part in (q, k, v, decay, beta))
    share = v.shape[1] // q.shape[1]
    if eps:
        q, k = (part / np.sqrt((part * part).sum(-1, keepdims=True) + eps) for part in (q, k))
    q, k = (np.repeat(part, share, 1) for part in (q * scale, k))
    state, out = np.zeros((v.shape[1], q.shape[2], v.shape[2])), np.zeros_like(v)
    for t in range(len(v)):
        state *= np.exp(decay[t])[:, None, None]
        update = (v[t] - np.einsum("hkv,hk->hv", state, k[t])) * beta[t][:, None]
        state += k[t][:, :, None] * update[:, None]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    return out


def delta_of_each(q, k, v, decay, beta, scale, eps) -> np.ndarray:
    """The same of sequences that stand one after the other."""
    cut = zip(split(q), split(k), split(v), split(decay), split(beta), strict=True)
    return np.concatenate([delta(*parts, scale, eps) for parts in cut])


def in_steps(run: KernelRun, kernel: str, inputs, weights, out_width: int, ints, floats, cuts) -> np.ndarray:
    """All sequences through steps cut at the same tokens; rows of inputs and result stand sequence after sequence."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    back = -(-ints["back"] // 64) * 64
    spans = [aligned(back + 64, fill=0xFF) for _ in LENGTHS]  # NaN: nothing may be read that was not written
    bases = [span[back:] for span in spans]
    result = np.zeros((sum(LENGTHS), out_width), np.float32)
    for begin, end in zip((0, *cuts), (*cuts, max(LENGTHS)), strict=True):
        live = [n for n, length in enumerate(LENGTHS) if begin < length]
        rows = [np.arange(starts[n] + begin, starts[n] + min(end, LENGTHS[n])) for n in live]
        taken = np.concatenate(rows)
        given = {name: np.ascontiguousarray(array[taken]) for name, array in inputs.items()}
        out = np.full((len(taken), out_width), np.nan, np.float32)
        step = batch([len(part) for part in rows], [begin] * len(live), [bases[n] for n in live])
        run(kernel, {**given, **weights, "out": out}, ints, floats, step=step)
        result[taken] = out
    return result


@pytest.mark.parametrize("channels", [5, 48, 300])
@pytest.mark.parametrize(("act", "taps", "biased"), [("silu", 4, False), ("", 2, True), ("gelu_tanh", 3, True)])
def test_causal_conv(run, rng, channels, act, taps, biased):
    x = rng.standard_normal((sum(LENGTHS), channels), np.float32)
    weight = rng.standard_normal((channels, taps), np.float32)
    bias = rng.standard_normal(channels, np.float32) if biased else None
    ints = {"back": 4 * (16 + channels * (taps - 1)), "offset": 16, "channels": channels, "taps": taps}
    kernel = f"causal_conv_{act}.f32" if act else "causal_conv.f32"
    given = {"weight": weight, "bias": bias}
    results = [in_steps(run, kernel, {"x": x}, given, channels, ints, {}, cuts) for cuts in CUTS.values()]
    want = np.concatenate([conv(part, weight, bias, act) for part in split(x)])
    assert relative_error(results[0], want) < 3e-7
    assert all(np.array_equal(results[0], other) for other in results[1:]), "the cut changes nothing"


@pytest.mark.parametrize(
    ("k_heads", "v_heads", "key_dim", "value_dim"), [(2, 4, 16, 40), (1, 1, 5, 3), (1, 2, 128, 64)]
)
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_gated_delta(run, rng, k_heads, v_heads, key_dim, value_dim, eps):
    inputs = delta_inputs(rng, k_heads, v_heads, key_dim, value_dim)
    q, k, v, decay, beta = inputs.values()
    keys, values = k_heads * key_dim, v_heads * value_dim
    ints = {
        "back": 4 * (32 + values * key_dim), "offset": 32, "k_heads": k_heads, "v_heads": v_heads, "key_dim": key_dim,
        "value_dim": value_dim, "q_start": 0, "q_stride": keys, "k_start": 0, "k_stride": keys, "v_start": 0,
        "v_stride": values,
    }  # fmt: skip
    floats = {"scale": key_dim**-0.5, "eps": eps, "beta_scale": 1.0}
    results = [in_steps(run, "gated_delta.f32", inputs, {}, values, ints, floats, cuts) for cuts in CUTS.values()]
    shaped = (q.reshape(-1, k_heads, key_dim), k.reshape(-1, k_heads, key_dim), v.reshape(-1, v_heads, value_dim))
    want = delta_of_each(*shaped, decay, beta, floats["scale"], eps).reshape(-1, values)
    assert relative_error(results[0], want) < 2e-6
    assert all(np.array_equal(results[0], other) for other in results[1:]), "the cut changes nothing"


def test_gated_delta_of_raw_factors_inside_one_row(run, rng):
    """Query, key and value lie in one row, decay and beta are made from what projections give."""
    k_heads, v_heads, key_dim, value_dim = 2, 4, 16, 24
    inputs = delta_inputs(rng, k_heads, v_heads, key_dim, value_dim)
    q, k, v, raw_decay, raw_beta = inputs.values()
    raw_decay, raw_beta = (8 * rng.standard_normal(part.shape).astype(np.float32) for part in (raw_decay, raw_beta))
    a_log, dt_bias = rng.standard_normal(v_heads, np.float32), rng.standard_normal(v_heads, np.float32)
    mixed = np.concatenate([q, k, v], axis=1)
    keys, values = k_heads * key_dim, v_heads * value_dim
    width = 2 * keys + values
    ints = {
        "back": 4 * values * key_dim, "offset": 0, "k_heads": k_heads, "v_heads": v_heads, "key_dim": key_dim,
        "value_dim": value_dim, "q_start": 0, "q_stride": width, "k_start": keys, "k_stride": width,
        "v_start": 2 * keys, "v_stride": width,
    }  # fmt: skip
    floats = {"scale": key_dim**-0.5, "eps": EPS, "beta_scale": 2.0}
    given = {"q": mixed, "k": mixed, "v": mixed, "decay": raw_decay, "beta": raw_beta}
    weights = {"a_log": a_log, "dt_bias": dt_bias}
    results = [in_steps(run, "gated_delta.f32", given, weights, values, ints, floats, cuts) for cuts in CUTS.values()]
    decay = -np.exp(a_log.astype(np.float64)) * np.logaddexp(0.0, raw_decay.astype(np.float64) + dt_bias)
    beta = 2.0 / (1.0 + np.exp(-raw_beta.astype(np.float64)))
    shaped = (q.reshape(-1, k_heads, key_dim), k.reshape(-1, k_heads, key_dim), v.reshape(-1, v_heads, value_dim))
    want = delta_of_each(*shaped, decay, beta, floats["scale"], EPS).reshape(-1, values)
    assert relative_error(results[0], want) < 2e-6
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"back": 0}, "does not fit"),
        ({"offset": 1}, "does not fit"),
        ({"offset": -1}, "negative"),
        ({"taps": 0}, "taps"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(run, changed, why):
    ints = {"back": 4 * 3 * 8, "offset": 0, "channels": 8, "taps": 4} | changed
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(cpu.KernelError, match=why):
        run("causal_conv.f32", {"x": x, "weight": np.zeros((8, 4), np.float32), "bias": None, "out": x}, ints)


def split(array: np.ndarray) -> list[np.ndarray]:
    return np.split(array, np.cumsum(LENGTHS)[:-1])


def delta_inputs(rng, k_heads: int, v_heads: int, key_dim: int, value_dim: int) -> dict[str, np.ndarray]:
    tokens = sum(LENGTHS)
    q, k = (rng.standard_normal((tokens, k_heads * key_dim), np.float32) / np.float32(key_dim**0.5) for _ in range(2))
    v = rng.standard_normal((tokens, v_heads * value_dim), np.float32)
    decay = -np.abs(rng.standard_normal((tokens, v_heads), np.float32))
    beta = rng.random((tokens, v_heads), np.float32)
    return {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}
