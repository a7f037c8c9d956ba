"""Prompts to rows (embeddings, label scores) through an executor: which tokens go into which step, and where their
state lies meanwhile. No scheduler: a call knows all its prompts, and nothing outlives it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xllm.runtime.errors import RequestRefused, StepError
from xllm.runtime.executor import Batch, Executor, KVSpec, Limits, Row


class Piece(NamedTuple):
    """Tokens start..stop-1 of prompt `index` in a step; `ends` where they are its last."""

    index: int
    start: int
    stop: int
    ends: bool


class Encoder:
    """One executor whose steps give rows instead of tokens; closed with it. Threads take turns."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        limits, kv = executor.limits, executor.kv
        self._state = mmap.mmap(-1, state_bytes(limits, kv))  # zero pages until written
        self._base = np.frombuffer(self._state, np.uint8).ctypes.data
        self._turn = threading.Lock()
        self._steps = 0
        self.took = 0.0  # seconds that the latest step computed

    def rows(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [prompts, N], in their order. A row depends on its own prompt only.

        Raises RequestRefused for a prompt that can never run (none has run then), StepError when a step fails.
        """
        limits = self.executor.limits
        for prompt in prompts:
            check_prompt(prompt, limits)
        result: np.ndarray | None = None
        with self._turn:
            for step in self.steps(prompts):
                rows = self.run(step, prompts)
                ends = [piece.index for piece in step if piece.ends]
                if not np.isfinite(rows).all():
                    raise StepError("numeric_error", f"the row of prompt {ends[0]} or beside it holds NaN or infinity")
                result = np.empty((len(prompts), rows.shape[1]), np.float32) if result is None else result
                result[ends] = rows
        return np.empty((0, limits.width), np.float32) if result is None else result

    def steps(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Piece, ...]]:
        """What to `run`, one after the other and with nothing between them."""
        limits = self.executor.limits
        return cut_steps([len(prompt) for prompt in prompts], limits.max_tokens_per_step, limits.max_seqs)

    def run(self, step: Sequence[Piece], prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [prompts that end in the step, N], as they come: NaN and infinity too. Raises StepError."""
        result = self.executor.launch(self._batch(step, prompts)).result()
        self.took = result.seconds
        assert result.rows is not None
        return result.rows

    def close(self) -> None:
        self.executor.close()

    def _batch(self, step: Sequence[Piece], prompts: Sequence[Sequence[int]]) -> Batch:
        at, rows = 0, []
        for slot, (index, start, stop, ends) in enumerate(step):
            rows.append(Row(slot, self._base + at, start, prompts[index][start:stop], ends))
            at += self.executor.kv.bytes_for(stop)
        self._steps += 1
        return Batch(self._steps - 1, tuple(rows))


def check_prompt(prompt: Sequence[int], limits: Limits) -> None:
    """Raises RequestRefused for a prompt that can never run."""
    if not prompt:
        raise RequestRefused("empty_prompt", "the prompt has no tokens")
    if bad := [token for token in prompt if not 0 <= token < limits.vocab]:
        raise RequestRefused("token_out_of_range", f"token id {bad[0]} is not in the vocabulary of {limits.vocab}")
    if len(prompt) > limits.max_len:
        raise RequestRefused(
            "context_length_exceeded",
            f"{len(prompt)} tokens exceed the {limits.max_len} that the artifact was compiled for"
            " (--max-len, and --max-batch-tokens where a sequence must lie in one step)",
        )


def cut_steps(lengths: Sequence[int], tokens: int, seqs: int) -> list[tuple[Piece, ...]]:
    """Steps of at most `tokens` tokens and `seqs` prompts, in order; a longer prompt has steps of its own."""
    steps: list[tuple[Piece, ...]] = []
    open_: list[Piece] = []
    used = 0
    for index, length in enumerate(lengths):
        if open_ and (used + length > tokens or len(open_) == seqs):
            steps.append(tuple(open_))
            open_, used = [], 0
        if length > tokens:
            cuts = range(0, length, tokens)
            steps += [(Piece(index, start, min(start + tokens, length), start + tokens >= length),) for start in cuts]
            continue
        open_.append(Piece(index, 0, length, True))
        used += length
    return [*steps, tuple(open_)] if open_ else steps


def state_bytes(limits: Limits, kv: KVSpec) -> int:
    """State of the largest step: many prompts, each in groups of its own, or one of full length."""
    groups = -(-limits.max_tokens_per_step // kv.group_tokens) + limits.max_seqs
    many = limits.max_seqs * kv.fixed_bytes + groups * kv.group_bytes
    return max(many, kv.bytes_for(limits.max_len), mmap.PAGESIZE)
