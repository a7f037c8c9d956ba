"""Where the time of steps goes, and how large they are: counted as a core works, read by who asks for its figures."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

# What a core does, in the order of a step: it decides, after it has looked up pages of the prefix cache; gets spans and
# pages; hands the batch over; takes what it gave; offers pages that are complete to others.
PHASES: tuple[str, ...] = ("schedule", "match", "allocate", "prepare", "take", "insert")
STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Spent:
    """Seconds by phase, and those that steps computed and sampled for; counts of steps by their tokens, bounds of
    STEP_TOKENS inclusive. One thread writes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._computing = self._sampling = 0.0
        self._steps = [0] * (len(STEP_TOKENS) + 1)
        self._clock = clock
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """A copy; "compute" and "sample" are those of steps, beside which phases of the next one may run."""
        return self._seconds | {"compute": self._computing, "sample": self._sampling}

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(self._steps)

    def begin(self) -> None:
        """What follows belongs to the phase that is named at its end."""
        self._since = self._clock()

    def on(self, phase: str) -> None:
        """The time since `begin`, or since the last phase ended, went into this one."""
        now = self._clock()
        self._seconds[phase] += now - self._since
        self._since = now

    def launched(self, tokens: int) -> None:
        """A step of so many was handed over."""
        self.on("prepare")
        self._size(tokens)

    def taken(self, computing: float, sampling: float) -> None:
        """What a step gave was taken; it had computed and sampled for so long."""
        self.on("take")
        self._computing += computing
        self._sampling += sampling

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of so many, which samples nothing, computed for so long."""
        self._size(tokens)
        self._computing += seconds

    def _size(self, tokens: int) -> None:
        self._steps[bisect_left(STEP_TOKENS, tokens)] += 1
