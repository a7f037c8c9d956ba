"""Encoders: attention over whole sequences is right and blind to the neighbours; the row that stands for a sequence."""

import math

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, batch, relative_error
from xllm.kernels import cpu

SHAPES = [
    pytest.param(4, 4, 64, 64, {}, id="multi-head"),
    pytest.param(6, 2, 24, 24, {}, id="grouped-odd-dim"),
    pytest.param(3, 1, 5, 40, {}, id="wider-values"),
    pytest.param(2, 2, 32, 32, {"window": 1}, id="window-1"),
    pytest.param(4, 2, 32, 32, {"window": 33}, id="window-33"),
    pytest.param(2, 1, 16, 16, {"softcap": 5.0}, id="softcap"),
]
LENGTHS = (1, 15, 64, 65, 200)


def attend(run: KernelRun, q, k, v, lengths, window=0, softcap=0.0):
    """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] of all sequences together."""
    out = np.full((*q.shape[:2], v.shape[2]), np.nan, np.float32)
    state = np.full((*q.shape[:2], 2), np.nan, np.float32)
    ints = {"q_heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[2], "value_dim": v.shape[2]}
    run(
        "encode_attention.f32",
        {"q": q, "k": k, "v": v, "out": out, "scratch_state": state},
        {**ints, "window": window},
        {"scale": 1 / math.sqrt(q.shape[2]), "softcap": softcap},
        step=batch(lengths),
    )
    return out


def oracle(q, k, v, window=0, softcap=0.0):
    """One sequence, in float64."""
    share, at = q.shape[1] // k.shape[1], np.arange(len(q))
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for h in range(q.shape[1]):
        scores = q[:, h].astype(np.float64) @ k[:, h // share].astype(np.float64).T / math.sqrt(q.shape[2])
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if window:
            scores = np.where(np.abs(at[:, None] - at) < window, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = weights @ v[:, h // share] / weights.sum(-1, keepdims=True)
    return out


def inputs(rng, tokens, q_heads, kv_heads, dim, value_dim):
    shapes = ((tokens, q_heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, value_dim))
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize(("q_heads", "kv_heads", "dim", "value_dim", "options"), SHAPES)
def test_attention(run, rng, q_heads, kv_heads, dim, value_dim, options):
    """Against the oracle, and each sequence alone gives the bits it gives among others."""
    q, k, v = inputs(rng, sum(LENGTHS), q_heads, kv_heads, dim, value_dim)
    together = attend(run, q, k, v, LENGTHS, **options)
    begin = 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        begin += length
        assert relative_error(together[part], oracle(q[part], k[part], v[part], **options)) < 2e-6
        alone = attend(run, q[part].copy(), k[part].copy(), v[part].copy(), [length], **options)
        assert alone.tobytes() == together[part].tobytes()


def test_large_scores_neither_overflow_nor_lose_the_rest(run, rng):
    q, k, v = inputs(rng, 130, 1, 1, 16, 16)
    q *= 60
    assert relative_error(attend(run, q, k, v, [130]), oracle(q, k, v)) < 2e-5


@pytest.mark.parametrize("width", [5, 48])
def test_rows_that_stand_for_a_sequence(run, rng, width):
    lengths = (1, 7, 40)
    ends = np.cumsum(lengths)
    x = rng.standard_normal((sum(lengths), width), np.float32)
    for kernel, expected in (
        ("first_rows.f32", [x[end - n] for end, n in zip(ends, lengths, strict=True)]),
        ("mean_rows.f32", [x[end - n : end].astype(np.float64).mean(0) for end, n in zip(ends, lengths, strict=True)]),
    ):
        out = np.full((3, width), np.nan, np.float32)
        step = batch(lengths, last=ends - 1)
        run(kernel, {"index": "last", "table": x, "out": out}, {"width": width}, step=step, which=cpu.LOGIT_ROWS)
        assert relative_error(out, np.array(expected)) < 1e-6


@pytest.mark.parametrize("width", [3, 64, 100])
def test_l2_normalize(run, rng, width):
    x = rng.standard_normal((9, width), np.float32)
    x[4] = 0
    out = np.full_like(x, np.nan)
    run("l2_normalize.f32", {"x": x, "out": out}, {"width": width}, {"eps": 1e-12}, rows=9)
    norm = np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-12)
    assert relative_error(out, x / norm) < 1e-6
    assert not out[4].any()


@pytest.mark.parametrize(
    ("change", "message"), [({"q_heads": 3}, "multiple"), ({"window": -1}, "window"), ({"value_dim": 0}, "positive")]
)
def test_bad_sizes_are_refused(run, change, message):
    ints = {"q_heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8, "window": 0} | change
    args = dict.fromkeys(("q", "k", "v", "out", "scratch_state"), np.zeros(64, np.float32))
    with pytest.raises(cpu.KernelError, match=message):
        run("encode_attention.f32", args, ints, {"scale": 1.0, "softcap": 0.0})
