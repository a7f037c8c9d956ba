import numpy as np
import pytest

from tests.kernels.oracle import ACTIVATIONS, FUNCTIONS


def spread(rng, rows, width):
    """Values of every size, the interesting small and large ones included."""
    x = rng.standard_normal((rows, width), np.float32) * rng.choice([1e-4, 0.3, 1, 4, 20], (rows, width))
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (2, 3072), (40, 1000)])
def test_activations(run, rng, name, rows, width):
    both = spread(rng, rows, 2 * width)
    gate, up = both[:, :width].astype(np.float64), both[:, width:]
    out, plain = (np.full((rows, width), np.nan, np.float32) for _ in range(2))
    run(f"gated_{name}.f32", {"x": both, "out": out}, {"width": width}, rows=rows)
    want = ACTIVATIONS[name](gate)
    # Near zero relative, in the flat tails absolute: 1 + erf and 1 + tanh cancel there, as they do in float32 anywhere.
    bound = 4e-7 * np.abs(want) + 2e-7 * np.minimum(np.abs(gate), 4)
    assert (np.abs(out - want * up) <= bound * np.abs(up) + 1e-30).all()

    run(f"{name}.f32", {"x": both[:, :width].copy(), "out": plain}, {"width": width}, rows=rows)
    assert (np.abs(plain - want) <= bound + 1e-30).all()
    assert np.array_equal(plain * up, out), "gated is plain times up, to the bit"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(run, name):
    x = np.array([[0, -0.0, 1e30, -1e30, 200, -200, 1e-38, np.nan, np.inf]], np.float32)
    out = np.empty_like(x)
    run(f"{name}.f32", {"x": x, "out": out}, {"width": x.shape[1]})
    assert np.allclose(out[0, :7], [0, 0, 1e30, 0, 200, 0, 0], rtol=1e-6, atol=1e-30)
    assert np.isnan(out[0, 7])
    assert out[0, 8] == np.inf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(run, rng, name):
    x = spread(rng, 5, 333)
    x = np.abs(x) + np.float32(1e-6) if name in ("sqrt", "rsqrt") else x
    out = np.full_like(x, np.nan)
    run(f"{name}.f32", {"x": x, "out": out}, {"width": x.shape[1]}, rows=len(x))
    want = FUNCTIONS[name](x.astype(np.float64))
    assert (np.abs(out - want) <= 3e-7 * np.abs(want) + 1e-30).all()


def test_clamp_keeps_what_is_no_number(run):
    x = np.array([[-3, -1, 0, 2, 5, np.nan, -np.inf, np.inf]], np.float32)
    out = np.empty_like(x)
    ints, both = {"width": 8, "has_low": 1, "has_high": 1}, {"low": -1.0, "high": 2.0}
    run("clamp.f32", {"x": x, "out": out}, ints, both)
    assert np.array_equal(out, np.clip(x, -1, 2), equal_nan=True)
    run("clamp.f32", {"x": x, "out": out}, {**ints, "has_low": 0}, both)
    assert np.array_equal(out, np.minimum(x, 2), equal_nan=True)
    run("clamp.f32", {"x": x, "out": out}, {**ints, "has_high": 0}, both)
    assert np.array_equal(out, np.maximum(x, -1), equal_nan=True)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (33, 1024)])
def test_arithmetic(run, rng, name, rows, width):
    a, b = (rng.standard_normal((rows, width), np.float32) for _ in range(2))
    out = np.full_like(a, np.nan)
    run(f"{name}.f32", {"a": a, "b": b, "out": out}, {"width": width}, rows=rows)
    assert np.array_equal(out, {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[name](a, b))
