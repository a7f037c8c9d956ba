"""Decides what an answer has to be able to do, whatever API it is of: be sent whole, or as the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm.runtime.request import PromptLogprobs
from xllm.service.errors import ApiError
from xllm.service.generation import Delta
from xllm.service.parsers.parts import Part


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int


@dataclass
class Whole:
    """A choice on its way to be sent whole. logprobs: what the format makes of each token."""

    parts: list[Part] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None
    prompt: Any = None  # what the format makes of the logprobs of its prompt, where asked for


class Format:
    """The bodies of one answer: `gather` and `whole`, or `first`, `chunk` for each delta, and `last` or `failed`."""

    idle = b": keep-alive\n\n"  # keeps the connection of a stream that has nothing to say
    weights = ""  # version of those that the answer is computed with, once something of it is there
    _id = ""

    @property
    def id(self) -> str:
        """What the client knows the answer by."""
        return self._id

    def gather(self, choice: Whole, delta: Delta) -> None:
        """Adds to an answer that is sent whole."""
        choice.parts.extend(delta.parts)
        choice.finish_reason, choice.stop = delta.finish_reason, delta.stop

    def prompt(self, found: PromptLogprobs | None, prompt: Sequence[int]) -> Any:
        """The logprobs of a prompt."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        """The JSON of the answer."""
        raise NotImplementedError

    def first(self, choices: int, usage: Usage) -> bytes:
        """What a stream opens with."""
        raise NotImplementedError

    def chunk(self, index: int, delta: Delta) -> bytes:
        """The events for what one step added to a choice."""
        raise NotImplementedError

    def last(self, usage: Usage) -> bytes:
        """What a stream closes with."""
        raise NotImplementedError

    def failed(self, error: ApiError, request_id: str) -> bytes:
        """What a stream closes with that fails once it has begun."""
        raise NotImplementedError
