"""Attention of functions: right against float64 in both layouts, under every mask; what is hidden does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, relative_error
from xllm.kernels import cpu
from xllm.targets.cpu.bounds import reach

SHAPES = [
    pytest.param(2, 4, 4, 64, 64, 17, 17, {}, id="multi-head"),
    pytest.param(3, 6, 2, 24, 40, 5, 130, {}, id="grouped, wider values, three blocks"),
    pytest.param(1, 3, 1, 5, 7, 1, 64, {"softcap": 5.0}, id="one query, softcap"),
    pytest.param(2, 4, 2, 16, 16, 70, 70, {"causal": 1}, id="causal"),
    pytest.param(1, 2, 2, 16, 16, 9, 140, {"causal": 1}, id="causal behind a past"),
]
MASKS = {
    "none": None,
    "whole": lambda b, h, q, s: (b, h, q, s),
    "keys": lambda b, h, q, s: (b, 1, 1, s),
    "shared": lambda b, h, q, s: (1, 1, q, s),
    "queries": lambda b, h, q, s: (b, 1, q, 1),
}


def attend(run: KernelRun, q, k, v, mask, heads_first: bool, causal: int = 0, softcap: float = 0.0) -> np.ndarray:
    """q [B, H, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv]; handed over as `heads_first` says."""
    given = [np.ascontiguousarray(x if heads_first else x.swapaxes(1, 2)) for x in (q, k, v)]
    out = np.full((*given[0].shape[:3], v.shape[3]), np.nan, np.float32)
    strides = [0, 0, 0, 0]
    if mask is not None:
        mask = np.ascontiguousarray(mask)
        steps = [step // mask.itemsize for step in mask.strides]
        strides = [step if size > 1 else 0 for step, size in zip(steps, mask.shape, strict=True)]
    ints = {
        "q_heads": q.shape[1], "kv_heads": k.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3],
        "queries": q.shape[2], "keys": k.shape[2], "heads_first": int(heads_first), "causal": causal,
        **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_key"), strides, strict=True)),
    }  # fmt: skip
    kernel = "sdpa_seen.f32" if mask is not None and mask.dtype == bool else "sdpa.f32"
    args = {"q": given[0], "k": given[1], "v": given[2], "mask": mask, "out": out}
    rows, once = reach(kernel, ints)
    for name, array in args.items():
        if array is not None:  # the check of bounds knows what the kernel touches, neither more nor less
            assert rows.get(name, 0) * len(q) + once.get(name, 0) == array.nbytes, name
    run(kernel, args, ints, {"scale": 0.3, "softcap": softcap}, which=(0, 0, len(q)))
    return out if heads_first else out.swapaxes(1, 2)


def oracle(q, k, v, mask, causal: int = 0, softcap: float = 0.0) -> np.ndarray:
    share, ahead = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (x.astype(np.float64).repeat(share, 1) for x in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(2, 3) * 0.3
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[2:], bool), ahead), scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - top)
    return weights @ v / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def inputs(rng, batch, q_heads, kv_heads, dim, value_dim, queries, keys) -> list[np.ndarray]:
    shapes = ((q_heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    return [rng.standard_normal((batch, *shape), np.float32) for shape in shapes]


def masks(rng, name: str, kind: str, *sizes: int) -> Any:
    """Random; the first query of the first batch sees nothing."""
    if MASKS[name] is None:
        return None
    seen = rng.random(MASKS[name](*sizes)) < 0.6
    seen[0, :, 0] = False
    return seen if kind == "bool" else np.where(seen, rng.standard_normal(seen.shape), -np.inf).astype(np.float32)


@pytest.mark.parametrize("heads_first", [True, False], ids=["heads-first", "tokens-first"])
@pytest.mark.parametrize(
    ("name", "kind"), [("none", "")] + [(n, k) for n in list(MASKS)[1:] for k in ("bool", "float")]
)
@pytest.mark.parametrize(("batch", "q_heads", "kv_heads", "dim", "value_dim", "queries", "keys", "options"), SHAPES)
def test_sdpa(run, rng, batch, q_heads, kv_heads, dim, value_dim, queries, keys, options, name, kind, heads_first):
    q, k, v = inputs(rng, batch, q_heads, kv_heads, dim, value_dim, queries, keys)
    mask = masks(rng, name, kind, batch, q_heads, queries, keys)
    got, want = attend(run, q, k, v, mask, heads_first, **options), oracle(q, k, v, mask, **options)
    assert relative_error(got, want) < 2e-6
    if mask is not None:
        assert not got[0, :, 0].any()


def test_a_batch_and_a_query_give_the_same_bits_alone(run, rng):
    q, k, v = inputs(rng, 3, 4, 2, 16, 24, 13, 100)
    together = attend(run, q, k, v, None, True)
    assert attend(run, q[1:2], k[1:2], v[1:2], None, True).tobytes() == together[1:2].tobytes()
    assert attend(run, q[:, :, 5:6], k, v, None, False).tobytes() == together[:, :, 5:6].tobytes()


def test_the_lowest_number_hides_as_softmax_says(run, rng):
    """Where every score is the lowest float, all weights are alike, as torch computes it."""
    q, k, v = inputs(rng, 1, 1, 1, 8, 8, 2, 70)
    mask = np.zeros((1, 1, 2, 70), np.float32)
    mask[..., 0, :] = np.finfo(np.float32).min
    got = attend(run, q, k, v, mask, True)
    assert np.allclose(got[0, 0, 0], v[0, 0].mean(0), atol=1e-5)
    assert relative_error(got[0, 0, 1:], oracle(q, k, v, None)[0, 0, 1:]) < 2e-6


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"q_heads": 3}, "multiple"),
        ({"mask_key": 2}, "side by side"),
        ({"queries": -1}, "negative"),
        ({"causal": 2}, "0 or 1"),
    ],
)
def test_refuses(run, rng, wrong, why):
    array = np.zeros(64, np.float32)
    names = ("kv_heads", "head_dim", "value_dim", "queries", "keys", "q_heads")
    ints = {
        **dict.fromkeys(names, 2),
        **dict.fromkeys(("heads_first", "causal", "mask_batch", "mask_head", "mask_query", "mask_key"), 0),
    }
    with pytest.raises(cpu.KernelError, match=why):
        run("sdpa.f32", {"q": array, "k": array, "v": array, "mask": None, "out": array}, {**ints, **wrong},
            {"scale": 1.0, "softcap": 0.0}, which=(0, 0, 1))  # fmt: skip
