"""How good a checkpoint is on prompts training never sees: held-out loss, and how many answers the checker accepts."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from xllm.embedded.dialogue import (
    QUESTION_KINDS,
    SPLIT_TOPICS,
    TOPICS,
    Turn,
    ask_about,
    chat,
    check_story,
    converse,
    give_story,
    tell,
)
from xllm.embedded.grammar import Story, read_story
from xllm.embedded.text import END, END_OF_TEXT, START, segments, token_id


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Tokenizer, conversations: int, seed: int) -> dict[str, float]:
    """Mean negative log-likelihood in nats per token over unseen conversations of two stories each.

    "all": every token but the first; "answers": the assistant's, of which "stories" and "questions" are shares, if any.
    """
    rng = random.Random(f"{seed}/held-out")
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for _ in range(conversations):
        parts = list(segments(tokenizer, converse(rng, stories=2, unseen=True)))
        ids = torch.tensor([[token for part in parts for token in part.ids]])
        kinds = [part.answer for part in parts for _ in part.ids]
        losses = F.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none").tolist()
        for loss, kind in zip(losses, kinds[1:], strict=True):
            groups = ["all"]
            if kind is not None:
                groups += ["answers"] + (["stories"] if kind in TOPICS else [])
                groups += ["questions"] if kind in QUESTION_KINDS else []
            for group in groups:
                sums[group] += loss
                counts[group] += 1
    found = [group for group in ("all", "answers", "stories", "questions") if counts[group]]
    return {group: sums[group] / counts[group] for group in found}


@torch.inference_mode()
def reply(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[list[dict[str, str]]],
    max_tokens: int = 128,
    temperature: float = 0.0,
) -> list[str]:
    """The model's replies to lists of messages, greedy unless a temperature is given; batched, padded on the left."""
    pad, end = token_id(tokenizer, END_OF_TEXT), token_id(tokenizer, END)
    replies: dict[int, str] = {}
    texts = ["".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in p) + f"{START}assistant\n" for p in prompts]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    for begin in range(0, len(order), 64):
        batch = order[begin : begin + 64]
        width = max(len(encoded[i]) for i in batch)
        rows = [[pad] * (width - len(encoded[i])) + encoded[i] for i in batch]
        mask = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        out = model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            **sampling,
        )
        for i, row in zip(batch, out.tolist(), strict=True):
            generated = row[width:]
            generated = generated[: generated.index(end)] if end in generated else generated
            replies[i] = tokenizer.decode(generated, skip_special_tokens=False)
    return [replies[i] for i in range(len(prompts))]


@dataclass
class Tally:
    """Answers to prompts of one kind: how many, and a complaint for each wrong one."""

    asked: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, complaint: str | None) -> None:
        self.asked += 1
        self.wrong += [complaint] if complaint else []

    @property
    def right(self) -> float:
        """Share of right answers; 0 if nothing could be asked."""
        return 1 - len(self.wrong) / self.asked if self.asked else 0.0


def tallies(model: Any, tokenizer: Tokenizer, per_kind: int, seed: int, temperature: float = 0.0) -> dict[str, Tally]:
    """Ask `per_kind` unseen prompts of each kind and check the answers.

    Kinds: "story: TOPIC", "question: KIND" (about a story the user tells), "own story" (a question of any kind about
    the story the model has just told), "chat".
    """
    rng = random.Random(f"{seed}/unseen")
    asked: list[tuple[str, Turn, Story | None]] = []
    for _ in range(per_kind):
        asked += [(f"story: {topic}", *tell(rng, topic, unseen=True)) for topic in SPLIT_TOPICS]
        asked += [(f"question: {kind}", *give_story(rng, kind, unseen=True)) for kind in QUESTION_KINDS]
        asked.append(("chat", chat(rng, unseen=True), None))
    replies = reply(model, tokenizer, [_user(turn.user) for _, turn, _ in asked], temperature=temperature)
    result: dict[str, Tally] = defaultdict(Tally)
    told: list[tuple[str, Story]] = []
    for (kind, turn, _), text in zip(asked, replies, strict=True):
        if kind.startswith("story"):
            complaints = check_story(text, turn.user)
            result[kind].add(f"{turn.user} -> {text} ({'; '.join(complaints)})" if complaints else None)
            told += [] if complaints else [(turn.user, Story(text, read_story(text)))]
        else:
            result[kind].add(_differs(turn.user, text, turn.assistant))
    told = rng.sample(told, min(per_kind, len(told)))
    questions = [ask_about(rng, story, rng.choice(QUESTION_KINDS)) for _, story in told]
    prompts = [
        [*_user(request), {"role": "assistant", "content": story.text}, *_user(question.user)]
        for (request, story), question in zip(told, questions, strict=True)
    ]
    replies = reply(model, tokenizer, prompts, temperature=temperature)
    for (_, story), question, text in zip(told, questions, replies, strict=True):
        result["own story"].add(_differs(f"{story.text} {question.user}", text, question.assistant))
    return dict(result)


def _differs(prompt: str, text: str, expected: str) -> str | None:
    return None if text == expected else f"{prompt} -> {text} (not: {expected})"


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]
