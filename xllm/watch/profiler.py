"""Records, while somebody asks for it, where an engine's time goes: every step with the time of each call, what the
engine's thread does between steps, and each request's way through its slot. Bounded in time and memory; off, it costs a
test a step. It sees sizes and times, never a text or a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from xllm.runtime.executor import Batch
from xllm.runtime.request import Request
from xllm.watch.executor import decodes_of

SECONDS = 60.0  # a profile ends by itself
MAX_STEPS, MAX_CALLS, MAX_REQUESTS = 20_000, 100_000, 10_000  # calls one by one; later steps keep their sums only
SAMPLING = "sampling"


class Took(Protocol):
    """What one step took (`StepTimes` of the CPU's executor): seconds of each call and of choosing tokens."""

    @property
    def tokens(self) -> int: ...
    @property
    def calls(self) -> np.ndarray: ...
    @property
    def sample(self) -> float: ...
    @property
    def ended(self) -> float: ...
    @property
    def step(self) -> int: ...


class Times(Protocol):
    def append(self, took: Took, /) -> None: ...


class Timed(Protocol):
    """An executor that times the calls of its steps while it has somebody to tell."""

    times: Times | None


class Operator(NamedTuple):
    """A call of the plan."""

    node: str
    kernel: str


class Step(NamedTuple):
    """kind: "decode", "prompt" or "mixed". began, ended: of its calls and of sampling behind them, in seconds of
    time.perf_counter. calls: seconds of each, none where there were too many."""

    number: int
    kind: str
    tokens: int
    rows: int
    began: float
    ended: float
    sample: float
    calls: np.ndarray | None


@dataclass
class Way:
    """A request in its slot, in seconds of time.perf_counter; 0 for what is not known or not yet. prompt: its tokens;
    again: it was preempted before."""

    id: str
    slot: int
    prompt: int
    again: bool
    arrived: float
    attached: float
    first: float = 0.0
    ended: float = 0.0


@dataclass
class Recording:
    """One profile. host, waits: spans of the engine's thread, of its own work and for steps. totals: seconds of every
    call, then of sampling, by kind of step, of all steps. cut: why not all of it is here."""

    operators: Sequence[Operator]
    began: float
    ended: float = 0.0
    cut: str = ""
    steps: list[Step] = field(default_factory=list)
    host: list[tuple[float, float]] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    ways: list[Way] = field(default_factory=list)
    totals: dict[str, np.ndarray] = field(default_factory=dict)


class Profiler:
    """The engine's thread and the executor's tell it; any thread starts and stops it."""

    def __init__(self, executor: Timed, operators: Sequence[Operator], seconds: float = SECONDS) -> None:
        self._executor, self._operators, self._seconds = executor, tuple(operators), seconds
        self._lock = threading.Lock()
        self._recording: Recording | None = None  # until it is taken
        self._slots: dict[int, Way] = {}  # also while nothing is recorded: a profile may begin in the middle
        self._launched: dict[int, tuple[str, int, tuple[int, ...]]] = {}  # by step: kind, rows, slots that get a token
        self._back = 0.0  # since when the engine's thread works by itself
        self._calls = 0

    def start(self) -> bool:
        """False when a profile runs already, or waits to be taken."""
        with self._lock:
            if self._recording is not None:
                return False
            self._recording = Recording(self._operators, time.perf_counter())
            self._launched.clear()
            self._back = 0.0
            self._calls = 0
            self._executor.times = self
            return True

    def stop(self) -> Recording | None:
        """What was recorded; None where nothing was started."""
        with self._lock:
            recording, self._recording = self._recording, None
            if recording is not None:
                self._end(recording, "")
            return recording

    # --- by the engine's thread ---------------------------------------------------------------------------------------

    def attached(self, slot: int, request: Request, generated: int) -> None:
        now = time.perf_counter()
        arrived = now - (time.monotonic() - request.arrival) if request.arrival else 0.0
        with self._lock:
            self._slots[slot] = Way(request.id, slot, len(request.prompt), generated > 0, arrived, now)

    def detached(self, slot: int) -> None:
        with self._lock:
            way = self._slots.pop(slot, None)
            recording = self._running()
            if recording is None:
                return
            now = time.perf_counter()
            if way is not None and len(recording.ways) < MAX_REQUESTS:
                way.ended = now
                recording.ways.append(way)
            if not self._slots and self._back:  # it may sleep now
                recording.host.append((self._back, now))
                self._back = 0.0

    def launched(self, batch: Batch) -> None:
        with self._lock:
            recording = self._running()
            if recording is None:
                return
            decodes = decodes_of(batch)
            kind = "decode" if decodes == len(batch.rows) else "mixed" if decodes else "prompt"
            self._launched[batch.step] = kind, len(batch.rows), tuple([row.slot for row in batch.rows if row.sample])
            if self._back:
                recording.host.append((self._back, time.perf_counter()))
                self._back = 0.0

    def waited(self, began: float, ended: float) -> None:
        with self._lock:
            if recording := self._running():
                recording.waits.append((began, ended))
                self._back = ended

    # --- by the executor's --------------------------------------------------------------------------------------------

    def append(self, took: Took, /) -> None:
        with self._lock:
            recording = self._running()
            known = self._launched.pop(took.step, None)
            if recording is None or known is None:  # it was launched before
                return
            kind, rows, sampled = known
            for slot in sampled:
                if (way := self._slots.get(slot)) and not way.first and way.attached >= recording.began:
                    way.first = took.ended
            self._calls += len(took.calls)
            calls = took.calls if self._calls <= MAX_CALLS else None
            began = took.ended - took.sample - float(took.calls.sum())
            recording.steps.append(Step(took.step, kind, took.tokens, rows, began, took.ended, took.sample, calls))
            sums = np.append(took.calls, took.sample)
            recording.totals[kind] = recording.totals[kind] + sums if kind in recording.totals else sums

    def _running(self) -> Recording | None:
        """The profile that more may be added to; one that has had enough ends here."""
        recording = self._recording
        if recording is None or recording.ended:
            return None
        if len(recording.steps) >= MAX_STEPS:
            self._end(recording, f"it ended after {MAX_STEPS} steps")
        elif time.perf_counter() - recording.began > self._seconds:
            self._end(recording, f"it ended after {self._seconds:g} seconds")
        return None if recording.ended else recording

    def _end(self, recording: Recording, why: str) -> None:
        self._executor.times = None
        if recording.ended:
            return
        recording.ended = min(time.perf_counter(), recording.began + self._seconds)
        many = f"only the first {MAX_CALLS} calls are told apart" if self._calls > MAX_CALLS else ""
        recording.cut = "; ".join(filter(None, (why, many)))
        # Those that go on: copies, since they do.
        recording.ways += [Way(**vars(way)) for way in self._slots.values()]
