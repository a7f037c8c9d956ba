import numpy as np
import pytest

from tests.kernels.oracle import batch, pack, rounded
from xllm.kernels import cpu


@pytest.mark.parametrize(("suffix", "dtype"), [("f32", "float32"), ("bf16", "bfloat16")])
def test_embedding(run, rng, suffix, dtype):
    vocab, width = 37, 50
    weight, ids = rng.standard_normal((vocab, width), np.float32), [0, 36, 15, 16, 8, 7, 31, 32]
    out = np.full((len(ids), width), np.nan, np.float32)
    args = {"ids": "ids", "weight": pack(weight, dtype), "out": out}
    run(f"embedding.{suffix}", args, {"vocab": vocab, "width": width}, step=batch([len(ids)], ids=ids))
    assert np.array_equal(out, rounded(weight, suffix)[ids])


@pytest.mark.parametrize(("suffix", "dtype"), [("f32", "float32"), ("bf16", "bfloat16")])
def test_lookup(run, rng, suffix, dtype):
    """By int64 of a function; a number that is no row gives NaN and reads nothing."""
    weight, ids = rng.standard_normal((37, 50), np.float32), np.array([0, 36, 15, 37, -1, 1 << 40, 16])
    out = np.zeros((len(ids), 50), np.float32)
    args = {"ids": ids, "weight": pack(weight, dtype), "out": out}
    run(f"lookup.{suffix}", args, {"vocab": 37, "width": 50}, which=(0, 0, len(ids)))
    good = [0, 1, 2, 6]
    assert np.array_equal(out[good], rounded(weight, suffix)[ids[good]]) and np.isnan(out[3:6]).all()


def test_rows(run, rng):
    table = rng.standard_normal((20, 13), np.float32)
    out, step = np.empty((4, 13), np.float32), batch([4], starts=[7])
    run("rows.f32", {"index": "positions", "table": table, "out": out}, {"width": 13}, step=step)
    assert np.array_equal(out, table[7:11])
    picked = np.empty((2, 13), np.float32)
    step = batch([2, 1], last=[2, 0])
    run("rows.f32", {"index": "last", "table": table, "out": picked}, {"width": 13}, step=step, which=cpu.LOGIT_ROWS)
    assert np.array_equal(picked, table[[2, 0]])
