"""Decides what an answer contains: turns engine outputs of one sequence into text that may be shown, the logprobs that
go with it, and how it ended. Nothing of a stop string leaves, neither as text nor as the token of a logprob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from xllm.runtime import TokenOutput
from xllm.service.errors import from_output
from xllm.service.parsers.parts import Call, Part
from xllm.service.parsers.reading import PLAIN, Reading
from xllm.service.text import StopStrings
from xllm.service.tokenizer import TextCodec


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token. offset: characters of the answer before it. thinking: it is of the reasoning."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int
    thinking: bool


class Delta(NamedTuple):
    """What one step added to a choice (a tuple: one is built per token). text: as the model wrote it. parts: the same
    told apart. finish_reason: None, "stop", "length" or "tool_calls". stop: the stop string that ended it."""

    text: str
    parts: tuple[Part, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    stop: str | None = None


class Choice:
    """The answer of one sequence as it grows."""

    def __init__(
        self, codec: TextCodec, stops: tuple[str, ...], skip_special_tokens: bool, reading: Reading = PLAIN
    ) -> None:
        self._detokenizer = codec.detokenizer(skip_special_tokens, reading.markers)
        self._reader = reading.reader()
        self._called = False
        self._stops = StopStrings(stops)
        self._decoded = 0  # characters of all tokens so far
        self._shown = 0  # characters that left
        self._waiting: list[TokenLogprob] = []
        self.tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.weights = ""  # the version that it is computed with
        self.likelihood = 0.0  # sum of the logprobs of its tokens, where they are asked for
        self.finish_reason: str | None = None
        self.cut = False  # the answer has ended, the engine still works on it

    def push(self, output: TokenOutput) -> Delta:
        """Takes one output; must not be called after the finish. Raises ApiError when the sequence failed."""
        if output.finish_reason in ("error", "cancelled"):
            raise from_output(output.error or "shutting_down: the request was cancelled by the server")
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        self.weights = output.weights
        # The token that stops an answer (EOS or a stop id) counts, but is not part of its text.
        stopper = output.finish_reason == "stop"
        piece = ""
        if output.token is not None:
            self.tokens += 1
            self.likelihood += output.logprob or 0.0
            thinking = self._reader.thinking
            self.reasoning_tokens += thinking
            if not stopper:
                if output.logprob is not None:
                    known = output.token, output.logprob, output.top_logprobs
                    self._waiting.append(TokenLogprob(*known, self._decoded, thinking))
                piece = self._detokenizer.push(output.token)
        if output.finish_reason is not None:
            piece += self._detokenizer.finish()
        self._decoded += len(piece)
        return self._show(piece, output.finish_reason)

    def _show(self, piece: str, finish_reason: str | None) -> Delta:
        result = self._stops.push(piece)
        text = result.text
        if result.stopped is not None:
            self.cut = finish_reason is None
            finish_reason = "stop"
        elif finish_reason is not None:
            text += self._stops.finish()
        self._shown += len(text)
        released = self._release(everything=finish_reason is not None and result.stopped is None)
        parts = self._reader.push(text) if text else []
        if self._reader.ended:
            self.cut |= finish_reason is None
            finish_reason = "stop"
        elif finish_reason is not None:
            parts += self._reader.finish()
        self._called |= any(isinstance(part, Call) for part in parts)
        calls = self._called and not self._reader.cut  # one that broke off is nothing to carry out
        self.finish_reason = "tool_calls" if calls and finish_reason == "stop" else finish_reason
        return Delta(text, tuple(parts), released, self.finish_reason, result.stopped)

    def _release(self, everything: bool) -> tuple[TokenLogprob, ...]:
        """The logprobs whose token begins in text that has left; all of them when nothing is held back."""
        if not self._waiting:
            return ()
        whole = everything or (self._shown == self._decoded and not self._detokenizer.pending)
        ready = [item for item in self._waiting if whole or item.offset < self._shown]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)
