"""Small random checkpoints of every family that must work, and an executor that keeps the logits it saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import write_checkpoint
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.runtime.executor import Batch, StepResult
from xllm.targets.cpu.executor import CpuExecutor, Prepared

VOCAB = 515  # no multiple of a panel

_COMMON: Mapping[str, Any] = {
    "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps":
    1e-6, "bos_token_id": 1, "eos_token_id": VOCAB - 1, "tie_word_embeddings": False,
}  # fmt: skip


def family(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the family."""
    return {**_COMMON, "model_type": model_type, "architectures": [architecture], **changes}


def _llama(scaling: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    rope = {"rope_scaling": {"rope_theta": 10000.0, **scaling}} if scaling else {"rope_theta": 10000.0}
    return family("llama", "LlamaForCausalLM", **rope, **changes)


FAMILIES: Mapping[str, dict[str, Any]] = {
    "qwen2": family("qwen2", "Qwen2ForCausalLM", num_hidden_layers=3, hidden_size=96),
    "qwen3": family("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True),
    "llama": _llama(),
    "llama3": _llama({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}),
    "llama-linear": _llama({"rope_type": "linear", "factor": 4.0}),
    "llama-dynamic": _llama({"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=48),
    "llama-yarn": _llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "llama-longrope": _llama({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
                              "short_factor": [1.0 + 0.1 * i for i in range(8)],
                              "long_factor": [1.0 + 0.7 * i for i in range(8)]}),
    "mistral": family("mistral", "MistralForCausalLM", sliding_window=24),
}  # fmt: skip

_DELTA: Mapping[str, Any] = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.5,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
# Layers that carry a state of fixed size beside layers that attend.
HYBRIDS: Mapping[str, dict[str, Any]] = {
    "qwen3-next": family("qwen3_next", "Qwen3NextForCausalLM", **_DELTA, num_experts=0),
    "olmo-hybrid": family("olmo_hybrid", "OlmoHybridForCausalLM", **_DELTA, linear_allow_neg_eigval=True,
                          hidden_size=96, pad_token_id=0),
    "qwen3.5": family("qwen3_5_text", "Qwen3_5ForCausalLM", **_DELTA, pad_token_id=0),
}  # fmt: skip

# Configurations as they are found: biases, odd heads, windows from some layer on, keys of older transformers.
ODD: Mapping[str, dict[str, Any]] = {
    "biases": _llama(attention_bias=True, mlp_bias=True, head_dim=20, num_key_value_heads=6),
    "windows": family("qwen2", "Qwen2ForCausalLM", num_hidden_layers=6, hidden_size=96, use_sliding_window=True,
                      sliding_window=24, max_window_layers=2),
    "unused window": family("qwen2", "Qwen2ForCausalLM", hidden_size=96, use_sliding_window=False, sliding_window=24,
                            max_window_layers=2, tie_word_embeddings=True, rope_theta=1e6,
                            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "offset": family("roberta", "RobertaForCausalLM", is_decoder=True, num_key_value_heads=6, pad_token_id=1,
                     max_position_embeddings=256, type_vocab_size=1, layer_norm_eps=1e-5),
    "no window": family("mistral", "MistralForCausalLM", sliding_window=None, head_dim=40, num_hidden_layers=1),
}  # fmt: skip

# Other dense decoders, by what they do differently: packed projections and longrope; soft caps, windows, 1 + weight;
# two rotary tables and norms of heads first; neighbours rotated in pairs, and post-norms; a norm over all heads;
# scales of everything; layer norms spelled out, a parallel block, logit scale; layer norms, partial rotation, q, k, v
# in [heads, 3, dim]; learned positions, weights transposed; positions from row 2 on, a head that calls past the body; a
# scale that grows with the position.
DENSE: Mapping[str, dict[str, Any]] = {
    "phi3": family("phi3", "Phi3ForCausalLM", hidden_size=96, pad_token_id=0),
    "gemma2": family("gemma2", "Gemma2ForCausalLM", sliding_window=24, query_pre_attn_scalar=24),
    "gemma3": family("gemma3_text", "Gemma3ForCausalLM", sliding_window=24, num_hidden_layers=7),
    "glm": family("glm", "GlmForCausalLM", pad_token_id=0),
    "glm4": family("glm4", "Glm4ForCausalLM", pad_token_id=0),
    "olmo2": family("olmo2", "Olmo2ForCausalLM", hidden_size=96),
    "granite": family("granite", "GraniteForCausalLM", hidden_size=96, embedding_multiplier=3.0, logits_scaling=7.0,
                      residual_multiplier=0.3, attention_multiplier=0.2),
    "cohere2": family("cohere2", "Cohere2ForCausalLM", sliding_window=24, num_hidden_layers=4),
    "gpt_neox": family("gpt_neox", "GPTNeoXForCausalLM", hidden_size=96, num_key_value_heads=6),
    "gpt2": family("gpt2", "GPT2LMHeadModel", hidden_size=96, n_positions=512),
    "opt": family("opt", "OPTForCausalLM", ffn_dim=104, word_embed_proj_dim=72),
    "ministral3": family("ministral3", "Ministral3ForCausalLM"),
}  # fmt: skip


_MLA: Mapping[str, Any] = {
    "num_key_value_heads": 6, "num_hidden_layers": 3, "first_k_dense_replace": 3, "kv_lora_rank": 32, "q_lora_rank":
    40, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 20, "n_routed_experts": 4,
}  # fmt: skip
_YARN: Mapping[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0,
    "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

# Attention on a latent: rotations of neighbours as complex numbers and as strided halves, with and without a latent of
# the queries.
MLA: Mapping[str, dict[str, Any]] = {
    "deepseek-v2": family("deepseek_v2", "DeepseekV2ForCausalLM", **{**_MLA, "q_lora_rank": None}),
    "deepseek-v2-yarn": family("deepseek_v2", "DeepseekV2ForCausalLM", **_MLA, rope_scaling=_YARN),
    "deepseek-v3": family("deepseek_v3", "DeepseekV3ForCausalLM", **_MLA, rope_scaling=_YARN, rope_interleave=True),
    "deepseek-v3-halves": family("deepseek_v3", "DeepseekV3ForCausalLM", **_MLA, rope_interleave=False),
}  # fmt: skip

_EXPERTS: Mapping[str, Any] = {
    "num_hidden_layers": 2, "intermediate_size": 40, "moe_intermediate_size": 40, "num_experts_per_tok": 3,
}  # fmt: skip
_ROUTED: Mapping[str, Any] = {
    **_MLA, **_EXPERTS, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 1.7,
}  # fmt: skip
_SHARED: Mapping[str, Any] = {
    **_DELTA, **_EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 24, "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# Experts: weights that add up to 1; no more than two of a few; a window in every other layer, sinks, biases everywhere,
# clamped gates; groups, a correction of the choice, a dense layer and an expert that all share; a shared expert behind
# a gate of its own; scales of everything, under a head that hands no switch of the cache on; groups on top of a latent,
# scored by their best expert or the best two; experts in layers that carry a state.
EXPERTS: Mapping[str, dict[str, Any]] = {
    "qwen3-moe": family("qwen3_moe", "Qwen3MoeForCausalLM", **_EXPERTS, num_experts=8, norm_topk_prob=True),
    "mixtral": family("mixtral", "MixtralForCausalLM", **{**_EXPERTS, "num_experts_per_tok": 2}, num_local_experts=4),
    "gpt-oss": family("gpt_oss", "GptOssForCausalLM", **_EXPERTS, num_local_experts=6, sliding_window=24,
                      rope_scaling={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "truncate": False,
                                    "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 128}),
    "glm4-moe": family("glm4_moe", "Glm4MoeForCausalLM", **_EXPERTS, n_routed_experts=8, n_group=4, topk_group=2,
                       first_k_dense_replace=1, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=1.8),
    "qwen2-moe": family("qwen2_moe", "Qwen2MoeForCausalLM", **_EXPERTS, num_experts=8, hidden_size=96,
                        shared_expert_intermediate_size=40),
    # Windows that the mask alone names, from the second layer on.
    "qwen2-moe-windows": family("qwen2_moe", "Qwen2MoeForCausalLM", **_EXPERTS, num_experts=8, hidden_size=96,
                                shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=24,
                                max_window_layers=1),
    "granite-moe": family("granitemoe", "GraniteMoeForCausalLM", **_EXPERTS, num_local_experts=6, hidden_size=96,
                          embedding_multiplier=3.0, logits_scaling=7.0, residual_multiplier=0.3,
                          attention_multiplier=0.2),
    "deepseek-v2-moe": family("deepseek_v2", "DeepseekV2ForCausalLM", **_ROUTED, topk_method="group_limited_greedy"),
    "deepseek-v3-moe": family("deepseek_v3", "DeepseekV3ForCausalLM", **_ROUTED),
    "qwen3-next-moe": family("qwen3_next", "Qwen3NextForCausalLM", **_SHARED),
    "qwen3.5-moe": family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **_SHARED),
}  # fmt: skip


def build(
    folder: Path, config: Mapping[str, Any], *, dtype: str = "float32", options: CompileOptions | None = None
) -> tuple[Path, Path]:
    """Writes a checkpoint and compiles it; returns both folders."""
    checkpoint, artifact = folder / "tiny", folder / "tiny.xllm"
    write_checkpoint(checkpoint, config, dtype=dtype)
    compile_checkpoint(checkpoint, artifact, options)
    return checkpoint, artifact


class WatchedExecutor(CpuExecutor):
    """Keeps every row of logits it computed: `seen[slot, position]`, float32 [vocab]; the last write counts."""

    def __init__(self, artifact: Artifact, threads: int = 1) -> None:
        self.seen: dict[tuple[int, int], np.ndarray] = {}
        super().__init__(artifact, threads)

    def _run(self, batch: Batch, prepared: Prepared | None) -> StepResult:
        result = super()._run(batch, prepared)
        sampled = [row for row in batch.rows if row.sample]
        for row, logits in zip(sampled, self.rows(len(sampled)), strict=True):
            self.seen[row.slot, row.start + len(row.tokens) - 1] = logits
        return result
