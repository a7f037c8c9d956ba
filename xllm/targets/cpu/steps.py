"""A batch as the arrays that a step takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xllm.kernels import cpu
from xllm.runtime.executor import Batch


@dataclass(frozen=True)
class Step:
    """A batch as flat arrays: ids, positions int32[T], last int32[S], and the native form, of which a runner finds out
    by itself what placeholders stand for."""

    ids: np.ndarray
    positions: np.ndarray
    last: np.ndarray
    native: cpu.Batch

    def resolve(self, previous: np.ndarray) -> None:
        """Puts the ids that placeholders stand for in their places, which calls read that are not native."""
        if len(self.ids) and int(self.ids.min()) < 0:
            held = self.ids < 0
            self.ids[held] = np.maximum(previous[-1 - self.ids[held]], 0)


def flatten(batch: Batch, fixed_bytes: int, previous: np.ndarray | None = None, every: bool = False) -> Step:
    """Rows joined into the arrays a step takes; `previous` is where the sampled vector will be that placeholders refer
    to. With `every`, all tokens have a row of logits.

    Kernels are given where the groups of tokens start, behind the `fixed_bytes` of a span that do not grow.
    """
    counts = [len(row.tokens) for row in batch.rows]
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    ids = np.concatenate([np.asarray(row.tokens, np.int32) for row in batch.rows])
    positions = np.concatenate(
        [np.arange(row.start, row.start + n, dtype=np.int32) for row, n in zip(batch.rows, counts, strict=True)]
    )
    last = np.array([stop - 1 for row, stop in zip(batch.rows, starts[1:], strict=True) if row.sample], np.int32)
    if every:
        last = np.arange(len(ids), dtype=np.int32)
    bases = np.array([row.kv_base + fixed_bytes for row in batch.rows], np.uint64)
    return Step(ids, positions, last, cpu.Batch(ids, positions, last, starts, bases, previous))
