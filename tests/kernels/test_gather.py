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


def test_rows(run, rng):
    table = rng.standard_normal((20, 13), np.float32)
    out, step = np.empty((4, 13), np.float32), batch([4], starts=[7])
    run("rows.f32", {"index": "positions", "table": table, "out": out}, {"width": 13}, step=step)
    assert np.array_equal(out, table[7:11])
    picked = np.empty((2, 13), np.float32)
    step = batch([2, 1], last=[2, 0])
    run("rows.f32", {"index": "last", "table": table, "out": picked}, {"width": 13}, step=step, which=cpu.LOGIT_ROWS)
    assert np.array_equal(picked, table[[2, 0]])
