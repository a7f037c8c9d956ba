"""What the compiler makes of every family, at tiny sizes with random weights: captured layers, hits, fallbacks, error.

python -m bench.families            writes docs/families.md
python -m bench.families qwen3 bert prints these rows only
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import write_tokenizer
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, Report, compile_checkpoint
from xllm.errors import CompileError
from xllm.offline import LLM
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams
from xllm.targets.cpu.executor import CpuExecutor

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
VOCAB, PROMPT, CHUNKS, TOKENS = 400, 45, (0, 17, 45), 61
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_EXPERTS: Mapping[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPED: Mapping[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_LATENT: Mapping[str, Any] = {
    **_GROUPED, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip
_DELTA: Mapping[str, Any] = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_LINEAR: Mapping[str, Any] = {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32}
_HEADS: Mapping[str, Any] = {"num_key_value_heads": None, "head_dim": None}
_OLD: Mapping[str, Any] = {**_HEADS, "intermediate_size": None}
_WINDOWS: Mapping[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SHARED: Mapping[str, Any] = {
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
# Shown name -> model_type, the class that transformers builds, sizes beside the common ones (None leaves one out).
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "Qwen2": ("qwen2", "AutoModelForCausalLM", {}),
    "Qwen3": ("qwen3", "AutoModelForCausalLM", {}),
    "Llama": ("llama", "AutoModelForCausalLM", {}),
    "Mistral": ("mistral", "AutoModelForCausalLM", {"sliding_window": 24}),
    "Phi-3": ("phi3", "AutoModelForCausalLM", {}),
    "Gemma 2": ("gemma2", "AutoModelForCausalLM", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("gemma3_text", "AutoModelForCausalLM", {"sliding_window": 24, "num_hidden_layers": 6}),
    "GLM-4": ("glm4", "AutoModelForCausalLM", {}),
    "OLMo-2": ("olmo2", "AutoModelForCausalLM", {}),
    "Cohere": ("cohere", "AutoModelForCausalLM", {}),
    "Granite": ("granite", "AutoModelForCausalLM", {}),
    "StableLM": ("stablelm", "AutoModelForCausalLM", {}),
    "GPT-NeoX": ("gpt_neox", "AutoModelForCausalLM", _HEADS),
    "GPT-OSS": ("gpt_oss", "AutoModelForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2,
                                                    "sliding_window": 24}),
    "Qwen3-MoE": ("qwen3_moe", "AutoModelForCausalLM", _EXPERTS),
    "Mixtral": ("mixtral", "AutoModelForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "DeepSeek-V2": ("deepseek_v2", "AutoModelForCausalLM", _LATENT),
    "DeepSeek-V3": ("deepseek_v3", "AutoModelForCausalLM", _LATENT),
    "Qwen3-Next": ("qwen3_next", "AutoModelForCausalLM", _LINEAR),
    "Qwen3.5": ("qwen3_5_text", "AutoModelForCausalLM", _DELTA),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", "AutoModelForCausalLM", _LINEAR),
    "BERT": ("bert", "AutoModel", _HEADS),
    "RoBERTa": ("roberta", "AutoModel", {**_HEADS, "pad_token_id": 1}),
    "ModernBERT": ("modernbert", "AutoModel", {**_HEADS, "local_attention": 16, "global_attn_every_n_layers": 2,
                                               "cls_token_id": 1, "sep_token_id": 2}),
    "BERT classifier": ("bert", "AutoModelForSequenceClassification", _HEADS),
    "Qwen3 reranker": ("qwen3", "AutoModelForSequenceClassification", {"num_labels": 1}),
    "GPT-2": ("gpt2", "AutoModelForCausalLM", _OLD),
    "GPT-J": ("gptj", "AutoModelForCausalLM", {**_OLD, "rotary_dim": 8}),
    "Falcon": ("falcon", "AutoModelForCausalLM", {"head_dim": None, "intermediate_size": None}),
    "Phi": ("phi", "AutoModelForCausalLM", {"num_key_value_heads": None, "head_dim": None}),
    "StarCoder2": ("starcoder2", "AutoModelForCausalLM", {"head_dim": None}),
    "Nemotron": ("nemotron", "AutoModelForCausalLM", {}),
    "SmolLM3": ("smollm3", "AutoModelForCausalLM", {}),
    "EXAONE 4": ("exaone4", "AutoModelForCausalLM", _WINDOWS),
    "Cohere 2": ("cohere2", "AutoModelForCausalLM", _WINDOWS),
    "Gemma 3n": ("gemma3n_text", "AutoModelForCausalLM", {**_WINDOWS, **_SHARED, "laurel_rank": 8,
                                                          "altup_num_inputs": 2}),
    "Gemma 4": ("gemma4_text", "AutoModelForCausalLM", {**_WINDOWS, **_SHARED, "global_head_dim": 16}),
    "OLMoE": ("olmoe", "AutoModelForCausalLM", _EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", "AutoModelForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "Granite MoE": ("granitemoe", "AutoModelForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "GLM-4-MoE": ("glm4_moe", "AutoModelForCausalLM", {**_GROUPED, "num_key_value_heads": 2, "head_dim": 16}),
    "Ernie 4.5 MoE": ("ernie4_5_moe", "AutoModelForCausalLM", {"moe_num_experts": 8, "moe_k": 2,
                                                               "moe_intermediate_size": 32}),
    "PhiMoE": ("phimoe", "AutoModelForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "LFM2": ("lfm2", "AutoModelForCausalLM", {"layer_types": ["conv", "full_attention"] * 2}),
    "Bloom": ("bloom", "AutoModelForCausalLM", _OLD),
    "Mamba 2": ("mamba2", "AutoModelForCausalLM", {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16}),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One row: captured layers of all, hits by rewrite, operators left to torch, largest relative error, seconds of
    the compile; `refused` says why the model is not taken.
    """

    captured: str = ""
    hits: str = ""
    fallbacks: int = 0
    error: float = 0.0
    seconds: float = 0.0
    refused: str = ""

    def line(self, name: str) -> str:
        if self.refused:
            return f"| {name} | not taken: {self.refused} | | | | |"
        return (
            f"| {name} | {self.captured} | {self.hits} | {self.fallbacks or 'none'} | {self.error:.1e} |"
            f" {self.seconds:.1f} |"
        )


