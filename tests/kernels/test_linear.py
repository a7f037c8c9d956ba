"""linear and heads_linear: right to float32 rounding; the same bits whatever the rows, their order and the threads."""

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, aligned, batch, pack, relative_error, rounded
from xllm.kernels import cpu

DTYPES = {"f32": "float32", "bf16": "bfloat16"}
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 25, 97, 200)


def linear(run, x, packed, bias, n, suffix):
    out = np.full((len(x), n), np.nan, np.float32)
    args = {"x": x, "weight": packed, "bias": bias, "out": out}
    if suffix == "bf16":
        args["scratch_rows"] = aligned(cpu.rows_bytes(x.shape[1], DTYPES[suffix]) * len(x))
    run(f"linear.{suffix}", args, {"k": x.shape[1], "n": n}, rows=len(x))
    return out


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (37, 23), (64, 64), (1030, 100), (515, 17), (2077, 33)])
def test_matches_float64(run, rng, suffix, k, n):
    weight = rng.standard_normal((n, k), np.float32)
    bias = rng.standard_normal(n, np.float32)
    packed = pack(weight, DTYPES[suffix])
    for rows in ROWS:
        x = rng.standard_normal((rows, k), np.float32)
        want = x.astype(np.float64) @ rounded(weight, suffix).T.astype(np.float64)
        assert relative_error(linear(run, x, packed, bias, n, suffix), want + bias) < 2e-6
        assert relative_error(linear(run, x, packed, None, n, suffix), want) < 2e-6


@pytest.mark.parametrize("suffix", DTYPES)
def test_bits_do_not_depend_on_rows_or_threads(run, rng, suffix):
    k, n = 2103, 70
    packed = pack(rng.standard_normal((n, k), np.float32), DTYPES[suffix])
    bias = rng.standard_normal(n, np.float32)
    x = rng.standard_normal((max(ROWS), k), np.float32)
    whole = linear(run, x, packed, bias, n, suffix)
    for rows in ROWS:
        part = np.ascontiguousarray(x[-rows:])
        assert np.array_equal(linear(run, part, packed, bias, n, suffix), whole[-rows:])
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(linear(KernelRun(alone), x, packed, bias, n, suffix), whole)


def test_a_poisoned_row_stays_alone(run, rng):
    x = rng.standard_normal((9, 40), np.float32)
    packed = pack(rng.standard_normal((33, 40), np.float32), "float32")
    clean = linear(run, x, packed, None, 33, "f32")
    x[4] = np.nan
    spoiled = linear(run, x, packed, None, 33, "f32")
    assert np.isnan(spoiled[4]).all()
    assert np.array_equal(np.delete(spoiled, 4, 0), np.delete(clean, 4, 0))


def test_rows_s(run, rng):
    """A call with rows = S works on S rows of a step that has more tokens."""
    x = rng.standard_normal((2, 24), np.float32)
    packed, out = pack(rng.standard_normal((16, 24), np.float32), "float32"), np.full((3, 16), 7, np.float32)
    step = batch([5], last=[1, 4])
    args = {"x": x, "weight": packed, "bias": None, "out": out}
    run("linear.f32", args, {"k": 24, "n": 16}, step=step, which=cpu.LOGIT_ROWS)
    assert np.array_equal(out[:2], linear(run, x, packed, None, 16, "f32"))
    assert (out[2] == 7).all()


class Heads:
    """Random weights [heads, n, k] as heads_linear wants them."""

    def __init__(self, rng, heads, n, k, suffix):
        self.suffix, self.ints = suffix, {"k": k, "n": n, "heads": heads}
        weight = rng.standard_normal((heads, n, k), np.float32)
        self.exact = rounded(weight, suffix).astype(np.float64)
        parts = [pack(part, DTYPES[suffix]) for part in weight]
        self.packed = aligned(sum(part.size for part in parts))
        self.packed[:] = np.concatenate(parts)

    def __call__(self, run, x):
        out = np.full((*x.shape[:2], self.ints["n"]), np.nan, np.float32)
        run(f"heads_linear.{self.suffix}", {"x": x, "weight": self.packed, "out": out}, self.ints, rows=len(x))
        return out


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize(("heads", "k", "n"), [(1, 1, 1), (3, 37, 23), (5, 64, 64), (2, 1030, 100), (4, 515, 17)])
def test_heads_match_float64(run, rng, suffix, heads, k, n):
    product = Heads(rng, heads, n, k, suffix)
    for rows in (1, 2, 7, 25, 97):
        x = rng.standard_normal((rows, heads, k), np.float32)
        want = np.einsum("thk,hnk->thn", x.astype(np.float64), product.exact)
        assert relative_error(product(run, x), want) < 2e-6


@pytest.mark.parametrize("suffix", DTYPES)
def test_bits_of_heads_do_not_depend_on_rows_or_threads(run, rng, suffix):
    product = Heads(rng, 3, 70, 1103, suffix)
    x = rng.standard_normal((97, 3, 1103), np.float32)
    whole = product(run, x)
    for rows in (1, 2, 7, 25):
        assert np.array_equal(product(run, np.ascontiguousarray(x[-rows:])), whole[-rows:])
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(product(KernelRun(alone), x), whole)


def test_a_poisoned_head_stays_alone(run, rng):
    product = Heads(rng, 3, 33, 40, "f32")
    x = rng.standard_normal((9, 3, 40), np.float32)
    clean = product(run, x)
    x[4, 1] = np.nan
    spoiled = product(run, x)
    assert np.isnan(spoiled[4, 1]).all()
    spoiled[4, 1] = clean[4, 1]
    assert np.array_equal(spoiled, clean)


FMA_LEVELS = [level for level in cpu.levels() if level != "x86-64-v2"]


@pytest.mark.skipif(len(FMA_LEVELS) < 2, reason="needs two levels with FMA")
@pytest.mark.parametrize("suffix", DTYPES)
def test_levels_with_fma_agree_to_the_bit(rng, suffix):
    """All but the matrix unit, which sums bf16 in an order of its own: it stays as near as they are to each other's."""
    k, n = 300, 50
    packed = pack(rng.standard_normal((n, k), np.float32), DTYPES[suffix])
    x = rng.standard_normal((20, k), np.float32)
    results = {}
    for level in FMA_LEVELS:
        with cpu.Runner(2, level) as runner:
            results[level] = linear(KernelRun(runner), x, packed, None, n, suffix)
    first = next(iter(results.values()))
    for level, result in results.items():
        if suffix == "bf16" and level.endswith("-amx"):
            assert relative_error(result, first) < 1e-6
        else:
            assert np.array_equal(result, first)


def test_parts_of_a_row_lose_nothing(run, rng):
    """Numbers whose lowest bits matter: a product of one input is exact, whatever it is split into."""
    packed = pack(np.ones((1, 1), np.float32), "bfloat16")
    x = (rng.standard_normal((64, 1)) * 10.0 ** rng.integers(-20, 20, (64, 1))).astype(np.float32)
    assert np.array_equal(linear(run, x, packed, None, 1, "bf16"), x)
    x[5], x[6], x[7] = np.inf, -np.inf, np.nan
    assert np.array_equal(linear(run, x, packed, None, 1, "bf16"), x, equal_nan=True)
