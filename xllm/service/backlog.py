"""Decides who may join the queue: a request whose turn would come too late is told so at once, and when to come
again, because one that waits for nothing makes those behind it late as well."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from xllm.runtime import Request
from xllm.runtime.pricing import Prices, Steps, Work
from xllm.service.errors import Hint, busy

HALF_LIFE = 20.0  # seconds of work after which what was seen counts half, or less:
HORIZON = 2.0  # times the longest wait, and seconds at least. What slots that were free have shown is forgotten by then
BELIEVED = 1.0  # seconds of work that the prices count for before there is evidence; fading as that does,
STARTS = 4.0  # and half as much after so many prompts: a small model lets hundreds in within a second
LONGEST_HINT = 600.0
RECENT = 0.05  # weight of the last preparation, and of the last answer's length


class Entry(NamedTuple):
    """A request that was accepted. answer: tokens that it is taken to get."""

    work: Work
    answer: float


class Backlog:
    """What was accepted, priced by the cost model: prompts that have no first output yet, and who decodes beside them.

    Time in which somebody waited is compared with what was predicted of those that started, and the ratio corrects what
    is told of those ahead: a model of another machine is right soon. Requests that are still prepared are ahead too.
    max_wait: seconds that what is ahead of a request may take; None is no limit. others: backlogs of the models whose
    steps take turns with these; this one may be among them. Belongs to the event loop."""

    def __init__(
        self,
        max_wait: float | None = None,
        prices: Prices | None = None,
        others: Sequence[Backlog] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_wait, self._prices, self._others, self._clock = max_wait, prices or Prices(), others, clock
        self._waiting: dict[str, Entry] = {}
        self._running: dict[str, Entry] = {}
        self._ahead = Work()
        self._prompts = self._answers = 0.0  # tokens of all of both
        self._answer = float(self._prices.answer)
        self._seen = clock()
        self._since = 0.0  # seconds of waiting since the last start
        self._busy = self._done = 0.0  # seconds of waiting until then, and those that were predicted; older ones fading
        self._believed = BELIEVED
        self._half_life = HALF_LIFE if max_wait is None else min(HALF_LIFE, HORIZON * max(1.0, max_wait))
        self._held = False
        self._preparing, self._prepare_seconds = 0, 0.0  # requests, and what one of them takes of late

    @property
    def tokens(self) -> int:
        """Of prompts that wait for their first output."""
        return self._ahead.tokens

    @property
    def seconds(self) -> float:
        """What a request that comes now would wait for its turn."""
        self._elapse()
        if not self._waiting:
            return 0.0
        before = self._ratio(0.0, 0.0)
        whole = self._predicted(self._ahead)
        # The first in line is being computed, and is not taken to be nearly done for ever.
        done = min(self._since / before, self._predicted(next(iter(self._waiting.values())).work), whole)
        return (whole - done) * self._ratio(self._since, done)

    @property
    def ratio(self) -> float:
        """Seconds that one predicted second took of late."""
        return self._ratio(0.0, 0.0)

    def add(self, requests: Sequence[Request]) -> None:
        """These were asked for. Raises ApiError 429 when what is ahead of them takes too long. Offline ones are ahead
        of nobody, and wait as long as they have to."""
        if all(request.urgency.offline for request in requests):
            return
        self.check(0.0)
        self._elapse()
        for request in requests:
            most = request.params.max_tokens
            entry = Entry(self._prices.of(len(request.prompt)), min(self._answer, most or math.inf))
            self._count(entry, 1)
            if request.beams is not None:  # its outputs all come at its end: nobody sees when its prompt is computed
                self._running[request.id] = entry
                continue
            self._waiting[request.id] = entry
            self._ahead = self._ahead.plus(entry.work)

    def check(self, waited: float | None = None) -> None:
        """Raises ApiError 429 when the turn of a request would come too late. waited: seconds that it has waited
        for its preparation; without, others are prepared before it. That needs nothing of the request, so that a
        refusal costs next to nothing."""
        if self._max_wait is None:
            return
        wait = self.seconds + (self._preparing * self._prepare_seconds if waited is None else waited)
        if wait <= self._max_wait:
            return
        over = min(math.ceil(wait - self._max_wait), LONGEST_HINT)
        ahead = f"{self.tokens} prompt tokens and {self._preparing} requests to prepare wait already"
        hint = Hint(ahead, "xllm serve --max-wait", "retry later, or raise the limit")
        raise busy(f"its turn would come in about {wait:.1f} s, the limit is {self._max_wait:g} s", hint, over)

    @contextmanager
    def preparing(self, workers: int) -> Iterator[Callable[[float], None]]:
        """Around the preparation of a request by one of so many; it is told the seconds that took without waiting."""

        def took(seconds: float) -> None:
            share = seconds / workers
            self._prepare_seconds += (share - self._prepare_seconds) * RECENT  # the first one loads what others find

        self._preparing += 1
        try:
            yield took
        finally:
            self._preparing -= 1

    def hold(self, held: bool) -> None:
        """Nothing is computed: time says nothing of the prices."""
        self._elapse()
        self._held = held

    def started(self, *request_ids: str) -> None:
        """The first outputs of these came, in one step."""
        started = {name: self._waiting[name] for name in request_ids if name in self._waiting}
        if not started:
            return
        self._elapse()
        whole, steps = self._ahead, self._steps(self._ahead)
        before = self._predicted(whole, steps)
        for name, entry in started.items():
            del self._waiting[name]
            self._ahead = self._ahead.less(entry.work)
        fade = 0.5 ** (self._since / self._half_life)
        self._busy = self._busy * fade + self._since
        # Their share of the whole, not what it is less by: of many, the last are said to take longer each than the
        # first, and it is the first who start.
        self._done = self._done * fade + before * steps.share(whole, self._ahead)
        self._believed *= fade * 0.5 ** (len(started) / STARTS)
        self._since = 0.0
        self._running |= started

    def ended(self, request_id: str, tokens: int) -> None:
        """Its answer is complete, with so many tokens."""
        if request_id in self._running and self._prices.answer:
            self._answer += (tokens - self._answer) * RECENT
        self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """It waits no longer, or runs no longer."""
        if (entry := self._running.pop(request_id, None)) is not None:
            self._count(entry, -1)
        elif request_id in self._waiting:
            self._elapse()
            entry = self._waiting.pop(request_id)
            self._ahead = self._ahead.less(entry.work)
            self._count(entry, -1)

    def _count(self, entry: Entry, sign: int) -> None:
        self._prompts += sign * entry.work.tokens
        self._answers += sign * entry.answer

    def _ratio(self, busy: float, done: float) -> float:
        """With so many seconds more, which were predicted to be `done`."""
        return (self._believed + self._busy + busy) / (self._believed + self._done + done)

    def _steps(self, ahead: Work) -> Steps:
        count = max(1, len(self._waiting) + len(self._running))
        return self._prices.steps(ahead, len(self._running), self._prompts / count, self._answers / count)

    def _predicted(self, ahead: Work, own: Steps | None = None) -> float:
        """Seconds until all of `ahead` has started, in steps of its `own`, beside those that decode. A step of each
        other model that has something to do goes between two of these."""
        own = own or self._steps(ahead)
        seconds = own.count * own.seconds + own.after if ahead.prompts else 0.0
        for other in self._others:
            if other is not self and not other._held:
                theirs = other._steps(other._ahead)
                beside = min(own.count, theirs.count)
                seconds += beside * theirs.seconds + (own.count - beside) * theirs.after
        return seconds

    def _elapse(self) -> None:
        """Time in which nobody waited says nothing of the prices."""
        now = self._clock()
        if not self._waiting:
            self._since = 0.0
        elif not self._held:
            self._since += now - self._seen
        self._seen = now
