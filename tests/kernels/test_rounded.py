"""linear_rounded: rows rounded to bfloat16 or int8, right to float32 rounding, the same bits for any rows."""

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, aligned, bf16_round, kind_of, pack, relative_error, rounded, unpacked
from xllm.kernels import cpu

STORAGES = ("bfloat16", "int8.32", "int8.128", "int8.row", "int4.32", "int4.128", "int4.row")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 25, 97, 200)
SIZES = [(1, 1), (37, 23), (64, 64), (1030, 100), (515, 17), (4133, 33)]  # the last: more than one block of inputs
FMA_LEVELS = [level for level in cpu.levels() if level != "x86-64-v2"]


def linear(run, x, packed, bias, n, storage):
    k, kind = x.shape[1], cpu.quantised(storage)
    out, scratch = np.full((len(x), n), np.nan, np.float32), aligned(cpu.rows_bytes(k, storage, rounded=True) * len(x))
    args = {"x": x, "weight": packed, "bias": bias, "out": out, "scratch_rows": scratch}
    ints = {"k": k, "n": n, **({"group": kind.group} if kind else {})}
    run(kernel_of(storage), args, ints, rows=len(x))
    return out


def kernel_of(storage):
    """Beside one scale for an output, a row has one too; beside int4 it always has."""
    name = "linear_rounded_row" if storage == "int8.row" else "linear_rounded"
    return f"{name}.{ {'bfloat16': 'bf16', 'int8': 'i8', 'int4': 'i4'}[storage.partition('.')[0]] }"


def one_scale(storage):
    return storage == "int8.row" or storage.startswith("int4")


def held(packed, weight, storage):
    """The weight as it is stored, float64."""
    n, k = weight.shape
    return (rounded(weight, storage) if storage == "bfloat16" else unpacked(packed, n, k, storage)).astype(np.float64)


