"""int8 and int4 weights: what is packed is what is multiplied, near float64 of it, and the same bits for any rows."""

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, aligned, batch, kind_of, pack, relative_error, unpacked, unpacked_and_scales
from xllm.kernels import cpu

STORAGES = ("int8.32", "int8.128", "int8.row", "int4.32", "int4.64", "int4.row")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 97, 130)
# Activations of int8 weights have 16 bits, those of int4 have 8.
LIMIT = {8: 1e-4, 4: 1e-2}


def linear(run, x, packed, bias, n, storage):
    kind, k = kind_of(storage), x.shape[1]
    out, scratch = np.full((len(x), n), np.nan, np.float32), aligned(kind.row_bytes(k) * len(x))
    args = {"x": x, "weight": packed, "bias": bias, "out": out, "scratch_rows": scratch}
    run(f"linear.i{kind.bits}", args, {"k": k, "n": n, "group": kind.group}, rows=len(x))
    return out


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (23, 37), (100, 1030)])
def test_steps_are_the_nearest_of_their_scale(rng, storage, n, k):
    weight, kind = rng.standard_normal((n, k), np.float32), kind_of(storage)
    got, scales = unpacked_and_scales(pack(weight, storage), n, k, storage)
    least, most = (-127, 127) if kind.bits == 8 else (-8, 7)
    # A product with the inverse may fall on the other side of a tie by a rounding.
    assert (np.abs(np.clip(weight / scales, least, most) - got / scales) < 0.50001).all()
    assert relative_error(got, weight) < {8: 0.01, 4: 0.16}[kind.bits]


def test_int4_leaves_less_than_rounding_by_the_greatest(rng):
    weight = rng.standard_normal((64, 1024), np.float32)
    groups = weight.reshape(64, -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    plain = (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(weight.shape)
    packed = unpacked(pack(weight, "int4.32"), 64, 1024, "int4.32")
    assert relative_error(packed, weight) < 0.93 * relative_error(plain, weight)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_grid_is_taken_as_it_is(rng, storage):
    kind, n, k = kind_of(storage), 33, 256
    most = 127 if kind.bits == 8 else 7
    steps = rng.integers(-most - 1, most + 1, (n, k)).astype(np.int8)  # the lowest too, as most quantisers write it
    groups = k // kind.group if kind.group else 1
    scales = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16).astype(np.float32)
    want = steps.reshape(n, groups, -1) * scales[:, :, None]
    packed = cpu.pack_grid(steps, scales, storage)
    assert packed is not None and np.array_equal(unpacked(packed, n, k, storage), want.reshape(n, k))
    for other in (scales + np.float32(1e-6), np.full_like(scales, 65536), np.full_like(scales, np.inf)):
        assert cpu.pack_grid(steps, other, storage) is None  # float16 does not hold them


def test_weights_beyond_the_scales_are_refused(rng):
    with pytest.raises(cpu.KernelError, match="too large"):
        cpu.pack_panels(np.full((1, 32), 1e9, np.float32), "int8.32")
    for storage in ("int8.32", "int4.32"):
        weight = rng.standard_normal((2, 32), np.float32)
        for place, poison in ((0, np.nan), (7, np.nan), (31, -np.inf)):
            spoiled = weight.copy()
            spoiled[1, place] = poison
            with pytest.raises(cpu.KernelError, match="not finite"):
                cpu.pack_panels(spoiled, storage)
    with pytest.raises(cpu.KernelError, match=r"int8\.32"):
        cpu.packed_bytes(1, 1, "int8.33")
    with pytest.raises(cpu.KernelError, match=r"\[4, 0\]"):
        cpu.packed_bytes(4, 0, "int8.row")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (37, 23), (64, 64), (1030, 100)])
