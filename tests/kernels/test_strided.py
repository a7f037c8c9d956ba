"""Copies, joins and arithmetic along strides, against numpy's own views."""

from __future__ import annotations

import numpy as np
import pytest

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def view(name, strides, row):
    return {f"{name}_row": row, **{f"{name}_{index}": stride for index, stride in enumerate(strides)}}


def sizes(*counts):
    return {f"n{index}": count for index, count in enumerate(counts)}


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_copy_of_a_strided_slice(run, rng, rows):
    """x[:, :, 1::2] of [T, 3, 34]."""
    x = rng.standard_normal((rows, 3, 34), np.float32)
    out = np.full((rows, 3, 17), np.nan, np.float32)
    ints = {**sizes(1, 3, 17), **view("x", (0, 34, 2), 102), **view("out", (0, 17, 1), 51), "offset": 1, "scaled": 0}
    run("copy.f32", {"x": x, "out": out}, ints, rows=rows)
    assert np.array_equal(out, x[:, :, 1::2])


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_copy_to_heads_first(run, rng, rows):
    """[T, 4, 20] as [4, T, 20] and back: the head axis has a stride of T rows."""
    x = rng.standard_normal((rows, 4, 20), np.float32)
    out, back = np.full((4, rows, 20), np.nan, np.float32), np.full((rows, 4, 20), np.nan, np.float32)
    tokens, heads = (0, 20, 1), (0, 20, 1)
    ints = {**sizes(1, 4, 20), **view("x", tokens, 80), **view("out", heads, 20), "offset": 0, "scaled": 0b010_000}
    run("copy.f32", {"x": x, "out": out}, ints, rows=rows)
    assert np.array_equal(out, x.transpose(1, 0, 2))
    ints = {**sizes(1, 4, 20), **view("x", heads, 20), **view("out", tokens, 80), "offset": 0, "scaled": 0b010}
    run("copy.f32", {"x": out, "out": back}, ints, rows=rows)
    assert np.array_equal(back, x)


@pytest.mark.parametrize("widths", [(5,), (3, 40), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_concat(run, rng, widths):
    parts = [rng.standard_normal((33, width), np.float32) for width in widths]
    out = np.full((33, sum(widths)), np.nan, np.float32)
    ints = {f"w{index}": widths[index] if index < len(widths) else 0 for index in range(8)}
    run("concat.f32", {**{f"x{i}": part for i, part in enumerate(parts)}, "out": out}, ints, rows=33)
    assert np.array_equal(out, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rows", [1, 40])
def test_operands_that_broadcast(run, rng, name, rows):
    """[T, 3, 21] with a row vector, a number per row, a value per head, and a number on either side."""
    a = rng.standard_normal((rows, 3, 21), np.float32)
    whole, out = (0, 21, 1), np.full((rows, 3, 21), np.nan, np.float32)
    others = {
        "vector": (rng.standard_normal(21, np.float32), (0, 0, 1), 0),
        "per row": (rng.standard_normal((rows, 1, 1), np.float32), (0, 0, 0), 1),
        "per head": (rng.standard_normal((rows, 1, 21), np.float32), (0, 0, 1), 21),
    }
    shared = {**sizes(1, 3, 21), **view("a", whole, 63), **view("out", whole, 63), "scaled": 0}
    numbers = {"a_number": 0.0, "b_number": 0.0}
    for b, strides, row in others.values():
        run(
            f"strided_{name}.f32",
            {"a": a, "b": b, "out": out},
            {**shared, **view("b", strides, row)},
            numbers,
            rows=rows,
        )
        assert np.array_equal(out, OPERATIONS[name](a, b))
    nothing = view("b", (0, 0, 0), 0)
    run(
        f"strided_{name}.f32",
        {"a": a, "b": None, "out": out},
        {**shared, **nothing},
        {**numbers, "b_number": 0.3},
        rows=rows,
    )
    assert np.array_equal(out, OPERATIONS[name](a, np.float32(0.3)))
    swapped = {
        **sizes(1, 3, 21),
        **view("b", whole, 63),
        **view("out", whole, 63),
        **view("a", (0, 0, 0), 0),
        "scaled": 0,
    }
    run(f"strided_{name}.f32", {"a": None, "b": a, "out": out}, swapped, {**numbers, "a_number": 0.3}, rows=rows)
    assert np.array_equal(out, OPERATIONS[name](np.float32(0.3), a))


def test_a_strided_operand(run, rng):
    """Both operands seen with their last two axes swapped."""
    a, b = rng.standard_normal((4, 60), np.float32), rng.standard_normal((4, 20, 3), np.float32)
    out = np.full((4, 3, 20), np.nan, np.float32)
    ints = {**sizes(1, 3, 20), **view("a", (0, 1, 3), 60), **view("b", (0, 1, 3), 60), **view("out", (0, 20, 1), 60)}
    run("strided_add.f32", {"a": a, "b": b, "out": out}, {**ints, "scaled": 0}, {"a_number": 0, "b_number": 0}, rows=4)
    assert np.array_equal(out, a.reshape(4, 20, 3).transpose(0, 2, 1) + b.transpose(0, 2, 1))
