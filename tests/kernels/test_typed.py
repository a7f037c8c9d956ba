"""Whole numbers, truths, choices, casts and picks, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.test_strided import sizes, view

TYPES = {"f32": np.float32, "i64": np.int64, "i32": np.int32, "u8": np.bool_}
TWO = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
FLOATS = ("add", "sub", "mul")
CONST = (0, 0, 1)  # a plan of a function: rows are a number


def numbers(rng, suffix, *shape):
    return rng.integers(-3, 4 if suffix != "u8" else 1, shape).astype(TYPES[suffix])


@pytest.mark.parametrize(
    ("name", "suffix"),  # sums and products of floats are in test_strided
    [(name, suffix) for name in TWO for suffix in ("f32", "i64", "i32") if suffix != "f32" or name not in FLOATS],
)
def test_two_operands(run, rng, name, suffix):
    """[5, 3, 7] by [3, 1], and by a number."""
    a, b = numbers(rng, suffix, 5, 3, 7), numbers(rng, suffix, 3, 1)
    want = TWO[name](a, b)
    out = np.full_like(want, 9)
    shared = {**sizes(1, 3, 7), **view("a", (0, 7, 1), 21), **view("out", (0, 7, 1), 21), "scaled": 0}
    floats, rows = {"a_number": 0.0, "b_number": 2.0}, (0, 0, 5)
    kernel = f"strided_{name}.{suffix}"
    run(kernel, {"a": a, "b": b, "out": out}, {**shared, **view("b", (0, 1, 0), 0)}, floats, which=rows)
    assert np.array_equal(out, want)
    run(kernel, {"a": a, "b": None, "out": out}, {**shared, **view("b", (0, 0, 0), 0)}, floats, which=rows)
    assert np.array_equal(out, TWO[name](a, TYPES[suffix](2)))


@pytest.mark.parametrize("name", ["and", "or", "xor", "eq", "ne"])
def test_truths(run, rng, name):
    a, b, out = numbers(rng, "u8", 6), numbers(rng, "u8", 6), np.zeros(6, np.bool_)
    ints = {**sizes(1, 1, 1), **view("a", (0, 0, 0), 1), **view("b", (0, 0, 0), 1), **view("out", (0, 0, 0), 1)}
    args = {"a": a, "b": b, "out": out}
    run(f"strided_{name}.u8", args, {**ints, "scaled": 0}, {"a_number": 0, "b_number": 0}, which=(0, 0, 6))
    wanted = {"and": a & b, "or": a | b, "xor": a ^ b, "eq": a == b, "ne": a != b}[name]
    assert np.array_equal(out, wanted)
    run("not.u8", {"x": a, "out": out}, {"width": 1}, which=(0, 0, 6))
    assert np.array_equal(out, ~a)


@pytest.mark.parametrize("suffix", TYPES)
def test_where_copies_joins_and_picks(run, rng, suffix):
    seen, a, b = numbers(rng, "u8", 4, 1, 9), numbers(rng, suffix, 4, 5, 9), numbers(rng, suffix, 1)
    out = np.zeros((4, 5, 9), TYPES[suffix])
    ints = {**sizes(1, 5, 9), **view("seen", (0, 0, 1), 9), **view("a", (0, 9, 1), 45), **view("b", (0, 0, 0), 0)}
    args = {"seen": seen, "a": a, "b": b, "out": out}
    run(f"strided_where.{suffix}", args, {**ints, **view("out", (0, 9, 1), 45), "scaled": 0}, which=(0, 0, 4))
    assert np.array_equal(out, np.where(seen, a, b))
    turned = np.zeros((9, 4, 5), TYPES[suffix])
    ints = {**sizes(1, 4, 5), **view("x", (0, 45, 9), 1), **view("out", (0, 5, 1), 20), "offset": 0, "scaled": 0}
    run(f"copy.{suffix}", {"x": a, "out": turned}, ints, which=(0, 0, 9))
    assert np.array_equal(turned, a.transpose(2, 0, 1))
    joined = np.zeros((4, 54), TYPES[suffix])
    widths = {"w0": 45, "w1": 0, "w2": 9, **{f"w{index}": 0 for index in range(3, 8)}}  # a part may be empty
    run(f"concat.{suffix}", {"x0": a, "x1": b, "x2": seen.astype(a.dtype), "out": joined}, widths, which=(0, 0, 4))
    assert np.array_equal(joined, np.concatenate([a.reshape(4, 45), seen.reshape(4, 9).astype(a.dtype)], 1))
    index, picked = np.array([4, 0, -1, 2]), np.zeros((4, 4, 9), TYPES[suffix])
    ints, args = {"count": 5, "picks": 4, "width": 9}, {"x": a, "out": picked}
    run(f"take.{suffix}", {**args, "index": index}, ints, which=(0, 0, 4))
    assert np.array_equal(picked, a[:, index])
    run(f"take.{suffix}", {**args, "index": np.array([0, 5, -6, 1 << 40])}, ints, which=(0, 0, 4))
    assert np.array_equal(picked[:, 0], a[:, 0])
    assert np.isnan(picked[:, 1:]).all() if suffix == "f32" else not picked[:, 1:].any(), "nothing is read there"


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("suffix", TYPES)
def test_casts(run, rng, suffix, to):
    x, out = numbers(rng, suffix, 50), np.zeros(50, TYPES[to])
    if suffix == "f32":
        x = x + np.float32(0.75)
    if suffix != to:
        run(f"cast_{to}.{suffix}", {"x": x, "out": out}, {"width": 1}, which=(0, 0, 50))
        assert np.array_equal(out, x.astype(TYPES[to]))


@pytest.mark.parametrize("suffix", ["f32", "i64", "i32"])
def test_ranges_and_sums(run, rng, suffix):
    out = np.zeros(40, TYPES[suffix])
    if suffix != "f32":
        run(f"range.{suffix}", {"out": out}, {"start": -3}, which=(0, 0, 40))
        assert np.array_equal(out, np.arange(-3, 37))
    ints, floats = ({}, {"number": 7.0}) if suffix == "f32" else ({"number": 7}, {})
    run(f"fill.{suffix}", {"out": out}, ints, floats, which=(0, 0, 40))
    assert (out == 7).all()
    x, total = numbers(rng, suffix, 3, 6, 4), np.zeros((3, 6, 4), TYPES[suffix])
    run(f"cumsum.{suffix}", {"x": x, "out": total}, {"count": 6, "width": 4}, which=(0, 0, 3))
    assert np.array_equal(total, np.cumsum(x, 1))


def test_nothing_is_done_for_no_elements(run):
    x = np.zeros(1, np.float32)
    ints = {**sizes(0, 3, 0), **view("x", (0, 1, 1), 1), **view("out", (0, 1, 1), 1), "offset": 0, "scaled": 0}
    run("copy.f32", {"x": x, "out": x}, ints, which=(0, 0, 4))


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_angles(run, rng, name):
    """As near for large angles as for small: positions times frequencies."""
    x, out = rng.uniform(-1e5, 1e5, 200).astype(np.float32), np.zeros(200, np.float32)
    run(f"{name}.f32", {"x": x, "out": out}, {"width": 200}, which=CONST)
    assert np.abs(out - getattr(np, name)(x.astype(np.float64))).max() <= 6e-8
