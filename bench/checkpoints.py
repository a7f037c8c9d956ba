"""Checkpoint folders with random weights in real shapes: what benchmarks and tests run on, since weights cannot be
fetched.

python -m bench.checkpoints qwen3-0.6b OUT
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-60m": {  # of nobody: what two cores serve several requests of a second with
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 12, "hidden_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536,
        "vocab_size": 32768, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 4096, "bos_token_id": 32765, "eos_token_id": 32767,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 28, "hidden_size": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 28, "hidden_size": 2048,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144,
        "vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 16, "hidden_size": 2048,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
        "vocab_size": 128256, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128009,
    },
    "qwen3-moe-1b": {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 16,
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 3072, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "hidden_size": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "bos_token_id": 151643, "eos_token_id": 151645,
    },
}  # fmt: skip


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    tokenizer: bool = True,
    shard_bytes: int = 0,
) -> Path:
    """A checkpoint of `config` (a config.json) with random weights of the size a trained model has. Returns the folder.

    dtype "float32" or "bfloat16". shard_bytes: where given, weights are zeros in sparse files of about that size, which
    cost no disk: for measuring what large ones cost to compile. The tokenizer is byte-level with `vocab_size` entries,
    made up where bytes end.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(root)), dtype=torch.float32)
    # Spelled as save_pretrained would: experts one by one.
    held = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    if config.get("tie_word_embeddings"):
        held.pop("lm_head.weight", None)
    if shard_bytes:
        _write_sparse(root, held, dtype, shard_bytes)
    else:
        _write_safetensors(root / "model.safetensors", held, dtype, seed)
    eos = config.get("eos_token_id", 1)
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "do_sample": False}))
    if tokenizer:
        write_tokenizer(root, int(config["vocab_size"]), eos)
    return root


def write_tokenizer(root: Path, vocab_size: int, eos: int) -> None:
    """A byte-level BPE of `vocab_size` ids: bytes first, then merges of what went before; ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {letter: index for index, letter in enumerate(alphabet)}, []
    for left in list(vocab):
        for right in alphabet:
            if len(vocab) < vocab_size and left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    pairs = [word for word in vocab if len(word) == 2]
    for left in pairs:
        for right in alphabet:
            if len(vocab) < vocab_size:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    for name, at in (("<|endoftext|>", eos - 2), ("<|im_start|>", eos - 1), ("<|im_end|>", eos)):
        if at >= 0:
            word = next(word for word, index in vocab.items() if index == at)
            merges = [pair for pair in merges if word not in (pair[0] + pair[1], *pair)]
            del vocab[word]
            vocab[name] = at
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in vocab if name.startswith("<|")])
    tokenizer.save(str(root / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (root / "tokenizer_config.json").write_text(json.dumps(config))


def _write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """Random tensors, streamed: norms near one, matrices of standard deviation 1 / sqrt(width)."""
    head, _ = _header(shapes, dtype)
    generator = np.random.default_rng(seed)
    with file.open("wb") as out:
        out.write(head)
        for name, shape in shapes.items():
            values = generator.standard_normal(shape, np.float32)
            values = 1 + 0.1 * values if len(shape) <= 1 else values * np.float32(shape[-1] ** -0.5)
            if name.endswith(".dt_bias"):
                values -= 5  # small time steps, as trained: a state forgotten at once leaves norms only rounding
            values = values.astype(np.float32)
            out.write(_bfloat16(values).data if dtype == "bfloat16" else values.data)


def _write_sparse(root: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> None:
    """Shards of zeros that take no disk, and their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if _header(shards[-1], dtype)[1] >= shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for number, shard in enumerate(shards, 1):
        head, size = _header(shard, dtype)
        file = root / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as out:
            out.write(head)
            out.truncate(len(head) + size)
        places |= dict.fromkeys(shard, file.name)
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    """The header of a safetensors file with these tensors, and the bytes behind it."""
    size, kind = (2, "BF16") if dtype == "bfloat16" else (4, "F32")
    header, at = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape)) * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, at


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as uint16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: python -m bench.checkpoints {'|'.join(SHAPES)} OUT")
    print(write_checkpoint(sys.argv[2], SHAPES[sys.argv[1]]))
