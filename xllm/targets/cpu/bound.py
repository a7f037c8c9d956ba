"""A bucket's calls bound to addresses, and what it takes to run them: one native call, drawing included, where every
call of the plan is native.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xllm.kernels import cpu
from xllm.kernels.cpu.sampling import Draw
from xllm.plan import Bucket
from xllm.targets.cpu.steps import Step

Piece = Callable[[Step], None]


@dataclass(frozen=True)
class StepTimes:
    """What one step took, in seconds: each call of the plan (float64 [calls]), then choosing tokens, with any wait for
    masks. ended: when that was, as time.perf_counter tells it. step: the number of its batch."""

    tokens: int
    calls: np.ndarray
    sample: float
    ended: float
    step: int = 0


class Times(Protocol):
    def append(self, took: StepTimes, /) -> None: ...


@dataclass(frozen=True)
class Native:
    """`count` calls in a row, one native call."""

    runner: cpu.Runner
    plan: int
    count: int

    def __call__(self, step: Step, draw: Draw | None = None) -> None:
        self.runner.run(self.plan, step.native, draw=draw)

    def timed(self, step: Step, draw: Draw | None = None) -> np.ndarray:
        return self.runner.timed(self.plan, step.native, 0, self.count, draw)


@dataclass(frozen=True)
class BoundPlan:
    """A bucket ready to run: native pieces, and other calls between them where kernels are missing."""

    bucket: Bucket
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> Native | None:
        """All of it, where that is one native call, which may draw as well."""
        first = self.pieces[0]
        return first if len(self.pieces) == 1 and isinstance(first, Native) else None

    def run(self, step: Step) -> None:
        for piece in self.pieces:
            piece(step)

    def timed(self, step: Step) -> np.ndarray:
        """As `run`; seconds of every call of the plan."""
        return np.concatenate([_timed(piece, step) for piece in self.pieces])


def _timed(piece: Piece, step: Step) -> np.ndarray:
    if isinstance(piece, Native):
        return piece.timed(step)
    began = time.perf_counter()
    piece(step)
    return np.array([time.perf_counter() - began])


def fits(bucket: Bucket, step: Step) -> bool:
    return len(step.ids) <= bucket.T and len(step.last) <= bucket.S
