"""Small models as torch exports them, with random weights: true shapes, a few layers, a few channels."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER: dict[str, Any] = {**SMALL, "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8}
TEXT = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}
IMAGE = {"pixel_values": {0: "batch"}}
# Opset, and the dims.
MODELS = {
    "vit": (18, ("batch",)),
    "siglip": (18, ("batch",)),
    "bert": (23, ("batch", "seq")),
    "qwen3": (18, ("batch", "seq")),
    "llama-past": (20, ("batch", "seq", "total", "past")),
    "norms": (18, ("batch", "seq")),
}
PAST = ("k0", "v0", "k1", "v1")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class WithPast(nn.Module):
    """A decoder whose keys and values come in and go out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, k0, v0, k1, v1):
        cache = DynamicCache()
        cache.update(k0, v0, 0)
        cache.update(k1, v1, 1)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        out = self.model(**given)
        held = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return (out.logits, *held[0], *held[1])


class Norms(nn.Module):
    """Layer norms spelled out, as models write them whose norms have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.empty(32)) for _ in range(2)])
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            centred = x - x.mean(-1, keepdim=True)
            normed = scale * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5))
            x = x + self.inner(normed)
        return torch.cat([x[..., 16:], x[..., :16]], -1)


def module(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module called `name`, and which dims of its inputs are free."""
    if name == "vit":
        config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)
        return transformers.ViTModel(config, add_pooling_layer=False), IMAGE
    if name == "siglip":
        return transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**{**SMALL, "num_hidden_layers": 1}, image_size=16, patch_size=4)
        ), IMAGE
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=99, max_position_embeddings=40)), TEXT
    if name == "qwen3":
        return Logits(
            transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**DECODER, "num_hidden_layers": 1}))
        ), TEXT
    if name == "norms":
        return Norms(), {"x": {0: "batch", 1: "seq"}}
    free = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"}}
    held = {key: {0: "batch", 2: "past"} for key in PAST}
    return WithPast(transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))), {**free, **held}


def feeds(name: str, batch: int, seq: int, past: int = 3) -> dict[str, np.ndarray]:
    """Random inputs; where sequences are batched, the second is padded."""
    rng = np.random.default_rng([batch, seq, past])
    if name in ("vit", "siglip"):
        return {"pixel_values": rng.standard_normal((batch, 3, 16, 16), np.float32)}
    if name == "norms":
        return {"x": rng.standard_normal((batch, seq, 32), np.float32)}
    made = {"input_ids": rng.integers(0, 99, (batch, seq)), "attention_mask": np.ones((batch, seq), np.int64)}
    if name == "llama-past":
        made["attention_mask"] = np.ones((batch, past + seq), np.int64)
        made |= {key: rng.standard_normal((batch, 2, past, 8), np.float32) for key in PAST}
    elif batch > 1:
        made["attention_mask"][1, -2:] = 0
    return made


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="xllm-onnx-")


@cache
def exported(name: str) -> Path:
    """The model as torch writes it for its opset, once per test run; treat the file as read-only."""
    folder = Path(_folder().name) / name
    folder.mkdir()
    return export(name, MODELS[name][0], folder)


def export(name: str, opset: int, folder: Path) -> Path:
    """The model in `folder`, as torch writes it for this opset."""
    made, free = module(name)
    torch.manual_seed(0)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
    example = {key: torch.from_numpy(value) for key, value in feeds(name, 2, 5).items()}
    path = folder / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            made.eval(), (), kwargs=example, dynamic_shapes=free, dynamo=True, opset_version=opset, verbose=False
        )
    assert program is not None
    program.save(path)
    return path
