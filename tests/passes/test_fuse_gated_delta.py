"""fuse-gated-delta: fires on query, key and value that are all of one value, in order, and misses strided parts."""

from __future__ import annotations

import pytest
import torch.fx as fx

from tests.ir.small import HEAD_DIM, HEADS, HIDDEN, Builder, aten, heads, small, xllm
from tests.passes.zoo import CONTEXT
from xllm.passes import run_pipeline
from xllm.passes.fuse_gated_delta import FuseGatedDelta
from xllm.passes.numerics import check_same, random_sources


def mixed_delta(b: Builder, x: fx.Node, step: int = 1) -> fx.Node:
    """The delta rule of three cuts of one value, each every `step` columns of what its heads would be."""
    wide = b.linear(x, "mixed", 3 * HIDDEN * step)
    bounds = [(at * HIDDEN * step, (at + 1) * HIDDEN * step) for at in range(3)]
    every = [step] if step != 1 else []
    q, k, v = (heads(b, b.call(aten.slice.Tensor, wide, -1, *span, *every), HEADS) for span in bounds)
    stepped = b.call(aten.add.Tensor, b.linear(x, "a_proj", HEADS), b.weight("dt_bias", HEADS))
    rate = b.call(aten.neg.default, b.call(aten.exp.default, b.weight("a_log", HEADS)))
    decay = b.call(aten.mul.Tensor, rate, b.call(aten.softplus.default, stepped))
    beta = b.call(aten.sigmoid.default, b.linear(x, "b_proj", HEADS))
    place = (b.positions, b.slots, b.layer or 0, 0)
    seen = b.call(xllm.gated_delta.default, b.fixed, q, k, v, decay, beta, *place, 0.5, 1e-6)
    return b.call(aten.reshape.default, seen, [-1, HIDDEN])


@pytest.mark.parametrize(("step", "hits", "why"), [(1, 1, []), (2, 0, ["is not cut along the width of its tokens"])])
def test_gated_delta_of_cuts_of_one_value(step: int, hits: int, why: list[str]) -> None:
    program = small(lambda b, x: mixed_delta(b, x, step), fixed_floats=HEADS * HEAD_DIM * HEAD_DIM)
    after, (record,) = run_pipeline(program, [FuseGatedDelta()], CONTEXT)
    check_same(program, after, record.name, random_sources(program))
    assert record.hits == hits and len(record.misses) == len(why)
    assert all(part in miss for part, (_, miss) in zip(why, record.misses, strict=True))
