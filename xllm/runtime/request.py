"""What goes into the engine and what comes out: sampling parameters, a request, one output per generated token (or
one that has the row of a prompt).

A request ends with exactly one `TokenOutput` that has a `finish_reason`; nothing follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from xllm.runtime.errors import RequestRefused
from xllm.runtime.urgency import ORDINARY, Urgency

if TYPE_CHECKING:
    from xllm.runtime.beams import BeamParams, Found

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Matcher(Protocol):
    """Where one sequence stands in its grammar. Raises ValueError when it cannot go on."""

    def take(self, tokens: Sequence[int]) -> None:
        """These came next."""
        ...

    def fill(self, mask: np.ndarray) -> None:
        """Sets bit t % 32 of word t // 32 (uint32) for each token that may come next; the end tokens when the text is
        complete."""
        ...


class Grammar(Protocol):
    """What form an answer must have, compiled; shared by all who ask for the same."""

    def start(self) -> Matcher:
        """A matcher at the beginning; the same tokens lead every matcher to the same masks."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Values out of range raise RequestRefused (invalid_parameter) naming the field.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. `max_tokens` None means up to the context limit.
    `min_tokens` generated tokens must exist before an EOS or stop id ends the request. `logprobs` None is off, k asks
    for the chosen token and the k best ones, of the distribution as the model gives it ("raw") or as it is drawn from
    ("processed"; a greedy row's is the one of temperature 1). `seed` None lets the sampler choose one. With a `grammar`
    a token is drawn among those it allows, before everything else; an end token it forces ends the request before
    `min_tokens` too. Of `bad_words` (token ids of each) the last token is never drawn where those before it were just
    generated; `allowed_token_ids` leave no others. A request they leave nothing to draw ends with nothing_allowed.
    `prompt_logprobs` k asks for the logprobs of the prompt's tokens, and the k best at each place; the prompt is then
    computed whole, whatever is cached of it, and logits for all of its places.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, math.inf, finite=True)
        _within("top_k", self.top_k, 0, math.inf)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(self, name), -math.inf, math.inf, finite=True)
        _within("repetition_penalty", self.repetition_penalty, 0.0, math.inf, finite=True)
        if self.repetition_penalty == 0:
            raise RequestRefused("invalid_parameter", "repetition_penalty must be above 0")
        if self.grammar is not None and self.ignore_eos:
            raise RequestRefused("invalid_parameter", "ignore_eos cannot be combined with a grammar, which ends by EOS")
        _within("min_tokens", self.min_tokens, 0, math.inf)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, math.inf)
            _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _within(name, count, 0, math.inf)
        if self.logprobs_mode not in ("raw", "processed"):
            raise RequestRefused("invalid_parameter", f"logprobs_mode is {self.logprobs_mode!r}, not raw or processed")
        if not all(self.bad_words):
            raise RequestRefused("invalid_parameter", "bad_words holds a word without tokens")
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise RequestRefused("invalid_parameter", "allowed_token_ids is empty: nothing could be drawn")
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -math.inf, math.inf, finite=True)

    @property
    def looks_back(self) -> bool:
        """Does a draw depend on which tokens were generated before it, and not just on how many?"""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0) or bool(self.bad_words) or self.grammar is not None


def _within(name: str, value: float, low: float, high: float, finite: bool = False) -> None:
    if not low <= value <= high or (finite and math.isinf(value)):
        raise RequestRefused("invalid_parameter", f"{name} is {value}, allowed is {low} to {high}, finite")


class Group:
    """Requests whose answers are one: the same weights compute all of them. begun: one of them has a token."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun = False


@dataclass(frozen=True)
class Request:
    """One text to generate. `id` is unique among live requests; `sample_index` tells the samples of one prompt
    apart for the random numbers; `arrival` is the time of the engine's clock in seconds, 0 for when the engine
    gets it (the order of arrival is that of `submit` all the same). Requests of different `cache_salt` (the tenant)
    share no cached prefix. `urgency` decides how it is scheduled, and no token. With `beams` it is a search: what is
    found comes whole, with its end."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    group: Group | None = field(default=None, compare=False)
    beams: BeamParams | None = None
    urgency: Urgency = ORDINARY


class PromptToken(NamedTuple):
    """A token of a prompt, given all before it. rank: 1 where no token is more likely. best: (id, logprob)."""

    token: int
    logprob: float
    rank: int
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class PromptLogprobs:
    """Of the tokens of a prompt from place `start` on: float32 [R] logprobs (NaN: its logits hold NaN or infinity),
    int32 [R] ranks, and int32 and float32 [R, K] of the best tokens (id -1: there are no more)."""

    start: int
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        return self.logprobs, self.ranks, self.top_ids, self.top_logprobs

    def tokens(self, prompt: Sequence[int]) -> list[PromptToken]:
        """One by one."""
        return [
            PromptToken(token, logprob, rank, tuple((i, p) for i, p in zip(ids, best, strict=True) if i >= 0))
            for token, logprob, rank, ids, best in zip(
                prompt[self.start :], *(c.tolist() for c in self.columns), strict=True
            )
        ]


def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
    """Consecutive parts of one prompt as one; a part that starts again before an earlier one's end replaces it."""
    kept: list[PromptLogprobs] = []
    for part in reversed(parts):
        if not kept or part.start < kept[0].start:
            size = kept[0].start - part.start if kept else len(part.ranks)
            kept.insert(0, PromptLogprobs(part.start, *(column[:size] for column in part.columns)))
    columns = [np.concatenate([part.columns[at] for part in kept]) for at in range(4)]
    return PromptLogprobs(kept[0].start, *columns)


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token, or the end of a request.

    `index` counts generated tokens from 0; a token that ends the request by EOS or stop id is delivered with
    finish_reason "stop". `token` is None when the end brings no token (cancelled, error). `error` is "code: message".
    `row` is float32 [N], all that a request to a program of embeddings or scores gets, with finish_reason "stop".
    `cached_tokens` of the prompt were found in the prefix cache. `weights`: the version that all of it was computed
    with. `prompt` is with the first token, where asked for. `found`: the results of a search, the best first.
    `queued`: seconds until it was admitted to a step.
    """

    request_id: str
    token: int | None
    index: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    prompt_tokens: int = 0
    row: np.ndarray | None = field(default=None, compare=False)
    weights: str = ""
    prompt: PromptLogprobs | None = field(default=None, compare=False)
    found: tuple[Found, ...] = ()
    queued: float = field(default=0.0, compare=False)
