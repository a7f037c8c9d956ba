"""Predicts what a step takes: one cost model for all who decide by time, fitted by `xllm profile` to steps it measured.

A sum of parts, none of which falls when the step grows: a constant, so much for a sequence; of its tokens, and of the
rows that are sampled, a curve each, straight between knots, so that both reading weights and multiplying show; of what
attention meets, keys read and pairs seen, for each window of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from xllm.targets.base import keys_read, pairs_seen

Rows = Sequence[tuple[int, int]]
MAX_KNOTS, MAX_WINDOWS = 64, 8


@dataclass(frozen=True)
class Basis:
    """The parts of a step, as the model of one artifact has them. tokens, sampled: where the curves bend, growing from
    1 on; behind the last knot they go on as before it. windows: of attention layers, 0 for those without one."""

    tokens: tuple[int, ...]
    sampled: tuple[int, ...]
    windows: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("tokens", "sampled"):
            knots = getattr(self, name)
            if not 1 <= len(knots) <= MAX_KNOTS or knots[0] < 1 or any(one >= two for one, two in pairwise(knots)):
                raise ValueError(f"{name} must be 1 to {MAX_KNOTS} numbers that grow from 1 on")
        if len(self.windows) > MAX_WINDOWS or any(window < 0 for window in self.windows):
            raise ValueError(f"windows must be at most {MAX_WINDOWS} numbers from 0 on")

    @property
    def size(self) -> int:
        return 2 + len(self.tokens) + len(self.sampled) + 2 * len(self.windows)

    def parts(self, rows: Rows, sampled: int) -> list[float]:
        """How much of each part a step has."""
        parts: list[float] = [1.0, len(rows)]
        parts += _along(self.tokens, sum([new for _, new in rows]))
        parts += _along(self.sampled, sampled)
        for window in self.windows:
            keys = pairs = 0
            for past, new in rows:
                if not window or past + new <= window:  # most are so, and those who decide ask hundreds of times
                    keys += past + new
                    pairs += new * past + new * (new + 1) // 2
                elif new == 1:
                    keys += window
                    pairs += window
                else:
                    keys += keys_read(new, past, window)
                    pairs += pairs_seen(new, past, window)
            parts += (keys, pairs)
        return parts


@dataclass(frozen=True)
class StepCost:
    """A fitted model: seconds of each part. Raises ValueError for figures that are no such model."""

    basis: Basis
    seconds_of: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.seconds_of) != self.basis.size:
            raise ValueError(f"seconds_of has {len(self.seconds_of)} figures for {self.basis.size} parts")
        if not all(0 <= each <= 1e6 for each in self.seconds_of):
            raise ValueError("seconds_of must be figures from 0 on")

    def seconds(self, rows: Rows, sampled: int | None = None) -> float:
        """Of a step, from its launch to its result. rows: (tokens computed before, new tokens) of each sequence.
        sampled: rows that get a token, by default all of them. More of anything never takes less."""
        parts = self.basis.parts(rows, len(rows) if sampled is None else sampled)
        return sum([each * part for each, part in zip(self.seconds_of, parts, strict=True)])

    def tokens_within(self, seconds: float, most: int, beside: Rows = (), past: int = 0) -> int:
        """Tokens of one prompt, `past` others of it computed, that may join the rows `beside` it in a step of so many
        seconds: 0 to `most`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds([*beside, (past, middle)]) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


def _along(knots: Sequence[int], at: int) -> list[float]:
    """The way from 0 to `at`, cut at the knots but the last."""
    cut, last = [], 0
    for knot in knots[:-1]:
        if at <= knot:
            break
        cut.append(float(knot - last))
        last = knot
    cut.append(float(at - last))
    return cut + [0.0] * (len(knots) - len(cut))