def test_matches_float64(run, rng, storage, k, n):
    packed = pack(rng.standard_normal((n, k), np.float32), storage)
    held, bias = unpacked(packed, n, k, storage).astype(np.float64), rng.standard_normal(n, np.float32)
    for rows in (1, 3, 6, 97):
        x = rng.standard_normal((rows, k), np.float32)
        want = x.astype(np.float64) @ held.T + bias
        assert relative_error(linear(run, x, packed, bias, n, storage), want) < LIMIT[kind_of(storage).bits]


@pytest.mark.parametrize("storage", STORAGES)
def test_bits_do_not_depend_on_rows_or_threads(run, rng, storage):
    k, n = 1103, 70
    packed = pack(rng.standard_normal((n, k), np.float32), storage)
    x = rng.standard_normal((max(ROWS), k), np.float32)
    whole = linear(run, x, packed, None, n, storage)
    for rows in ROWS:
        assert np.array_equal(linear(run, np.ascontiguousarray(x[-rows:]), packed, None, n, storage), whole[-rows:])
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(linear(KernelRun(alone), x, packed, None, n, storage), whole)


@pytest.mark.parametrize("storage", ["int8.32", "int4.32"])
def test_a_step_without_rows_writes_nothing(run, storage):
    """The head of a step in which nobody's next token is due."""
    kind, out, scratch = kind_of(storage), np.full((1, 16), 7, np.float32), aligned(kind_of(storage).row_bytes(32))
    args = {"x": np.ones((1, 32), np.float32), "weight": pack(np.ones((16, 32), np.float32), storage)}
    args |= {"bias": None, "out": out, "scratch_rows": scratch}
    ints = {"k": 32, "n": 16, "group": kind.group}
    run(f"linear.i{kind.bits}", args, ints, step=batch([5], last=[]), which=cpu.LOGIT_ROWS)
    assert (out == 7).all()


@pytest.mark.parametrize("storage", ["int8.32", "int4.32"])
def test_a_poisoned_row_stays_alone_and_zeros_give_zeros(run, rng, storage):
    x = rng.standard_normal((9, 40), np.float32)
    packed = pack(rng.standard_normal((33, 40), np.float32), storage)
    x[2] = 0
    clean = linear(run, x, packed, None, 33, storage)
    assert (clean[2] == 0).all()
    for poison in (np.nan, np.inf):
        x[4, 7] = poison
        spoiled = linear(run, x, packed, None, 33, storage)
        assert np.isnan(spoiled[4]).all()
        assert np.array_equal(np.delete(spoiled, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("storage", STORAGES)
def test_embeddings_are_rows_of_what_is_packed(run, rng, storage):
    vocab, width, kind = 50, 70, kind_of(storage)
    packed = pack(rng.standard_normal((vocab, width), np.float32), storage)
    ids, out = np.array([49, 0, 16, 15], np.int64), np.empty((4, width), np.float32)
    args = {"ids": ids, "weight": packed, "out": out}
    run(f"lookup.i{kind.bits}", args, {"vocab": vocab, "width": width, "group": kind.group}, rows=4)
    assert np.array_equal(out, unpacked(packed, vocab, width, storage)[ids])


FMA_LEVELS = [level for level in cpu.levels() if level != "x86-64-v2"]


@pytest.mark.skipif(len(FMA_LEVELS) < 2, reason="one level with FMA here")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rows", "k"), [(1, 300), (5, 64), (8, 300), (9, 1000), (20, 300), (97, 600), (200, 1100)])
def test_levels_agree_to_the_bit(rng, storage, rows, k):
    """Whole numbers have no rounding, wherever they are summed; what is left needs FMA, which v2 has not."""
    packed, x = pack(rng.standard_normal((50, k), np.float32), storage), rng.standard_normal((rows, k), np.float32)
    results = []
    for level in FMA_LEVELS:
        with cpu.Runner(2, level) as runner:
            results.append(linear(KernelRun(runner), x, packed, None, 50, storage))
    assert all(np.array_equal(results[0], result) for result in results[1:])
