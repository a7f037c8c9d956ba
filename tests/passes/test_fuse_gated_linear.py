"""A product and the gate behind it become one operator, but for those that the docstring of the pass leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.fx as fx

from tests.ir.small import HIDDEN, Builder, aten, xllm
from tests.passes.test_near_misses import WIDE, run
from tests.passes.zoo import CONTEXT
from xllm.passes.extend import Provider
from xllm.passes.fuse_gated_linear import FuseGatedLinear


def packed(
    b: Builder, x: fx.Node, *, bias: bool = False, shared: bool = False, scaled: bool = False, computed: bool = False
) -> fx.Node:
    if computed:
        weight = b.call(aten.neg.default, b.weight("gate_up_proj.weight", 2 * WIDE, HIDDEN))
        product = b.call(xllm.linear.default, x, weight, None)
    else:
        product = b.linear(x, "gate_up_proj", 2 * WIDE, bias)
    value = b.call(aten.mul.Tensor, product, 2.0) if scaled else product
    down = b.linear(b.call(xllm.gated_act.default, value, "relu2"), "down_proj", HIDDEN)
    return b.call(aten.add.Tensor, down, b.linear(product, "other_proj", HIDDEN)) if shared else down


@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear_fires(bias: bool) -> None:
    after, outcome = run(FuseGatedLinear(), lambda b, x: packed(b, x, bias=bias))
    assert outcome == (1, [])
    (fused,) = (node for node in after.calls() if node.target is xllm.gated_linear.default)
    assert fused.args[3] == "relu2" and (fused.args[2] is not None) == bias


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shared": True}, "has 2 users"),
        ({"scaled": True}, "it is not of a product"),
        ({"computed": True}, "is computed"),
    ],
)
def test_gated_linear_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseGatedLinear(), lambda b, x: packed(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def test_gated_linear_needs_a_kernel() -> None:
    context = replace(CONTEXT, target=replace(CONTEXT.target, fuses=frozenset()))  # pyright: ignore[reportArgumentType]
    _, (hits, misses) = run(FuseGatedLinear(), packed, context=context)
    assert hits == 0 and misses == ["target cpu has no kernel for the fused form"]


@pytest.mark.parametrize("op", ["xllm.linear", "xllm.gated_act"])
def test_gated_linear_leaves_kernel_modules_their_operators(op: str) -> None:
    context = replace(CONTEXT, providers=(Provider("mine", {op: lambda *_: None}),))
    _, (hits, misses) = run(FuseGatedLinear(), packed, context=context)
    assert hits == 0 and misses == ["kernel module mine has a kernel for one of the two"]
