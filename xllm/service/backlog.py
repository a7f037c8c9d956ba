"""Decides who may join the queue: a request whose first token would come too late is told so at once, and when to come
again, because one that waits for nothing makes those behind it late as well."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from xllm.runtime import Request
from xllm.service.errors import Hint, busy

HALF_LIFE = 20.0  # seconds of work after which what was seen counts half
EVIDENCE = 2.0  # seconds of work before anything is said of the rate
LONGEST_HINT = 600.0


class Backlog:
    """Prompt tokens that were accepted and have no first output yet, and how fast prompts of late got theirs: slots,
    pages and decodes in between are in that rate. max_wait: seconds that what is ahead of a request may take; None is
    no limit. Belongs to the event loop."""

    def __init__(self, max_wait: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_wait, self._clock = max_wait, clock
        self._ahead: dict[str, int] = {}
        self._seen = clock()
        self._busy = self._started = 0.0  # seconds and tokens, older ones fading
        self._held = False
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """What a request that comes now would wait for its turn; 0 where nothing is known."""
        self._elapse()
        return self.tokens * self._busy / self._started if self._busy >= EVIDENCE and self._started else 0.0

    def add(self, requests: Sequence[Request]) -> None:
        """These were asked for. Raises ApiError 429 when what is ahead of them takes too long. Offline ones are ahead
        of nobody, and wait as long as they have to."""
        if all(request.urgency.offline for request in requests):
            return
        wait = self.seconds
        if self._max_wait is not None and wait > self._max_wait:
            over = min(math.ceil(wait - self._max_wait), LONGEST_HINT)
            hint = Hint(
                f"{self.tokens} prompt tokens wait already", "xllm serve --max-wait", "retry later, or raise the limit"
            )
            raise busy(f"the first token would take about {wait:.0f} s, the limit is {self._max_wait:g} s", hint, over)
        for request in requests:
            self._ahead[request.id] = len(request.prompt)
            self.tokens += len(request.prompt)

    def hold(self, held: bool) -> None:
        """Nothing is computed: time says nothing of the rate."""
        self._elapse()
        self._held = held

    def started(self, request_id: str) -> None:
        """Its first output came."""
        if (tokens := self._ahead.get(request_id)) is not None:
            self._elapse()
            self._started += tokens
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """It waits no longer."""
        self.tokens -= self._ahead.pop(request_id, 0)

    def _elapse(self) -> None:
        """Time in which nobody waited says nothing of the rate."""
        now = self._clock()
        if self._ahead and not self._held:
            fade = 0.5 ** ((now - self._seen) / HALF_LIFE)
            self._busy = self._busy * fade + now - self._seen
            self._started *= fade
        self._seen = now
