"""Beam search: which of all ways to go on are followed, and when a search has found what it returns. What is computed
for it, and where, is not looked at here (see groups).

The definition is that of transformers (5.24): of all continuations the likeliest are looked at; an end among the first
`width` is a result, worth its sum of logprobs over length ** length_penalty; the first `width` that do not end live on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from xllm.runtime.errors import RequestRefused
from xllm.runtime.request import FinishReason, SamplingParams, TokenOutput

MAX_WIDTH = 128


@dataclass(frozen=True)
class BeamParams:
    """`width` beams, of which the best `returned` are answers (None: all). early_stopping: True ends when `width`
    results are there, False when no beam is better than the worst of them at its present length, "never" when none can
    become better (as far as that can be told). Raises RequestRefused naming the field of the API."""

    width: int
    returned: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _require(1 <= self.width <= MAX_WIDTH, f"beam_width is {self.width}, allowed is 1 to {MAX_WIDTH}")
        text = f"num_return_sequences is {self.returned}, allowed is 1 to beam_width ({self.width})"
        _require(self.returned is None or 1 <= self.returned <= self.width, text)
        _require(-10 <= self.length_penalty <= 10, f"length_penalty is {self.length_penalty}, allowed is -10 to 10")
        text = f"early_stopping is {self.early_stopping!r}, allowed are true, false and never"
        _require(self.early_stopping in (True, False, "never"), text)

    @property
    def count(self) -> int:
        """Answers of a prompt."""
        return self.returned or self.width


class Beam(NamedTuple):
    """Generated tokens, for each its logprob and the best ones at its place; `total` is the sum of the logprobs."""

    total: float = 0.0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    best: tuple[tuple[tuple[int, float], ...], ...] = ()


class Found(NamedTuple):
    """A result. `serial`: results of equal score keep their order."""

    score: float
    serial: int
    beam: Beam
    finish_reason: FinishReason

    def outputs(self, logprobs: int | None) -> Iterable[TokenOutput]:
        """As an engine gives the tokens of a request that asks for so many logprobs."""
        beam, last = self.beam, len(self.beam.tokens) - 1
        for at, (token, logprob, best) in enumerate(zip(beam.tokens, beam.logprobs, beam.best, strict=True)):
            known = (None, ()) if logprobs is None else (logprob, best)
            yield TokenOutput("", token, at, *known, self.finish_reason if at == last else None)


class BeamSearch:
    """The search of one prompt. While `live` is not empty: `advance` by what may come next. `parents` are the places
    that those which live now had before.

    The parameters say how long answers get, what ends them, and how many of the best logprobs each place keeps.
    """

    def __init__(self, params: SamplingParams, beams: BeamParams, eos_ids: Iterable[int], max_tokens: int) -> None:
        self._beams, self._max_tokens = beams, max_tokens
        self._ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        self._shown = params.logprobs or 0
        self._results: list[Found] = []  # a heap, the worst first
        self._serial = 0
        self.live: list[Beam] = [Beam()]
        self.parents: list[int] = []

    @property
    def wanted(self) -> int:
        """The best continuations of each beam that are looked at: with fewer, an end might push a beam out."""
        return self._beams.width + max(self._beams.width, len(self._ends))

    @property
    def common(self) -> tuple[int, ...]:
        """What all that live begin with."""
        first, last = min(beam.tokens for beam in self.live), max(beam.tokens for beam in self.live)
        differ = (at for at, (one, other) in enumerate(zip(first, last, strict=True)) if one != other)
        return first[: next(differ, len(first))]

    def advance(self, best: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Takes the likeliest next tokens of each beam that lives, best first, with their logprobs."""
        width, length = self._beams.width, len(self.live[0].tokens) + 1
        following: list[Beam] = []
        parents: list[int] = []
        chosen = likeliest([beam.total for beam in self.live], best, width * (1 + max(1, len(self._ends))))
        for place, (total, at, rank) in enumerate(chosen):
            (token, logprob), parent = best[at][rank], self.live[at]
            ends = token in self._ends
            if (ends or length == self._max_tokens) and place >= width:
                continue
            shown = tuple(best[at][: self._shown])
            beam = Beam(total, (*parent.tokens, token), (*parent.logprobs, logprob), (*parent.best, shown))
            if ends or length == self._max_tokens:
                self._keep(beam, "stop" if ends else "length")
            elif len(following) < width:
                following.append(beam)
                parents.append(at)
        goes_on = self._goes_on(following, length)
        self.live, self.parents = (following, parents) if goes_on else ([], [])

    def results(self) -> list[Found]:
        """What was found, the best first."""
        return sorted(self._results, reverse=True)[: self._beams.count]

    def _keep(self, beam: Beam, reason: FinishReason) -> None:
        score = beam.total / len(beam.tokens) ** self._beams.length_penalty
        self._serial -= 1
        heapq.heappush(self._results, Found(score, self._serial, beam, reason))
        if len(self._results) > self._beams.width:
            heapq.heappop(self._results)

    def _goes_on(self, beams: Sequence[Beam], length: int) -> bool:
        if not beams or len(self._results) < self._beams.width:
            return bool(beams)
        penalty, stopping = self._beams.length_penalty, self._beams.early_stopping
        reach = self._max_tokens if stopping == "never" and penalty > 0 else length
        return stopping is not True and beams[0].total / reach**penalty > self._results[0].score


def asked(params: SamplingParams, wanted: int) -> SamplingParams:
    """What tells how a beam may go on. Penalties, biases, bad words, allowed ids, min_tokens and a grammar hold for
    beams too, and logprobs are those of what they leave. Temperature and what follows it are not looked at."""
    plain = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    return replace(params, **plain, logprobs=wanted, logprobs_mode="processed")


def likeliest(
    totals: Sequence[float], best: Sequence[Sequence[tuple[int, float]]], count: int
) -> list[tuple[float, int, int]]:
    """The `count` likeliest continuations, best first, as (total, beam, rank): beam i goes on with best[i][rank], whose
    logprobs fall. Of equal ones the one of the first beam, then of the first rank. A beam is left at the first that
    does not get in, since none of its others will."""
    heap: list[tuple[float, int, int]] = []  # the worst first
    for at, (total, ranked) in enumerate(zip(totals, best, strict=True)):
        for rank, (_, logprob) in enumerate(ranked):
            item = (total + logprob, -at, -rank)
            if len(heap) < count:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)
            else:
                break
    return [(total, -at, -rank) for total, at, rank in sorted(heap, reverse=True)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestRefused("invalid_parameter", message)
