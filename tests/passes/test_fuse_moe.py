"""fuse-moe reads every kind of router from its structure, and says why where it does not."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

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
# Softmax over the chosen, biases; sigmoid with a correction among the best groups, renormalised and scaled.
ROUTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt_oss": ({"num_local_experts": 4}, {"scoring": "logits", "groups": 1, "renormalise": False}),
    "glm4_moe": (
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5},
        {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "sum2", "renormalise": True, "scale": 2.5},
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
