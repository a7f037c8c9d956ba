import numpy as np
import pytest

from tests.kernels.oracle import layer_norm, relative_error, rms_norm


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


@pytest.mark.parametrize("width", [1, 8, 33, 128, 1024, 3001])
@pytest.mark.parametrize("heads", [1, 3])
def test_layer_norm(run, rng, width, heads):
    """With one weight for all rows and with one for each head; far from zero, where a mean of squares would cancel."""
    x = rng.standard_normal((8 * heads, width), np.float32) * 3 + np.float32(50)
    weight, bias = (rng.standard_normal((heads, width), np.float32) for _ in range(2))
    out, mean = np.full_like(x, np.nan), np.full((8 * heads, 1), np.nan, np.float32)
    ints = {"width": width, "heads": heads}
    for scale, shift in ((weight, bias), (weight, None), (None, None)):
        run("layer_norm.f32", {"x": x, "weight": scale, "bias": shift, "out": out}, ints, {"eps": 1e-5}, rows=8 * heads)
        full, moved = (None if part is None else np.tile(part, (8, 1)) for part in (scale, shift))
        assert np.abs(out - layer_norm(x, full, moved, 1e-5)).max() < 1e-5 * max(1, np.abs(weight).max())
    run("mean.f32", {"x": x, "out": mean}, {"width": width}, rows=8 * heads)
    assert relative_error(mean, x.astype(np.float64).mean(-1, keepdims=True)) < 3e-7
