"""Predicts what a step takes: one cost model for all who decide by time, fitted by `xllm profile` to steps it measured.

A sum of parts, none of which falls when the step grows: a constant, so much for a sequence; of its tokens, and of the
rows that are sampled, a curve each, straight between knots, so that both reading weights and multiplying show; of what
attention meets, keys read and pairs seen, for each window of the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from xllm.targets.base import keys_read, pairs_seen

Rows = Sequence[tuple[int, int]]
Curve = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
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

    def sizes(self, rows: Rows) -> tuple[int, ...]:
        """Sequences and tokens of a step, and for each window keys read and pairs seen. Those of other rows add up."""
        sizes = [len(rows), sum([new for _, new in rows])]
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
            sizes += (keys, pairs)
        return tuple(sizes)

    def parts(self, rows: Rows, sampled: int) -> list[float]:
        """How much of each part a step has."""
        sequences, tokens, *met = self.sizes(rows)
        return [1.0, sequences, *_along(self.tokens, tokens), *_along(self.sampled, sampled), *met]


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
        return self.of(self.sizes(rows), sampled)

    def sizes(self, rows: Rows) -> tuple[int, ...]:
        """See Basis."""
        return self.basis.sizes(rows)

    def of(self, sizes: Sequence[float], sampled: int | None = None) -> float:
        """As `seconds`, of a step of these sizes."""
        sequences, tokens, *met = sizes
        each = self.seconds_of
        found = each[0] + each[1] * sequences + _at(self._curves[0], tokens)
        found += _at(self._curves[1], sequences if sampled is None else sampled)
        return found + sum([one * size for one, size in zip(each[len(each) - len(met) :], met, strict=True)])

    @cached_property
    def _curves(self) -> tuple[Curve, Curve]:
        """Of tokens and of sampled rows."""
        first = 2 + len(self.basis.tokens)
        tokens, sampled = self.seconds_of[2:first], self.seconds_of[first : first + len(self.basis.sampled)]
        return _curve(self.basis.tokens, tokens), _curve(self.basis.sampled, sampled)

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


def _curve(knots: Sequence[int], slopes: Sequence[float]) -> Curve:
    """Where each piece begins, what has been taken until there, and what each one more takes."""
    begins = (0, *knots[:-1])
    pieces = [slope * (end - begin) for slope, begin, end in zip(slopes, begins, knots, strict=True)]
    return begins, (0.0, *accumulate(pieces[:-1])), tuple(slopes)


def _at(curve: Curve, size: float) -> float:
    begins, taken, slopes = curve
    piece = max(0, bisect_left(begins, size) - 1)
    return taken[piece] + slopes[piece] * (size - begins[piece])
