"""fuse-moe reads every kind of router from its structure, and says why where it does not."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch.fx as fx
from transformers import AutoConfig

from tests.ir.small import HIDDEN, Builder, aten, small, xllm
from tests.passes.zoo import CONTEXT
from xllm.frontend.huggingface import capture_config
from xllm.ir import Program
from xllm.ir.effects import named_arguments
from xllm.passes.base import Outcome, run_pipeline
from xllm.passes.canonicalize import Canonicalize
from xllm.passes.fuse_moe import FuseMoe
from xllm.passes.numerics import check_same, random_sources

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 20, "moe_intermediate_size": 20, "vocab_size": 64, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
# Softmax over the chosen, biases; sigmoid with a correction among the best groups, renormalised and scaled; softmax
# with a correction of one row, over a sum that has a lower bound.
ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_oss": ({"num_local_experts": 4}, {"scoring": "logits", "groups": 1, "renormalise": False}),
    "glm4_moe": (
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5},
        {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "sum2", "renormalise": True, "scale": 2.5},
    ),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1,
         "moe_norm_min": 0.8},
        {"scoring": "softmax", "groups": 1, "renormalise": True, "epsilon": -0.8},
    ),
}  # fmt: skip


def fused(family: str, **sizes: Any) -> tuple[Program, Program, Outcome]:
    config = AutoConfig.for_model(family, **{**_SIZES, **sizes})
    before, _ = run_pipeline(capture_config(config, name=family, max_len=64, max_seqs=4), [Canonicalize()], CONTEXT)
    outcome = FuseMoe().run(before.copy(), CONTEXT)
    return before, outcome.program, outcome


@pytest.mark.parametrize("family", ROUTERS)
def test_routers(family: str) -> None:
    sizes, wanted = ROUTERS[family]
    before, after, outcome = fused(family, **sizes)
    check_same(before, after, "fuse-moe", random_sources(before))
    assert len(outcome.hits) == 2 and not outcome.misses
    for node in after.calls():
        if node.name in outcome.hits:
            assert {name: named_arguments(node)[name] for name in wanted} == wanted


def test_a_choice_of_another_kind_is_left_alone() -> None:
    _, _, outcome = fused("phimoe", num_local_experts=4)
    assert not outcome.hits and "the chosen experts are not result 1 of aten.topk.default" in outcome.misses[0][1]


EXPERTS, GROUPS, WIDE = 8, 4, 6


def routed(
    b: Builder, x: fx.Node, *, shape: tuple[int, int] = (GROUPS, EXPERTS // GROUPS), axis: int = -1,
    behind: bool = False, base: Any = aten.zeros_like.default, parts: bool = False, alpha: float = 1.0,
) -> fx.Node:  # fmt: skip
    """Experts chosen by softmax among the best two groups, with a bias that counts for the choice only. parts: the
    softmax is within groups, and the choice among all by it alone.
    """
    logits = b.linear(x, "router", EXPERTS)
    if parts:
        logits = b.call(aten.reshape.default, logits, [-1, *shape])
    scores = b.call(aten.reshape.default, b.call(aten.softmax.int, logits, -1), [-1, EXPERTS])
    options: dict[str, Any] = {"alpha": alpha} if alpha != 1 else {}
    chosen = b.call(aten.add.Tensor, scores, b.weight("correction", EXPERTS), **options)
    best = b.call(aten.max.dim, b.call(aten.reshape.default, chosen, [-1, *shape]), axis)
    best = b.call(operator.getitem, best, 0)
    kept = b.call(operator.getitem, b.call(aten.topk.default, best, 2), 1)
    seen = b.call(aten.scatter.value, b.call(base, best), 1, kept, 1)
    seen = b.call(aten.unsqueeze.default, seen, 1 if behind else 2)
    spread = [-1, EXPERTS // GROUPS, GROUPS] if behind else [-1, GROUPS, EXPERTS // GROUPS]
    seen = b.call(aten.reshape.default, b.call(aten.expand.default, seen, spread), [-1, EXPERTS])
    outside = b.call(aten.logical_not.default, seen)
    masked = b.call(aten.masked_fill.Scalar, chosen, outside, float("-inf"))
    index = b.call(operator.getitem, b.call(aten.topk.default, scores if parts else masked, 2), 1)
    weights = b.call(aten.gather.default, scores, 1, index)
    held = [b.weight("gate", EXPERTS, WIDE, HIDDEN), None, b.weight("up", EXPERTS, WIDE, HIDDEN), None]
    held += [b.weight("down", EXPERTS, HIDDEN, WIDE), None]
    return b.call(xllm.experts.default, x, index, weights, *held, "silu", 1.0, 0.0, 0.0)


def fused_small(**options: Any) -> Outcome:
    program = small(lambda b, x: routed(b, x, **options))
    outcome = FuseMoe().run(program.copy(), CONTEXT)
    check_same(program, outcome.program, "fuse-moe", random_sources(program))
    return outcome


def test_groups_written_by_hand() -> None:
    outcome = fused_small()
    assert len(outcome.hits) == 1 and not outcome.misses


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"shape": (2, 4), "axis": 1}, "not scored by the experts that lie next to each other"),
        ({"behind": True}, "does not give each expert the mark of its group"),
        ({"base": aten.ones_like.default}, "does not mark the chosen groups with 1 among 0"),
        ({"parts": True}, "is over parts of the logits"),
        ({"alpha": 0.5}, "is given alpha"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_near_misses(options: dict[str, Any], why: str) -> None:
    outcome = fused_small(**options)
    assert not outcome.hits and len(outcome.misses) == 1 and why in outcome.misses[0][1], outcome.misses
