import numpy as np
import pytest

from tests.kernels.oracle import relative_error, rms_norm


@pytest.mark.parametrize("width", [1, 8, 33, 128, 1024, 3001])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_norms(run, rng, width, rows):
    x, residual = (rng.standard_normal((rows, width), np.float32) * 3 for _ in range(2))
    weight = rng.standard_normal(width, np.float32)
    out, fused, total = (np.full((rows, width), np.nan, np.float32) for _ in range(3))
    ints, floats = {"width": width}, {"eps": 1e-6}
    run("rms_norm.f32", {"x": x, "weight": weight, "out": out}, ints, floats, rows=rows)
    assert relative_error(out, rms_norm(x, weight, 1e-6)) < 3e-7

    args = {"x": x, "residual": residual, "weight": weight, "out": fused, "sum": total}
    run("add_rms_norm.f32", args, ints, floats, rows=rows)
    assert np.array_equal(total, x + residual)
    run("rms_norm.f32", {"x": total, "weight": weight, "out": out}, ints, floats, rows=rows)
    assert np.array_equal(fused, out), "fused and plain give the same bits"

    one = np.empty((1, width), np.float32)
    for row in {0, rows - 1}:
        run("rms_norm.f32", {"x": total[row].copy(), "weight": weight, "out": one}, ints, floats, rows=1)
        assert np.array_equal(one[0], out[row])
