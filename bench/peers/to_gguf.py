"""A checkpoint of a Llama, Qwen3 or Qwen3-MoE decoder as a GGUF file, for llama.cpp. Needs the package gguf.

    python -m bench.peers.to_gguf CHECKPOINT F16|BF16|Q8_0|Q4_0 OUT.gguf

Matrices, embedding and head included, take the type; norms and routers stay float32. Written for checkpoints of
`bench.checkpoints`: one file of bfloat16 or float32 tensors.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

TYPES = ("F16", "BF16", "Q8_0", "Q4_0")
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
EXPERTS = ("gate", "up", "down")
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """float32 by name would take the memory twice: bfloat16 stays as uint16, mapped from the file."""
    data = np.memmap(file, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    found = {}
    for name, entry in json.loads(data[8 : 8 + length].tobytes()).items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        kind = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
        found[name] = data[begin:end].view(kind).reshape(entry["shape"])
    return found


def floats(values: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits or float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else np.asarray(values)


def renamed(held: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as float32 under the names of GGUF, experts of a layer stacked."""
    for name, value in held.items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            yield f"{TOP[stem]}.weight", floats(value)
            continue
        _, _, layer, part = stem.split(".", 3)
        if part.startswith("mlp.experts."):
            continue
        values = floats(value)
        if config["model_type"] == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            values = interleaved(values, head_dim(config))
        yield f"blk.{layer}.{LAYER[part]}.weight", values
    for layer in range(config["num_hidden_layers"]) if "num_experts" in config else ():
        for kind in EXPERTS:
            names = (f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight" for e in range(config["num_experts"]))
            yield f"blk.{layer}.ffn_{kind}_exps.weight", np.stack([floats(held[name]) for name in names])


def interleaved(values: np.ndarray, width: int) -> np.ndarray:
    """Rows of a query or key projection for an architecture that rotates neighbours, not halves: within each head,
    row i and row i + width / 2 become neighbours."""
    heads = values.reshape(-1, 2, width // 2, values.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def frequency_divisors(config: Mapping[str, Any]) -> np.ndarray | None:
    """float32 [head_dim / 2]: what Llama 3's scaling divides each frequency by; None where there is no scaling."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    width = head_dim(config)
    turns = 2 * math.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)  # the wave's length in tokens
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def convert(checkpoint: Path, kind: str, out: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{config['model_type']} has no conversion: {', '.join(ARCHITECTURES)} have one")
    writer = gguf.GGUFWriter(str(out), ARCHITECTURES[config["model_type"]])
    _metadata(writer, config)
    _tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config)
    tensors = dict(renamed(read_tensors(checkpoint / "model.safetensors"), config))
    if (divisors := frequency_divisors(config)) is not None:
        tensors["rope_freqs.weight"] = divisors
    for name in list(tensors):
        values = tensors.pop(name)
        plain = values.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        stored = gguf.GGMLQuantizationType.F32 if plain else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tokenizer(writer: gguf.GGUFWriter, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    vocab = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    control = {entry["id"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if index in control else 1 for index in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in TYPES:
        sys.exit(f"usage: python -m bench.peers.to_gguf CHECKPOINT {'|'.join(TYPES)} OUT.gguf")
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
