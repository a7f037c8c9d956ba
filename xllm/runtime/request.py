"""What goes into the engine and what comes out: sampling parameters, a request, one output per generated token (or
one that has the row of a prompt).

A request ends with exactly one `TokenOutput` that has a `finish_reason`; nothing follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from xllm.runtime.errors import RequestRefused
from xllm.runtime.urgency import ORDINARY, Urgency

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
    for the chosen token and the k best ones. `seed` None lets the sampler choose one. With a `grammar` a token is drawn
    among those it allows, before everything else; an end token it forces ends the request before `min_tokens` too.
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
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, math.inf)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -math.inf, math.inf, finite=True)


def _within(name: str, value: float, low: float, high: float, finite: bool = False) -> None:
    if not low <= value <= high or (finite and math.isinf(value)):
        raise RequestRefused("invalid_parameter", f"{name} is {value}, allowed is {low} to {high}, finite")


@dataclass(frozen=True)
class Request:
    """One sequence to generate. `id` is unique among live requests; `sample_index` tells the samples of one prompt
    apart for the random numbers; `arrival` is the time of the engine's clock in seconds, 0 for when the engine
    gets it (the order of arrival is that of `submit` all the same). Requests of different `cache_salt` (the tenant)
    share no cached prefix. `urgency` decides how it is scheduled, and no token."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    sample_index: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    urgency: Urgency = ORDINARY


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token, or the end of a request.

    `index` counts generated tokens from 0; a token that ends the request by EOS or stop id is delivered with
    finish_reason "stop". `token` is None when the end brings no token (cancelled, error). `error` is "code: message".
    `row` is float32 [N], all that a request to a program of embeddings or scores gets, with finish_reason "stop".
    `cached_tokens` of the prompt were found in the prefix cache.
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
