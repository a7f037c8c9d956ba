"""Decides what is measured: plain arithmetic on the event loop. Under which names it is shown, see exposition."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm.service.backlog import Backlog

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
RECENT = 256  # answers whose times are kept one by one
STATUS_NAMES = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "unauthenticated",
    404: "invalid_argument",
    405: "invalid_argument",
    408: "deadline_exceeded",
    409: "invalid_argument",
    413: "invalid_argument",
    415: "invalid_argument",
    429: "resource_exhausted",
    499: "cancelled",
    501: "unimplemented",
    503: "unavailable",
    504: "deadline_exceeded",
}
STATUSES = ("ok", *dict.fromkeys(STATUS_NAMES.values()), "unknown")


class Histogram:
    """Counts per bucket, upper bounds inclusive."""

    def __init__(self, bounds: Sequence[float], counts: Sequence[int] = (), sum_: float = 0.0) -> None:
        self._bounds = bounds
        self._counts = list(counts) or [0] * (len(bounds) + 1)
        self._sum = sum_

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self, scale: float) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, and the sum; `scale` 1000 turns seconds into milliseconds."""
        total, result = 0, []
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            result.append(("+Inf" if bound is None else f"{bound * scale:g}", float(total)))
        return result, self._sum * scale


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system


class Front:
    """What requests meet before a model: the models' names, counters of the server, whether it still takes requests."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.backlogs: list[Backlog] = []
        self.requests_in = 0
        self.concurrent = 0
        self.statuses: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()  # by the code of the error
        self.draining = False
        self._began, self._used = time.monotonic(), _processor_seconds()

    @property
    def used(self) -> float:
        """Processors that were busy for this process since this began to serve, on average."""
        return (_processor_seconds() - self._used) / max(1e-9, time.monotonic() - self._began)

    def status(self, status: int, code: str = "") -> None:
        """A request was answered, by an error of this code. status: 0 when it ended without an answer."""
        self.statuses["ok" if 0 < status < 400 else STATUS_NAMES.get(status, "unknown")] += 1
        if code:
            self.refusals[code] += 1


@dataclass
class Course:
    """The course of one sequence, in seconds of time.monotonic(): when its request came, how long it waited to be
    admitted to a step, its first and its last token, of how many."""

    came: float
    queued: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    cached: int = 0  # tokens of its prompt that were in the prefix cache
    prompt: int = 0


class Recorder:
    """The measurements of one model. memory: bytes by what they are for."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.memory: dict[str, int] = {}
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self.handling_seconds = defaultdict(float, chat=0.0, completion=0.0)
        self.template_seconds = self.tokenization_seconds = 0.0
        self._lock = threading.Lock()
        self._own = threading.local()  # seconds of templates in what this thread prepares
        self.detokenization_seconds = {"stream": 0.0, "non_stream": 0.0}
        self.responding_seconds = {"stream": 0.0, "non_stream": 0.0}
        self.first_token = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.per_token = Histogram(SECONDS)
        self.queue, self.prefill = Histogram(SECONDS), Histogram(SECONDS)
        self.decode, self.inference = Histogram(SECONDS), Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generated_tokens = Histogram(TOKENS)
        self.max_tokens = Histogram(TOKENS)
        self.samples = Histogram(SAMPLES)
        self.matched_share, self.matched_tokens = Histogram(SHARES), Histogram((0, *TOKENS))
        self.recent_first = deque[float](maxlen=RECENT)  # seconds to the first token of an answer
        self.recent_rest = deque[float](maxlen=RECENT)  # seconds per token after it

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around the preparation of a request, in any thread. What is not of templates counts as tokenization."""
        self._own.rendered, begin = 0.0, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.tokenization_seconds += max(0.0, time.monotonic() - begin - self._own.rendered)

    @contextmanager
    def rendering(self) -> Iterator[None]:
        """Around a template."""
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begin
            self._own.rendered = getattr(self._own, "rendered", 0.0) + seconds
            with self._lock:
                self.template_seconds += seconds

    def token(self, course: Course, now: float, queued: float) -> None:
        """A sequence got a token; it had waited so long to be admitted."""
        if course.tokens:
            self.inter_token.observe(now - course.last)
        else:
            course.first, course.queued = now, queued
            self.first_token.observe(now - course.came)
            self.recent_first.append(now - course.came)
        course.last = now
        course.tokens += 1

    def ended(self, course: Course) -> None:
        """A sequence has ended, however it did."""
        if not course.tokens:
            return
        admitted = course.came + course.queued
        self.queue.observe(course.queued)
        self.prefill.observe(course.first - admitted)
        self.decode.observe(course.last - course.first)
        self.inference.observe(course.last - admitted)
        if course.prompt:
            self.matched_tokens.observe(course.cached)
            self.matched_share.observe(course.cached / course.prompt)
        if course.tokens > 1:
            rest = (course.last - course.first) / (course.tokens - 1)
            self.per_token.observe(rest)
            self.recent_rest.append(rest)
