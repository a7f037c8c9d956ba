"""The border between the scheduler's world and a device: an immutable batch in, sampled tokens out.

The engine owns slots, positions and KV addresses; the executor owns weights, sampler state and the device. A negative
token id -1-r in a row stands for row r of the previous step's sampled vector, so that a step can be launched before the
tokens it continues from are known on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from xllm.runtime.request import PromptLogprobs, Request


@dataclass(frozen=True)
class Limits:
    """What one step of this executor can hold. `max_len` counts tokens of one sequence, prompt and output together;
    `width` is that of the rows it gives, where it does not sample."""

    max_tokens_per_step: int
    max_seqs: int
    max_len: int
    vocab: int
    width: int = 0


@dataclass(frozen=True)
class KVSpec:
    """State bytes of a sequence: `fixed_bytes` at the start of its span, then `group_bytes` contiguous bytes for every
    `group_tokens` consecutive tokens of all layers."""

    group_bytes: int
    group_tokens: int = 16
    fixed_bytes: int = 0

    def bytes_for(self, tokens: int) -> int:
        """Bytes that `tokens` tokens of one sequence take, in whole groups; none for no tokens."""
        return self.fixed_bytes + -(-tokens // self.group_tokens) * self.group_bytes if tokens else 0

    def tokens_in(self, size: int) -> int:
        """Most tokens of one sequence that `size` bytes hold."""
        return max(size - self.fixed_bytes, 0) // self.group_bytes * self.group_tokens


class Row(NamedTuple):
    """The tokens of one sequence in one step, at positions start, start+1, ... (A tuple: one is built per sequence and
    step, where a frozen dataclass costs three times as much.)

    `kv_base` is the address of the sequence's contiguous KV span; positions 0..start-1 of it are already written.
    With `sample`, the logits of the last token are sampled for `slot`; sampled rows keep their order in the result.
    """

    slot: int
    kv_base: int
    start: int
    tokens: Sequence[int]
    sample: bool


@dataclass(frozen=True)
class Batch:
    """One step. `step` counts launches from 0."""

    step: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class StepResult:
    """Results of the S sampled rows, in row order. tokens int32 [S], -1 marks a row with NaN or infinite logits, -2
    (GRAMMAR_FAILED) one whose grammar could not go on, -3 (NOTHING_ALLOWED) one of which masks leave nothing to draw;
    logprobs float32 [S]; top_ids int32 and top_logprobs float32 [S, K], K the most any row asked for (may be 0);
    id -1 where the distribution has no more.

    rows: float32 [S, N] of a program that gives embeddings or scores; nothing is sampled then. seconds: what the step
    computed for, without sampling and any wait, sampling: what that took; 0 where that is not known.
    prompts: by slot, the logprobs of what was computed of prompts, where they are asked for."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    rows: np.ndarray | None = None
    seconds: float = 0.0
    sampling: float = 0.0
    prompts: Mapping[int, PromptLogprobs] = field(default_factory=dict)

    def best(self, row: int, count: int | None) -> tuple[tuple[int, float], ...]:
        """The `count` likeliest tokens of a sampled row, with their logprobs."""
        if not count:
            return ()
        ids, logprobs = self.top_ids[row, :count].tolist(), self.top_logprobs[row, :count].tolist()
        if ids and ids[-1] < 0:  # the distribution has fewer
            ids = ids[: ids.index(-1)]
        return tuple(zip(ids, logprobs, strict=False))


class Handle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step. Raises StepError when the device failed; its KV writes are then undefined."""
        ...


class Executor(Protocol):
    """A device that runs steps in launch order.

    After a failed step the executor stays usable, and the next step, launched already, may hold placeholders into the
    failed one: it reads any valid token id there, because the engine drops those rows.
    """

    @property
    def limits(self) -> Limits: ...

    @property
    def kv(self) -> KVSpec: ...

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None:
        """Set up the sampler state of `slot`, which no launched step references. `generated` tokens exist already (a
        preempted sequence comes back); the next draw is number len(generated). Raises StepError."""
        ...

    def detach(self, slot: int) -> None:
        """Drop the sampler state of `slot`, which no launched step references any more; also after a failed attach."""
        ...

    def launch(self, batch: Batch) -> Handle:
        """Queue a step and return at once. Raises StepError when it cannot be queued."""
        ...

    def close(self) -> None:
        """End threads and give memory back; launched steps finish first. Calling it again does nothing."""
        ...
