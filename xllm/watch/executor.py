"""An executor between an engine and the real one, that tells others what passes: shapes of steps to a histogram, times
of everything to a profiler. It is there only where somebody asked for one of them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from xllm.runtime.executor import Batch, Executor, Handle, KVSpec, Limits, StepResult
from xllm.runtime.request import Request

if TYPE_CHECKING:
    from xllm.watch.profiler import Profiler


class Shapes(Protocol):
    """Who counts steps (`xllm.traffic.Traffic`)."""

    def add(self, tokens: int, rows: int, decodes: int, bucket: int) -> None: ...


class WatchedExecutor:
    """`inner`, and who is told. buckets: tokens of each, ascending."""

    def __init__(
        self, inner: Executor, buckets: Sequence[int], shapes: Shapes | None = None, profiler: Profiler | None = None
    ) -> None:
        self._inner, self._buckets = inner, tuple(buckets)
        self._shapes, self._profiler = shapes, profiler

    @property
    def limits(self) -> Limits:
        return self._inner.limits

    @property
    def kv(self) -> KVSpec:
        return self._inner.kv

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None:
        if self._profiler is not None:
            self._profiler.attached(slot, request, len(generated))
        self._inner.attach(slot, request, generated)

    def detach(self, slot: int) -> None:
        if self._profiler is not None:
            self._profiler.detached(slot)
        self._inner.detach(slot)

    def launch(self, batch: Batch) -> Handle:
        if self._shapes is not None:
            tokens = sum([len(row.tokens) for row in batch.rows])
            bucket = self._buckets[min(bisect_left(self._buckets, tokens), len(self._buckets) - 1)]
            self._shapes.add(tokens, len(batch.rows), decodes_of(batch), bucket)
        if self._profiler is None:
            return self._inner.launch(batch)
        self._profiler.launched(batch)
        return _Waited(self._inner.launch(batch), self._profiler)

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        """What else the real one can do is none of this one's business."""
        return getattr(self._inner, name)


@dataclass(frozen=True)
class _Waited:
    """A launched step that says how long somebody waited for it."""

    inner: Handle
    profiler: Profiler

    def result(self) -> StepResult:
        began = time.perf_counter()
        try:
            return self.inner.result()
        finally:
            self.profiler.waited(began, time.perf_counter())


def decodes_of(batch: Batch) -> int:
    """Sequences of which the step has one token that follows others and gives the next."""
    return sum([row.sample and row.start > 0 and len(row.tokens) == 1 for row in batch.rows])
