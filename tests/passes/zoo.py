"""Tiny models of the families that passes must serve, captured once per test run, and the context they compile in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig

from xllm.frontend.huggingface import capture_config
from xllm.frontend.stamp import stamp
from xllm.ir import Program
from xllm.passes import PLANS, REWRITES, Context, Record, run_pipeline
from xllm.passes.emit import emit_plan
from xllm.plan import Plan
from xllm.targets.cpu import CpuTarget

torch.set_num_threads(1)
CONTEXT = Context(CpuTarget("x86-64-v3"))
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 8, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 16, "first_k_dense_replace": 2,
}  # fmt: skip
# What each adds: head norms; biases; plain; a window; a norm over all heads after attention; partial rotation and
# layer norms; one projection for q, k, v; the same in another order, and a parallel block; 1 + weight, soft caps;
# neighbours rotated in pairs, a packed gate; layer norms spelled out; experts; a latent for keys and values, with
# neighbours rotated as complex numbers and as strided halves.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "num_hidden_layers": 3},
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "olmo2": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "qwen3_next": {
        "head_dim": 8, "num_experts": 0, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "glm4": {"head_dim": 8},
    "cohere": {"use_qk_norm": True},
    "gpt_oss": {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 24},
}  # fmt: skip


@cache
def captured(family: str) -> Program:
    """The captured program; treat it as read-only."""
    sizes = {**_SIZES, **FAMILIES[family]}
    sizes = {key: value for key, value in sizes.items() if value is not None or key == "q_lora_rank"}
    config = AutoConfig.for_model(family, **sizes)
    return capture_config(config, name=family, max_len=64, max_tokens=64, max_seqs=4)


@cache
def rewritten(family: str) -> tuple[tuple[Program, ...], tuple[Record, ...]]:
    """The program before every rewrite and after the last, and the records."""
    stages = [captured(family)]
    _, records = run_pipeline(stages[0], REWRITES, CONTEXT, lambda step, before, after, record: stages.append(after))
    return tuple(stages), tuple(records)


@cache
def planned(family: str) -> tuple[Program, Plan]:
    """The stamped program with its plans, and the plan as emitted (weights have no place yet)."""
    program, _ = run_pipeline(stamp(rewritten(family)[0][-1]), PLANS, CONTEXT)
    return program, emit_plan(program)
