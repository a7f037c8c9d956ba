"""Attention spelled out: what becomes one operator, what of it goes, what does not fire and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.fx as fx

from tests.ir.small import Builder, aten, xllm
from tests.passes.test_near_misses import run
from xllm.ir import Constant, Weight
from xllm.passes.fuse_sdpa import FuseSdpa

HEADS, LENGTH, WIDTH = 2, 2, 4  # a batch of T


def constant(b: Builder, name: str, array: Any) -> fx.Node:
    """A number the pass can read."""
    node = b.weight(name, *np.shape(array))
    b.program.constants[str(node.target)] = np.asarray(array, np.float32)
    b.program.weights[str(node.target)] = Weight(np.shape(array), Constant(str(node.target)))
    return node


def spelled(
    b: Builder, x: fx.Node, *, mask: str = "", turned: str = "swap", axis: int = -1, guard: bool = True,
    escapes: str = "", by: float = 0.5, cap: float = 0.0, shared: bool = False, swapped: bool = False,
) -> fx.Node:  # fmt: skip
    heads = [LENGTH, HEADS, WIDTH] if swapped else [HEADS, LENGTH, WIDTH]
    kv_heads = [1, LENGTH, WIDTH] if shared else heads
    q, k, v = (
        b.call(aten.reshape.default, b.linear(x, name, int(np.prod(shape))), [-1, *shape])
        for name, shape in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    if swapped:
        q, k, v = (b.call(aten.permute.default, part, [0, 2, 1, 3]) for part in (q, k, v))
    if shared:
        k, v = (_repeated(b, part) for part in (k, v))
    if turned == "flat":
        flat = b.call(aten.reshape.default, k, [-1, LENGTH, WIDTH])
        k = b.call(aten.reshape.default, b.call(aten.permute.default, flat, [0, 2, 1]), [-1, HEADS, WIDTH, LENGTH])
    else:
        k = b.call(aten.permute.default, k, [0, 1, 3, 2])
        k = b.call(aten.relu.default, k) if turned == "not" else k
    scores = b.call(aten.matmul.default, b.call(aten.mul.Tensor, q, by), b.call(aten.mul.Tensor, k, by))
    if cap:
        scores = b.call(aten.mul.Tensor, b.call(aten.tanh.default, b.call(aten.div.Tensor, scores, cap)), cap)
    if mask:
        shape = (1, 1, LENGTH, LENGTH)
        shows = np.ones(shape) if mask == "all" else np.tril(np.ones(shape))
        seen = b.call(aten.to.dtype, constant(b, "seen", shows), torch.bool)
        hidden = constant(b, "hidden", -np.inf if mask == "seen" else -3e38)
        scores = b.call(aten.add.Tensor, scores, b.call(aten.where.self, seen, constant(b, "shown", 0.0), hidden))
    weights = softmax = b.call(aten.softmax.int, scores, axis)
    if guard:
        weights = b.call(aten.where.self, b.call(aten.isnan.default, softmax), constant(b, "zero", 0.0), softmax)
    made = b.call(aten.matmul.default, weights, v)
    if swapped:
        made = b.call(aten.permute.default, made, [0, 2, 1, 3])
    out = b.call(aten.reshape.default, made, [-1, HEADS * LENGTH * WIDTH])
    if escapes:
        extra = b.call(aten.reshape.default, {"scores": scores, "weights": softmax}[escapes], [-1, 8])
        out = b.call(aten.add.Tensor, out, b.linear(extra, "extra", HEADS * LENGTH * WIDTH))
    return out


def _repeated(b: Builder, part: fx.Node) -> fx.Node:
    apart = b.call(aten.reshape.default, part, [-1, 1, 1, LENGTH, WIDTH])
    return b.call(aten.reshape.default, b.call(aten.expand.default, apart, [-1, 1, HEADS, LENGTH, WIDTH]),
                  [-1, HEADS, LENGTH, WIDTH])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guard": False},
        {"turned": "flat"},
        {"shared": True},
        {"mask": "seen"},
        {"mask": "low"},
        {"mask": "all"},
        {"swapped": True},
        {"cap": 3.0, "mask": "seen"},
    ],
    ids=str,
)
def test_fires(options: dict[str, Any]) -> None:
    after, (hits, misses) = run(FuseSdpa(), lambda b, x: spelled(b, x, **options))
    calls = [node for node in after.calls() if node.target is xllm.sdpa.default]
    assert (hits, misses, len(calls)) == (2 if options.get("swapped") else 1, [], 1)
    left = {node.target for node in after.calls()}
    assert not left & {aten.softmax.int, aten.matmul.default, aten.isnan.default, aten.expand.default}
    assert calls[0].args[4:] == (0.25, options.get("cap", 0.0), False, bool(options.get("swapped")))
    assert (aten.permute.default in left) is False
    assert (aten.where.self in left) == (options.get("mask") == "low")  # the lowest number is no infinity


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"axis": -2}, "not along the keys"),
        ({"turned": "not"}, "not turned round"),
        ({"escapes": "scores"}, "its scores are read by others too"),
        ({"escapes": "weights", "guard": False}, "its weights are read by others"),
        ({"escapes": "weights"}, "its weights are read by others"),
    ],
    ids=str,
)
def test_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseSdpa(), lambda b, x: spelled(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses
