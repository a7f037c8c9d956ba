"""Tiny random models of the families, their reference logits from transformers, and steps that mix sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from xllm.frontend.huggingface import capture_config
from xllm.frontend.stamp import stamp
from xllm.ir.interpret import bind, empty_state, run
from xllm.ir.program import Program

torch.set_num_threads(1)
VOCAB, MAX_LEN = 97, 48

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 5, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.01 * i for i in range(16)],
        "long_factor": [2.0 + 0.1 * i for i in range(16)],
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def _llama(rope: str) -> Callable[[], Any]:
    # Two wide heads: enough frequencies for every scaling to show. Dynamic scaling starts beyond the model's limit.
    sizes = {**_SIZES, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes["max_position_embeddings"] = 16 if rope == "dynamic" else 64
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **_ROPES[rope]}
    return lambda: transformers.LlamaConfig(**sizes, rope_parameters=parameters)


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **{**_SIZES, "num_hidden_layers": 8},
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"] * 4,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2}
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **{**_SIZES, "num_hidden_layers": 8},
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        swiglu_limit=1.5,
    ),
}  # fmt: skip
# Of several parts, of which the language part is compiled; coordinates of positions as text has them.
_TEXT: dict[str, Any] = {**_SIZES, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_PICTURES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "depth": 7,
}
PARTS: dict[str, Callable[[], Any]] = {
    "qwen3-vl": lambda: transformers.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": {**_TEXT["rope_parameters"], "mrope_section": [4, 2, 2]}},
        vision_config={**_PICTURES, "deepstack_visual_indexes": [1]},
        architectures=["Qwen3VLForConditionalGeneration"],
    ),
    "gemma3-vision": lambda: transformers.Gemma3Config(
        text_config={**_SIZES, "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 7,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=90, architectures=["Gemma3ForConditionalGeneration"],
    ),
}  # fmt: skip
_DELTA: dict[str, Any] = {
    **_SIZES, "num_hidden_layers": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "layer_types": [*["linear_attention"] * 4, "full_attention", "linear_attention"],
}  # fmt: skip
# Calls torch's function for attention, of a table of its own.
DIRECT: dict[str, Callable[[], Any]] = {
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip
# Layers that attend to keys which others keep; each has an input of its own, so that all are captured.
SHARED: dict[str, Callable[[], Any]] = {
    "gemma4": lambda: transformers.Gemma4TextConfig(  # the last layers attend to keys that two before them keep
        **{**_SIZES, "num_hidden_layers": 10, "global_head_dim": 16,
           "layer_types": [*["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 5, "full_attention"]},
        head_dim=8, sliding_window=5, num_kv_shared_layers=6, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    ),
}  # fmt: skip
HYBRIDS: dict[str, Callable[[], Any]] = {
    "qwen3-next": lambda: transformers.Qwen3NextConfig(**_DELTA, head_dim=16, num_experts=0),
    "olmo-hybrid": lambda: transformers.OlmoHybridConfig(**_DELTA, linear_allow_neg_eigval=True),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(**_DELTA, head_dim=16),
    "lfm2": lambda: transformers.Lfm2Config(  # convolutions alone
        **{**_SIZES, "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]}
    ),
}
ROPES: dict[str, Callable[[], Any]] = {f"llama-{rope}": _llama(rope) for rope in _ROPES}
ALL = {**CONFIGS, **PARTS, **ROPES, **HYBRIDS, **SHARED, **DIRECT}
STEPWISE = ("llama-dynamic",)  # families whose reference depends on how the prompt is cut


@cache
def captured(name: str, full: bool = False) -> Program:
    """The program of a family; treat it as read-only."""
    return capture_config(ALL[name](), name=name, max_len=MAX_LEN, full=full, max_seqs=4)


@cache
def stamped(name: str) -> Program:
    return stamp(captured(name))


@cache
def reference(name: str) -> tuple[dict[str, np.ndarray], list[Tensor], list[Tensor]]:
    """State dict, token ids of two sequences, and transformers' own eager logits for every token of them."""
    config = ALL[name]()
    torch.manual_seed(0)
    kind = transformers.AutoModelForImageTextToText if name in PARTS else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, VOCAB, (length,), generator=generator) for length in (30, 21)]
    with torch.no_grad():
        for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        logits = [_stepwise(model, part) if name in STEPWISE else model(part[None]).logits[0] for part in ids]
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}, ids, logits


def mixed_logits(program: Program, name: str) -> list[Tensor]:
    """Logits of every token of the two sequences, run in slots 3 and 1: prompts in chunks, mixed, then decode steps."""
    state, ids, _ = reference(name)
    weights, empty = bind(program, state), empty_state(program, slots=4, tokens=MAX_LEN)
    steps = [((0, 9),), ((9, 12), (0, 7)), ((12, 14), (7, 8)), *(((14 + i, 15 + i), (8 + i, 9 + i)) for i in range(13))]
    steps += [tuple(((27, 30), (21, 21)))]
    logits: list[list[Tensor]] = [[], []]
    for spans in steps:
        tokens = torch.cat([ids[n][a:b] for n, (a, b) in enumerate(spans)])
        positions = torch.cat([torch.arange(a, b) for a, b in spans])
        slots = torch.cat([torch.full((b - a,), (3, 1)[n]) for n, (a, b) in enumerate(spans)])
        inputs = {"ids": tokens, "positions": positions, "slots": slots, "last": torch.arange(len(tokens))}
        rows = run(program, {**{key: part.int() for key, part in inputs.items()}, **empty}, weights)
        for n, part in enumerate(rows.split([b - a for a, b in spans])):
            logits[n].append(part)
    return [torch.cat(parts) for parts in logits]


def nodes(program: Program) -> list[tuple[Any, ...]]:
    """Every node of a graph in comparable form."""
    return [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), node.meta["custom"], _value(node))
        for node in program.graph.nodes
    ]


def _value(node: Any) -> str:
    value = node.meta.get("val")
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(type(value))


def _stepwise(model: Any, ids: Tensor) -> Tensor:
    past = transformers.DynamicCache(config=model.config)
    rows = [
        model(ids[None, i : i + 1], past_key_values=past, position_ids=torch.tensor([[i]])).logits[0]
        for i in range(len(ids))
    ]
    return torch.cat(rows)
