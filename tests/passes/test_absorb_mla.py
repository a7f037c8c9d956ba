"""absorb-mla: fires on keys and values that one latent gives, keeps only that, and says why it leaves others alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.fx as fx

from tests.ir.small import HIDDEN, Builder, aten, small, xllm
from tests.passes.zoo import CONTEXT, rewritten
from xllm.ir import KVLayer, Program
from xllm.ir.weight_rules import evaluate
from xllm.passes import run_pipeline
from xllm.passes.absorb_mla import AbsorbMla
from xllm.passes.numerics import check_same, random_sources
from xllm.targets.base import LayerState
from xllm.targets.cpu import CpuTarget

H, N, R, V, C = 2, 2, 2, 4, 6


def latent_attention(
    b: Builder, x: fx.Node, *, bias: bool = False, other: bool = False, by_head: bool = False, sinks: bool = False,
    latent: int = C, share: int = 1, tokens_first: bool = False, whole: bool = False,
    swapped: bool = False,
) -> fx.Node:  # fmt: skip
    """The forms transformers has: heads first or tokens first, the query joined from parts or (whole) one value."""
    kv_heads, layer = H // share, b.layer or 0
    b.program.kv = (KVLayer(kv_heads, N + R, V, fixed_floats=b.program.kv[0].fixed_floats),)
    axis = 1 if tokens_first else 0

    def per_head(value: fx.Node, heads: int, width: int) -> fx.Node:
        value = b.call(aten.reshape.default, value, [-1, heads, width])
        return value if tokens_first else b.call(aten.transpose.int, value, 0, 1)

    def cut(value: fx.Node, start: int, stop: int) -> fx.Node:
        return b.call(aten.slice.Tensor, value, -1, start, stop)

    low = b.linear(x, "down", latent)
    made = per_head(b.linear(low, "up", kv_heads * (N + V), bias=bias), kv_heads, N + V)
    second = per_head(b.linear(low, "more", kv_heads * (N + V)), kv_heads, N + V) if other else made
    turned = per_head(b.linear(x, "rope", R * (kv_heads if by_head else 1)), kv_heads if by_head else 1, R)
    if not by_head:
        turned = b.call(aten.expand.default, turned, [-1, kv_heads, -1] if axis else [kv_heads, -1, -1])
    k = b.call(aten.cat.default, [cut(made, 0, N), turned], -1)
    v = cut(second, N, N + V)
    if swapped:  # other axes than tokens and heads, there and back
        v = b.call(aten.transpose.int, b.call(aten.transpose.int, v, 1, 2), 1, 2)
    q = per_head(b.linear(x, "query", H * (N + R)), H, N + R)
    if not whole:
        q = b.call(aten.cat.default, [cut(q, 0, N), cut(q, N, N + R)], -1)
    if not tokens_first:
        q, k, v = (b.call(aten.transpose.int, part, 0, 1) for part in (q, k, v))
    b.call(xllm.kv_write.default, b.kv, k, v, b.positions, b.slots, layer)
    weight = b.weight("sinks", H) if sinks else None
    seen = b.call(
        xllm.attention.default, b.kv, q, b.positions, b.slots, weight, layer, kv_heads, V, 0.5, 3, 20.0
    )  # fmt: skip
    return b.linear(b.call(aten.reshape.default, seen, [-1, H * V]), "o_proj", HIDDEN)


def run(fixed_floats: int = 0, **options: Any) -> tuple[Program, Program, int, list[str]]:
    program = small(lambda b, x: latent_attention(b, x, **options), fixed_floats=fixed_floats)
    after, (record,) = run_pipeline(program, [AbsorbMla()], CONTEXT)
    check_same(program, after, record.name, random_sources(program))
    return program, after, record.hits, [why for _, why in record.misses]


@pytest.mark.parametrize("options", [{}, {"tokens_first": True}, {"whole": True}], ids=str)
def test_fires_and_keeps_the_latent(options: dict[str, Any]) -> None:
    _, after, hits, misses = run(**options)
    assert (hits, misses) == (1, [])
    assert after.kv == (KVLayer(1, C + R, C, latent=True),)
    (seen,) = (node for node in after.calls() if node.target is xllm.latent_attention.default)
    assert seen.args[-3:] == (0.5, 3, 20.0)  # scale, window and soft-cap stay


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bias": True}, "the product of the latent has a bias"),
        ({"other": True}, "keys and values come from different products"),
        ({"by_head": True}, "the rotated part differs by head"),
        ({"swapped": True}, "is not a product cut into heads"),
        ({"sinks": True}, "sinks join its softmax"),
        ({"share": 2}, "query heads share keys"),
        ({"latent": 16}, "the latent takes 18 numbers a token, keys and values 16"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_near_misses(options: dict[str, Any], why: str) -> None:
    before, after, hits, misses = run(**options)
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses
    assert after.kv == before.kv


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_bytes_of_a_token_are_those_of_the_latent(family: str) -> None:
    target = CpuTarget("x86-64-v3")
    sizes = []
    for program in (rewritten(family)[0][0], rewritten(family)[0][-1]):
        layers = tuple(
            LayerState(kept.kv_heads, kept.key_dim, kept.value_dim, kept.latent, kept.fixed_floats)
            for kept in program.kv
        )
        sizes.append(target.kv_layout(layers, "bfloat16").token_bytes)
    layers = len(rewritten(family)[0][0].kv)
    assert sizes == [layers * 4 * (12 + 8 + 16) * 2, layers * (16 + 8) * 2]


def test_state_that_does_not_grow_stays() -> None:
    _, after, hits, _ = run(fixed_floats=8)
    assert hits == 1 and after.kv == (KVLayer(1, C + R, C, latent=True, fixed_floats=8),)


def test_weights_are_the_parts_of_the_product() -> None:
    before, after, _, _ = run()
    up = np.arange(H * (N + V) * C, dtype=np.float32).reshape(H * (N + V), C)
    made = {
        name.rpartition("_")[2]: evaluate(weight.rule, {"model.layers.0.up.weight": up}, {})
        for name, weight in after.weights.items()
        if name not in before.weights
    }
    by_head = up.reshape(H, N + V, C)
    assert np.array_equal(made["keys.weight"], by_head[:, :N].transpose(0, 2, 1))
    assert np.array_equal(made["values.weight"], by_head[:, N:])
