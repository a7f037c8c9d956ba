"""Decides who may join the queue: a request whose first token would come too late is told so at once, and when to come
again, because one that waits for nothing makes those behind it late as well."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xllm.runtime import Request
from xllm.service.errors import Hint, busy

HALF_LIFE = 20.0  # seconds of work after which what was seen counts half, or less:
HORIZON = 2.0  # times the longest wait, and seconds at least. What slots that were free have shown is forgotten by then
EVIDENCE = 2.0  # seconds of work before anything is said of the rate,
STARTS = 16.0  # or so many prompts: a small model has let hundreds in by then
LONGEST_HINT = 600.0
RECENT = 0.05  # weight of the last preparation


class Backlog:
    """Prompt tokens that were accepted and have no first output yet, and how fast prompts of late got theirs: slots,
    pages and decodes in between are in that rate. Requests that are still prepared are ahead too. max_wait: seconds
    that what is ahead of a request may take; None is no limit. Belongs to the event loop."""

    def __init__(self, max_wait: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait, self._clock = max_wait, clock
        self._ahead: dict[str, int] = {}
        self._seen = clock()
        self._busy = self._started = self._starts = 0.0  # seconds, tokens and prompts, older ones fading
        self._half_life = HALF_LIFE if max_wait is None else min(HALF_LIFE, HORIZON * max(1.0, max_wait))
        self._held = False
        self._preparing, self._prepare_seconds = 0, 0.0  # requests, and what one of them takes of late
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """What a request that comes now would wait for its turn; 0 where nothing is known."""
        self._elapse()
        known = self._started and (self._busy >= EVIDENCE or self._starts >= STARTS)
        return self.tokens * self._busy / self._started if known else 0.0

    def add(self, requests: Sequence[Request]) -> None:
        """These were asked for. Raises ApiError 429 when what is ahead of them takes too long. Offline ones are ahead
        of nobody, and wait as long as they have to."""
        if all(request.urgency.offline for request in requests):
            return
        self.check(0.0)
        for request in requests:
            self._ahead[request.id] = len(request.prompt)
            self.tokens += len(request.prompt)

    def check(self, waited: float | None = None) -> None:
        """Raises ApiError 429 when the first token of a request would come too late. waited: seconds that it has waited
        for its preparation; without, others are prepared before it. That needs nothing of the request, so that a
        refusal costs next to nothing."""
        wait = self.seconds + (self._preparing * self._prepare_seconds if waited is None else waited)
        if self._max_wait is None or wait <= self._max_wait:
            return
        over = min(math.ceil(wait - self._max_wait), LONGEST_HINT)
        ahead = f"{self.tokens} prompt tokens and {self._preparing} requests to prepare wait already"
        hint = Hint(ahead, "xllm serve --max-wait", "retry later, or raise the limit")
        raise busy(f"the first token would take about {wait:.1f} s, the limit is {self._max_wait:g} s", hint, over)

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
        """Nothing is computed: time says nothing of the rate."""
        self._elapse()
        self._held = held

    def started(self, request_id: str) -> None:
        """Its first output came."""
        if (tokens := self._ahead.get(request_id)) is not None:
            self._elapse()
            self._started += tokens
            self._starts += 1
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """It waits no longer."""
        self.tokens -= self._ahead.pop(request_id, 0)

    def _elapse(self) -> None:
        """Time in which nobody waited says nothing of the rate."""
        now = self._clock()
        if self._ahead and not self._held:
            fade = 0.5 ** ((now - self._seen) / self._half_life)
            self._busy = self._busy * fade + now - self._seen
            self._started *= fade
            self._starts *= fade
        self._seen = now
