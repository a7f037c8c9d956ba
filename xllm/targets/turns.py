"""Whose step runs, where executors share the cores: one after the other, whoever has had least time next. A model whose
steps are long holds up the others no more than its share of the time, however many of its own wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# One that is behind and has just ended a step is about to ask for the next: so long nobody else begins one. No longer
# than a part of the step that would hold it up, or waiting would cost more than it gives.
GRACE_SECONDS, GRACE_PART = 0.005, 0.25


class Turn:
    """One executor's place. used: seconds it has had, counted as if it had been here all the time; took: of its latest
    step."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.used = self.took = 0.0
        self.asked = 0  # when, as a count

    def __enter__(self) -> None:
        self._turns.take(self)

    def __exit__(self, *_: object) -> None:
        self._turns.end(self)


class Line:
    """Who goes next; pure, with the time passed in."""

    def __init__(self) -> None:
        self.waiting: list[Turn] = []
        self.holder: Turn | None = None
        self._last: Turn | None = None
        self._began = self._ended = 0.0
        self._level = 0.0  # the most that anyone has had
        self._count = 0

    def ask(self, turn: Turn, now: float) -> None:
        """It waits from now on. Who was away has saved nothing up: it is level with whoever has had least
        of those that compute, or with all when nobody does."""
        others = [*self.waiting, *([self.holder] if self.holder else [])]
        if self._last is not None and self._last is not turn and now - self._ended < GRACE_SECONDS:
            others.append(self._last)
        if not (turn is self._last and now - self._ended < GRACE_SECONDS):
            turn.used = max(turn.used, min([other.used for other in others], default=self._level))
        self._count += 1
        turn.asked = self._count
        self.waiting.append(turn)

    def wait(self, turn: Turn, now: float) -> float | None:
        """Seconds until it may be this one's turn if nothing happens, 0 for now; None: never."""
        if self.holder is not None or turn is not min(self.waiting, key=lambda one: (one.used, one.asked)):
            return None
        last, grace = self._last, min(GRACE_SECONDS, GRACE_PART * turn.took)
        if last is None or last in self.waiting or last.used + grace >= turn.used:
            return 0.0
        return max(0.0, self._ended + grace - now)

    def begin(self, turn: Turn, now: float) -> None:
        self.waiting.remove(turn)
        self.holder, self._began = turn, now

    def end(self, turn: Turn, now: float) -> None:
        turn.took = now - self._began
        turn.used += turn.took
        self._level = max(self._level, turn.used)
        self.holder, self._last, self._ended = None, turn, now


class Turns:
    """A lock for each executor that `join` gives one; one has it at a time. Side by side, the threads of two steps
    would wait for each other at every operator."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._line = Line()
        self._changed = threading.Condition()

    def join(self) -> Turn:
        return Turn(self)

    def take(self, turn: Turn) -> None:
        with self._changed:
            self._line.ask(turn, self._clock())
            while (seconds := self._line.wait(turn, self._clock())) != 0:
                self._changed.wait(seconds)
            self._line.begin(turn, self._clock())

    def end(self, turn: Turn) -> None:
        with self._changed:
            self._line.end(turn, self._clock())
            self._changed.notify_all()
