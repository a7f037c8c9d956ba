"""How conversations become tokens: byte-level BPE, ChatML, and which tokens of a conversation count as answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from xllm.embedded.dialogue import Conversation, converse

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one conversation. answer: the kind of turn the tokens answer, None for everything else."""

    ids: list[int]
    answer: str | None


def train_tokenizer(seed: int, vocab: int, conversations: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` entries, from training conversations. Same seed, same tokenizer."""
    rng = random.Random(f"{seed}/tokenizer")
    texts = (m["content"] for _ in range(conversations) for m in ({"content": "system user assistant"}, *_said(rng)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _said(rng: random.Random) -> list[dict[str, str]]:
    return converse(rng, stories=1).messages()


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found


def segments(tokenizer: Tokenizer, conversation: Conversation) -> Iterator[Segment]:
    """The conversation as the chat template writes it, cut where answers begin and end (END belongs to the answer)."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    if conversation.system:
        yield Segment(encode(f"{START}system\n{conversation.system}{END}\n"), None)
    for turn in conversation.turns:
        yield Segment(encode(f"{START}user\n{turn.user}{END}\n{START}assistant\n"), None)
        yield Segment(encode(f"{turn.assistant}{END}"), turn.kind)
        yield Segment(encode("\n"), None)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """tokenizer.json, tokenizer_config.json (with the chat template) and chat_template.jinja."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [START, END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
