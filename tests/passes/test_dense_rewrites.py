"""Layer norms spelled out, packed gates, neighbours in pairs, tables of positions: what fires, what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.fx as fx

from tests.ir.small import HEAD_DIM, HEADS, HIDDEN, Builder, aten, heads, xllm
from tests.passes.test_near_misses import run
from xllm.ir import Constant, Weight
from xllm.ir.weight_rules import rule_text
from xllm.passes.fuse_gate_up import FuseGateUp
from xllm.passes.fuse_layer_norm import FuseLayerNorm
from xllm.passes.fuse_rms_norm import FuseRmsNorm
from xllm.passes.fuse_rope import FuseRope
from xllm.passes.rewrite import sizes
from xllm.passes.split_projections import SplitProjections
from xllm.passes.tabulate_positions import TabulatePositions


def layer_norm(b: Builder, x: fx.Node, *, power: int = 2, weight: int = HIDDEN, escapes: bool = False) -> fx.Node:
    mean = b.call(aten.mean.dim, x, [-1], True)
    squared = b.call(aten.pow.Tensor_Scalar, b.call(aten.sub.Tensor, x, mean), power)
    variance = b.call(aten.mean.dim, b.call(aten.abs.default, squared) if power != 2 else squared, [-1], True)
    inverse = b.call(aten.rsqrt.default, b.call(aten.add.Tensor, variance, 1e-5))
    normed = b.call(aten.mul.Tensor, b.call(aten.sub.Tensor, x, mean), inverse)
    scaled = b.call(aten.mul.Tensor, b.weight("norm.weight", weight), normed)
    return b.call(aten.add.Tensor, scaled, normed) if escapes else scaled


def test_layer_norm_fires() -> None:
    after, outcome = run(FuseLayerNorm(), layer_norm)
    assert outcome == (1, [])
    assert [node.target for node in after.calls()].count(xllm.layer_norm.default) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [({"weight": 1}, "its weight is [1], not one number per channel"), ({"escapes": True}, "has 2 users")],
)
def test_layer_norm_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseLayerNorm(), lambda b, x: layer_norm(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def test_a_shifted_weight_is_a_weight() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        weight = b.call(aten.add.Tensor, b.weight("norm.weight", HIDDEN), 1)
        return b.call(xllm.layer_norm.default, x, weight, None, 1e-5)

    after, outcome = run(FuseLayerNorm(), body)
    assert outcome == (1, [])
    assert "model.layers.0.norm.weight+1.0" in after.weights


def packed(b: Builder, x: fx.Node, *, twisted: bool = False, half: int = 12, squared: bool = False) -> fx.Node:
    both = b.linear(x, "gate_up_proj", 24)
    parts = [b.call(aten.slice.Tensor, both, -1, 0, half), b.call(aten.slice.Tensor, both, -1, half, 2 * half)]
    gate, up = reversed(parts) if twisted else parts
    act = b.call(aten.relu.default if squared else aten.silu.default, gate)
    act = b.call(aten.square.default, act) if squared else act
    return b.linear(b.call(aten.mul.Tensor, up, act), "down_proj", HIDDEN)


@pytest.mark.parametrize("squared", [False, True])
def test_a_packed_gate_fires(squared: bool) -> None:
    after, outcome = run(FuseGateUp(), lambda b, x: packed(b, x, squared=squared))
    assert outcome == (1, [])
    (fused,) = (node for node in after.calls() if node.target is xllm.gated_act.default)
    assert fused.args[1] == ("relu2" if squared else "silu")


@pytest.mark.parametrize(
    ("options", "why"),
    [({"twisted": True}, "expected 0, found 12"), ({"half": 8}, "gate and up are not the two halves of %")],
)
def test_a_packed_gate_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseGateUp(), lambda b, x: packed(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def neighbours(b: Builder, x: fx.Node, *, swapped: bool = False) -> fx.Node:
    t = b.call(aten.transpose.int, heads(b, b.linear(x, "q_proj", HEADS * HEAD_DIM), HEADS), 0, 1)
    tables = []
    for part in ("cos", "sin"):
        row = b.call(xllm.rows.default, b.weight(f"{part}_table", 64, HEAD_DIM), b.positions)
        tables.append(b.call(aten.reshape.default, row, [1, -1, HEAD_DIM]))
    even = b.call(aten.slice.Tensor, t, -1, 0, HEAD_DIM, 2)
    odd = b.call(aten.slice.Tensor, t, -1, 1, HEAD_DIM, 2)
    pair = [even, b.call(aten.neg.default, odd)] if swapped else [b.call(aten.neg.default, odd), even]
    partner = b.call(aten.reshape.default, b.call(aten.stack.default, pair, 3), [HEADS, -1, HEAD_DIM])
    one, other = b.call(aten.mul.Tensor, t, tables[0]), b.call(aten.mul.Tensor, partner, tables[1])
    turned = b.call(aten.transpose.int, b.call(aten.add.Tensor, one, other), 0, 1)
    return b.linear(b.call(aten.reshape.default, turned, [-1, HEADS * HEAD_DIM]), "o_proj", HIDDEN)


def test_neighbours_are_rotated_in_pairs() -> None:
    after, outcome = run(FuseRope(), neighbours)
    assert outcome == (1, [])
    (rope,) = (node for node in after.calls() if node.target is xllm.rope.default)
    assert rope.args[-1] is True


def test_neighbours_in_another_order_are_left_alone() -> None:
    _, (hits, misses) = run(FuseRope(), lambda b, x: neighbours(b, x, swapped=True))
    assert hits == 0 and len(misses) == 1, misses


def test_a_norm_of_heads_first_moves() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        t = b.call(aten.transpose.int, heads(b, x, HIDDEN // HEAD_DIM), 0, 1)
        normed = b.call(xllm.rms_norm.default, t, b.weight("norm.weight", HEAD_DIM), 1e-6)
        return b.call(aten.reshape.default, b.call(aten.transpose.int, normed, 0, 1), [-1, HIDDEN])

    after, outcome = run(FuseRmsNorm(), body)
    assert outcome == (1, [])
    (norm,) = (node for node in after.calls() if node.target is xllm.rms_norm.default)
    assert norm.args[0].target is aten.reshape.default  # pyright: ignore


def position_scale(b: Builder, x: fx.Node, *, from_checkpoint: bool = False) -> fx.Node:
    table = b.weight("table", 64, HIDDEN)
    if not from_checkpoint:
        b.program.constants["table"] = np.random.default_rng(1).standard_normal((64, HIDDEN), np.float32)
        b.program.weights[str(table.target)] = Weight((64, HIDDEN), Constant("table"))
    row = b.call(xllm.rows.default, table, b.positions)
    half = b.call(aten.slice.Tensor, row, -1, 0, HIDDEN // 2)
    return b.call(aten.add.Tensor, x, b.call(aten.repeat_interleave.self_int, half, 2, 1))


def test_what_follows_from_positions_is_a_table() -> None:
    after, outcome = run(TabulatePositions(), position_scale)
    assert outcome == (1, [])
    length = after.input("kv").meta["val"].shape[2]
    assert after.constants.keys() == {"tables.0"} and after.constants["tables.0"].shape == (length, HIDDEN)


def test_a_tensor_of_the_checkpoint_is_no_table_of_positions() -> None:
    assert run(TabulatePositions(), lambda b, x: position_scale(b, x, from_checkpoint=True))[1] == (0, [])


def by_heads(b: Builder, x: fx.Node, *, bias: bool = False, spare: bool = False, overlap: int = 0, flat: bool = False):
    """A product whose heads hold two parts each, of which the second is read first."""
    width = 2 * HEAD_DIM
    both = b.linear(x, "packed", HEADS * width, bias)
    split = both if flat else b.call(aten.reshape.default, both, [-1, HEADS, width])
    split = split if flat else b.call(aten.transpose.int, split, 0, 1)
    middle = HEADS * HEAD_DIM if flat else HEAD_DIM
    parts = [
        b.call(aten.slice.Tensor, split, -1, middle - overlap, 2 * middle - overlap),
        b.call(aten.slice.Tensor, split, -1, 0, middle),
    ]
    total = b.call(aten.mul.Tensor, b.call(aten.neg.default, parts[0]), parts[1])
    total = total if flat else b.call(aten.transpose.int, total, 0, 1)
    out = b.call(aten.reshape.default, total, [-1, HIDDEN])
    return b.call(aten.add.Tensor, out, b.call(aten.mean.dim, both, [-1], True)) if spare else out


@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_heads_are_products_of_their_own(bias: bool) -> None:
    after, outcome = run(SplitProjections(), lambda b, x: by_heads(b, x, bias=bias))
    assert outcome == (1, [])
    products = {str(node.args[1]): node for node in after.calls() if node.target is xllm.linear.default}
    assert {len(node.meta["val"].shape) for node in products.values()} == {2} and len(products) == 3
    rules = {name.removeprefix("model.layers.0."): rule_text(weight.rule) for name, weight in after.weights.items()}
    assert rules["packed_0.weight"] != rules["packed_1.weight"] and not any("slice" in str(n) for n in after.calls())


@pytest.mark.parametrize(
    ("options", "misses"),
    [
        ({"flat": True}, []),
        ({"overlap": 1}, ["parts that are read of it overlap"]),
        ({"spare": True}, ["parts that are read of it overlap"]),
    ],
    ids=["ranges", "overlapping parts", "all columns are read"],
)
def test_parts_that_stay_cut(options: dict[str, Any], misses: list[str]) -> None:
    assert run(SplitProjections(), lambda b, x: by_heads(b, x, **options))[1] == (0, misses)


def turned_by_halves(b: Builder, x: fx.Node, *, swapped: bool = False, wide: bool = False) -> fx.Node:
    """Both halves of each head turned one by one, by tables of one number for each pair."""
    half = HEAD_DIM // 2
    tables = []
    for name in ("cos", "sin"):
        table = b.weight(f"{name}.table", 64, HEAD_DIM if wide else half)
        b.program.weights[str(table.target)] = Weight((64, HEAD_DIM if wide else half), Constant(name))
        b.program.constants[name] = np.random.default_rng(1).random((64, HEAD_DIM if wide else half), np.float32)
        tables.append(b.call(xllm.rows.default, table, b.positions))
    cos, sin = (b.call(aten.reshape.default, rows, [1, -1, sizes(rows)[1]]) for rows in tables)
    t = b.call(aten.transpose.int, heads(b, x, HEADS), 0, 1)
    low, high = (b.call(aten.slice.Tensor, t, -1, at, at + half) for at in (0, half))
    if wide:
        low = high = t
    first, second = ((high, low) if swapped else (low, high))[:2]
    left = b.call(aten.sub.Tensor, b.call(aten.mul.Tensor, first, cos), b.call(aten.mul.Tensor, second, sin))
    right = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, high, cos), b.call(aten.mul.Tensor, low, sin))
    joined = b.call(aten.transpose.int, b.call(aten.cat.default, [left, right], -1), 0, 1)
    joined = b.call(aten.slice.Tensor, joined, -1, 0, HEAD_DIM) if wide else joined
    return b.call(aten.reshape.default, joined, [-1, HIDDEN])


def test_halves_that_turn_one_by_one_are_a_rotation() -> None:
    after, outcome = run(FuseRope(), turned_by_halves)
    assert outcome == (1, [])
    assert after.weights["model.layers.0.cos.table_twice"].shape == (64, HEAD_DIM)


@pytest.mark.parametrize("option", ["swapped", "wide"])
def test_other_halves_are_none(option: str) -> None:
    _, (hits, misses) = run(FuseRope(), lambda b, x: turned_by_halves(b, x, **{option: True}))
    assert hits == 0 and len(misses) == (option == "swapped")
