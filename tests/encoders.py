"""Small random encoders and classifiers with their checkpoints, and what transformers computes for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB = 300
_SIZES: Mapping[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": VOCAB,
    "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
_ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 98, "type_vocab_size": 1}
_MODERN = {
    "global_attn_every_n_layers": 2, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2,
    "classifier_pooling": "mean",
}  # fmt: skip
_QWEN3 = {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None}
# model_type, architecture, sizes; pooling and normalisation as sentence-transformers says them.
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any], str, bool]] = {
    "bert": ("bert", "BertModel", {}, "mean", True),
    "bert-masked-lm": ("bert", "BertForMaskedLM", {}, "cls", False),
    "roberta": ("roberta", "RobertaModel", _ROBERTA, "mean", True),
    "modernbert": ("modernbert", "ModernBertModel", _MODERN, "cls", True),
    "qwen3-embedding": ("qwen3", "Qwen3ForCausalLM", _QWEN3, "lasttoken", True),
    "bert-classifier": ("bert", "BertForSequenceClassification", {}, "", False),
    "bert-reranker": ("bert", "BertForSequenceClassification", {"num_labels": 1}, "", False),
    "roberta-classifier": ("roberta", "RobertaForSequenceClassification", _ROBERTA, "", False),
    "modernbert-classifier": ("modernbert", "ModernBertForSequenceClassification", _MODERN, "", False),
    "qwen3-reranker": ("qwen3", "Qwen3ForSequenceClassification", _QWEN3, "", False),
}  # fmt: skip


def write_model(folder: Path, name: str) -> Path:
    """The checkpoint of MODELS[name] as its makers would publish it. Returns the folder."""
    import transformers

    model_type, architecture, sizes, pooling, normalize = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **sizes})
    torch.manual_seed(len(name))
    model = getattr(transformers, architecture)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, biases are zero and norms are one
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.03))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if pooling:
        _write_modules(folder, pooling, normalize)
    return folder


def _write_modules(folder: Path, pooling: str, normalize: bool) -> None:
    """The files sentence-transformers puts beside a model."""
    named = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    (folder / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 48, **{f"pooling_mode_{mode}": mode == named for mode in modes}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


def write_tokenizer(folder: Path) -> None:
    """Words of one byte, and [CLS] text [SEP] (text [SEP]) around them as encoders want."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(("[PAD]", "[CLS]", "[SEP]", *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def reference(folder: Path, name: str, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """What transformers gives for each prompt alone, pooled and normalised as sentence-transformers defines it. Ids
    from VOCAB on are tokens of the second segment.
    """
    import transformers

    _, architecture, _, pooling, normalize = MODELS[name]
    kind = transformers.AutoModel if pooling else getattr(transformers, architecture)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            given = {"input_ids": ids % VOCAB, "attention_mask": torch.ones_like(ids)}
            if max(prompt) >= VOCAB:
                given["token_type_ids"] = ids // VOCAB
            if not pooling:
                rows.append(model(**given).logits[0])
                continue
            hidden = model(**given).last_hidden_state[0]
            row = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
            rows.append(torch.nn.functional.normalize(row, dim=0) if normalize else row)
    return torch.stack(rows).numpy()