def as_rounded(x, storage):
    """Rows as the kernel should take them: bf16, or steps of the greatest over 127, of every 32 inputs or of a row."""
    if storage == "bfloat16":
        return bf16_round(x)
    k = x.shape[1]
    groups = np.pad(x, ((0, 0), (0, -k % 32))).reshape(len(x), -1, -k // 32 * -32 if one_scale(storage) else 32)
    most = np.abs(groups).max(-1, keepdims=True)
    steps = np.rint(groups * np.divide(127, most, where=most > 0, out=np.zeros_like(most)).astype(np.float32))
    return (steps * (most / np.float32(127))).reshape(len(x), -1)[:, :k]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_matches_float64_of_rounded_rows(run, rng, storage, k, n):
    weight, bias = rng.standard_normal((n, k), np.float32), rng.standard_normal(n, np.float32)
    packed = pack(weight, storage)
    for rows in (1, 3, 6, 7, 97):
        x = rng.standard_normal((rows, k), np.float32)
        want = as_rounded(x, storage).astype(np.float64) @ held(packed, weight, storage).T
        assert relative_error(linear(run, x, packed, bias, n, storage), want + bias) < 2e-6
        assert relative_error(linear(run, x, packed, None, n, storage), want) < 2e-6


@pytest.mark.parametrize("storage", STORAGES)
def test_bits_do_not_depend_on_rows_or_threads(run, rng, storage):
    """More panels than a unit has, an odd k beyond what is rounded at once."""
    k, n = 1103, 650
    packed = pack(rng.standard_normal((n, k), np.float32), storage)
    bias, x = rng.standard_normal(n, np.float32), rng.standard_normal((max(ROWS), k), np.float32)
    whole = linear(run, x, packed, bias, n, storage)
    for rows in ROWS:
        assert np.array_equal(linear(run, np.ascontiguousarray(x[-rows:]), packed, bias, n, storage), whole[-rows:])
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(linear(KernelRun(alone), x, packed, bias, n, storage), whole)


def test_bits_of_long_rows_do_not_depend_on_rows(run, rng):
    """So long that even a few rows are rounded in parts."""
    k = 9001
    packed, x = pack(rng.standard_normal((5, k), np.float32), "bfloat16"), rng.standard_normal((13, k), np.float32)
    whole = linear(run, x, packed, None, 5, "bfloat16")
    for rows in (1, 2, 6):
        assert np.array_equal(linear(run, x[:rows], packed, None, 5, "bfloat16"), whole[:rows])


@pytest.mark.parametrize("storage", ["bfloat16", "int8.32", "int8.row", "int4.32", "int4.128"])
@pytest.mark.parametrize("k", [40, 41])
def test_a_poisoned_row_stays_alone_and_zeros_give_zeros(run, rng, storage, k):
    x = rng.standard_normal((9, k), np.float32)
    packed = pack(rng.standard_normal((33, k), np.float32), storage)
    x[2] = 0
    clean = linear(run, x, packed, None, 33, storage)
    assert (clean[2] == 0).all()
    for poison in (np.nan, np.inf):
        x[4, k - 1] = poison
        spoiled = linear(run, x, packed, None, 33, storage)
        assert not np.isfinite(spoiled[4]).any()
        assert np.array_equal(np.delete(spoiled, 4, 0), np.delete(clean, 4, 0))


@pytest.mark.parametrize("storage", ["int8.row", "int4.row"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_longest_row_under_one_scale_is_summed_exactly(run, storage, sign):
    """The greatest steps throughout: beyond this length sums of int32 would not hold those of int8, and it is
    refused."""
    k = 1 << 17
    packed, x = pack(np.full((2, k), sign, np.float32), storage), np.ones((1, k), np.float32)
    want = held(packed, np.ones((2, k)), storage).sum(1)
    assert relative_error(linear(run, x, packed, None, 2, storage), want) < 1e-6
    with pytest.raises(cpu.KernelError, match="131072"):
        linear(run, np.ones((1, k + 1), np.float32), packed, None, 2, storage)


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_a_row_of_any_length_are_summed_exactly(run, sign):
    k = (1 << 17) + 1
    packed, x = pack(np.full((2, k), sign, np.float32), "int4.128"), np.ones((1, k), np.float32)
    want = held(packed, np.ones((2, k)), "int4.128").sum(1)
    assert relative_error(linear(run, x, packed, None, 2, "int4.128"), want) < 1e-4  # 1,025 sums in float32


def test_rows_are_rounded_to_nearest_even(run):
    """Products with one: what comes out is the rounded number. Numbers below the normal ones may become zero."""
    one, tie = np.float32(1), np.float32(2.0**-8)
    x = np.array([one + tie, one + 3 * tie, -one - tie, one + tie * 1.01, 3.4e38, np.inf, 1e-40], np.float32)[:, None]
    out = linear(run, x, pack(np.ones((1, 1), np.float32), "bfloat16"), None, 1, "bfloat16")
    assert np.array_equal(out[:6], bf16_round(x[:6]))
    assert out[6] in (0, bf16_round(x[6]))


def test_weights_of_a_neighbour_do_not_leak_into_an_odd_input(run, rng):
    """A pair of inputs whose second is missing lies beside the first input of the next sixteen outputs."""
    weight = rng.standard_normal((32, 7), np.float32)
    weight[16:, 0] = np.inf
    out = linear(run, rng.standard_normal((3, 7), np.float32), pack(weight, "bfloat16"), None, 32, "bfloat16")
    assert np.isfinite(out[:, :16]).all()


def test_pairs_need_a_place(run):
    """Where the machine multiplies pairs of bfloat16, rows go there first; a plan without one is refused, not run."""
    args = {"x": np.ones((9, 32), np.float32), "weight": pack(np.ones((16, 32), np.float32), "bfloat16"), "bias": None}
    given = {**args, "out": np.full((9, 16), np.nan, np.float32)}
    if run.runner.level.endswith(("-bf16", "-amx")):
        with pytest.raises(cpu.KernelError, match="compile the model again"):
            run("linear_rounded.bf16", given, {"k": 32, "n": 16}, rows=9)
    else:
        run("linear_rounded.bf16", given, {"k": 32, "n": 16}, rows=9)
        assert (given["out"] == 32).all()


@pytest.mark.skipif(len(FMA_LEVELS) < 2, reason="one level with FMA here")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rows", "k"), [(1, 300), (5, 300), (16, 1000), (97, 601), (200, 1100)])
def test_levels_agree(rng, storage, rows, k):
    """To the bit with integers; of bfloat16, those that multiply it sum in an order of their own."""
    packed, x = pack(rng.standard_normal((50, k), np.float32), storage), rng.standard_normal((rows, k), np.float32)
    results = {}
    for level in FMA_LEVELS:
        with cpu.Runner(2, level) as runner:
            results[level] = linear(KernelRun(runner), x, packed, None, 50, storage)
    first = next(iter(results.values()))
    for level, result in results.items():
        if storage == "bfloat16" and level.endswith(("-bf16", "-amx")):
            assert relative_error(result, first) < 1e-6
        else:
            assert np.array_equal(result, first)


def test_rows_of_bytes_take_no_more_than_is_said():
    for storage in STORAGES[1:]:
        for k in (1, 31, 32, 1000):
            padded = kind_of(storage).padded(k)
            taken = 2 * padded + padded // 32 * 8 if storage.startswith("int8") else padded + (1 + padded // 32) * 4
            assert kind_of(storage).row_bytes(k, rounded=True) >= taken