def measure(name: str, folder: Path) -> Found:
    """Builds, compiles and compares one family. Works below `folder`."""
    from xllm.frontend.huggingface import capture

    checkpoint, artifact = folder / "checkpoint", folder / "model.xllm"
    model = write_model(name, checkpoint)
    try:
        program = capture(checkpoint)
        report = compile_checkpoint(checkpoint, artifact, CompileOptions(max_len=128, max_batch_tokens=64, max_seqs=4))
    except CompileError as error:
        return Found(refused=error.why)
    real = sum(len(layer.stands_for) for layer in program.layers)
    generates = Artifact.open(artifact).task == "generate"
    error = generation_error(artifact, model) if generates else row_error(artifact, model)
    seconds = sum(report.seconds.values())
    return Found(f"{len(program.layers)} of {real}", _hits(report), len(report.fallbacks), error, seconds)


def write_model(name: str, folder: Path) -> Any:
    """A checkpoint as transformers saves it, with random weights; returns the model, float32."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(5)
    model_type, kind, changes = FAMILIES[name]
    sizes = {key: value for key, value in {**_SIZES, **changes}.items() if value is not None}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = getattr(transformers, kind).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, biases are zero and norms are one
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.03))
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB, VOCAB - 1)
    return model


def generation_error(artifact: Path, model: Any) -> float:
    """Largest relative difference of logits over a prefill in chunks and a decode, another sequence beside it."""
    import torch

    tokens = np.random.default_rng(7).integers(3, VOCAB, TOKENS).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    executor = CpuExecutor(Artifact.open(artifact), threads=1)
    size = -(-executor.kv.bytes_for(TOKENS + 3) // 64) * 64
    memory = np.zeros(2 * size + 64, np.uint8)
    base = -(-memory.ctypes.data // 64) * 64
    cuts = [*itertools.pairwise(CHUNKS), *((at, at + 1) for at in range(PROMPT, TOKENS))]
    worst = 0.0
    try:
        for slot in (0, 1):
            executor.attach(slot, Request(str(slot), tuple(tokens), SamplingParams(temperature=0)), ())
        for step, (start, stop) in enumerate(cuts):
            beside = Row(1, base + size, start, tokens[::-1][start:stop], True)
            executor.launch(Batch(step, (Row(0, base, start, tokens[start:stop], True), beside))).result()
            got = executor.rows(1)[0]
            worst = max(worst, float(np.linalg.norm(got - wanted[stop - 1]) / np.linalg.norm(wanted[stop - 1])))
    finally:
        executor.close()
    return worst


def row_error(artifact: Path, model: Any) -> float:
    """Largest relative difference of embeddings (means) or scores over prompts that share steps."""
    import torch

    generator = np.random.default_rng(7)
    prompts = [generator.integers(3, VOCAB, length).tolist() for length in (1, 17, 45, 61)]
    worst = 0.0
    with LLM(artifact, threads=1, prefix_cache=False) as llm:
        embeds = llm.artifact.task == "embed"
        found = llm.embed(prompts) if embeds else llm.score(prompts)
    for prompt, got in zip(prompts, found, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt]))
        wanted = (out.last_hidden_state[0].mean(0) if embeds else out.logits[0]).numpy()
        worst = max(worst, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
    return worst


def _hits(report: Report) -> str:
    named = [f"{record.name} {record.hits}" for record in report.records if record.kind == "rewrite" and record.hits]
    return ", ".join(named)


def table(rows: Mapping[str, Found]) -> str:
    return "\n".join(
        [
            "# Families",
            "",
            "Written by `python -m bench.families`: tiny models with random weights, built by transformers. Captured:",
            "the distinct layers that were traced, of all. Hits: places each rewrite changed. In torch: operators",
            "without a native kernel. Error: the largest ‖out - reference‖ / ‖reference‖ against transformers in",
            f"float32, over logits of a prefill in chunks of {CHUNKS[1]} and {CHUNKS[2] - CHUNKS[1]} tokens and",
            f"{TOKENS - PROMPT} decode steps, or over embeddings and scores. Seconds: of the compile, on the machine",
            "that wrote this.",
            "",
            "| family | layers captured | hits | in torch | error | seconds |",
            "|---|---|---|---|---|---|",
            *(found.line(name) for name, found in rows.items()),
            "",
        ]
    )


def main(names: list[str]) -> None:
    rows = {}
    for name in names or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, Path(folder))
        print(rows[name].line(name), flush=True)
    if not names:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
