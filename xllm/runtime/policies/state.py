"""What a policy sees and says: the limits of a step, the queues in rank order, the rows granted, and what a step is
expected to take. All immutable."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from xllm.runtime.pages import PoolPlan
from xllm.runtime.sequence import Sequence

STEP_SECONDS = 0.12  # of a step that decodes and computes prompts, where no request asks for less
DEFAULT_TOKEN_SECONDS = 1e-3  # of a token, until steps have been measured
AGED_SECONDS = 30.0  # after so long the oldest request goes first
OFFLINE_AGED = 10  # times as long for an offline one
ASSUMED_TOKENS = 256  # of an answer, until some have ended


Rows = Ordered[tuple[int, int]]  # (tokens computed before, tokens computed now) of each sequence


class StepCost(Protocol):
    """What a step takes. It depends on sums over its rows alone, so that one more row is quickly asked about."""

    def sizes(self, rows: Rows, /) -> tuple[float, ...]:
        """What of these rows its time depends on; those of other rows are added, one by one."""
        ...

    def of(self, sizes: Ordered[float], /) -> float:
        """Seconds of a step of these sizes."""
        ...

    def seconds(self, rows: Rows, /) -> float:
        """Seconds of a step of these rows; of no rows, what every step takes."""
        ...


@dataclass(frozen=True)
class TokenCost:
    """The same for each token, as measured: what is known without a cost model."""

    of_token: float = DEFAULT_TOKEN_SECONDS

    def sizes(self, rows: Rows, /) -> tuple[float, ...]:
        return (sum([tokens for _, tokens in rows]),)

    def of(self, sizes: Ordered[float], /) -> float:
        return self.of_token * sizes[0]

    def seconds(self, rows: Rows, /) -> float:
        return self.of(self.sizes(rows))


@dataclass(frozen=True)
class Scaled:
    """A model that says too little, corrected."""

    cost: StepCost
    factor: float = 1.0

    def sizes(self, rows: Rows, /) -> tuple[float, ...]:
        return self.cost.sizes(rows)

    def of(self, sizes: Ordered[float], /) -> float:
        return self.factor * self.cost.of(sizes)

    def seconds(self, rows: Rows, /) -> float:
        return self.of(self.sizes(rows))


@dataclass(frozen=True)
class Budget:
    """Limits of one step. `beside_decodes`: prompt tokens in a step that also decodes. `admit_pages`: pages that may
    be in use or promised after an admission, while anything runs. `step_seconds`: of a timed step in which no decode
    asks for less. `aged_seconds`: see rank. `answer_tokens`: answers are taken to be no longer, where max_tokens does
    not say less (see admission). `reach_pages`: of the pool, what this engine's sequences may hold in all, where others
    have pages of it too."""

    tokens: int
    beside_decodes: int
    max_chunk: int
    admit_pages: int
    pool: PoolPlan
    step_seconds: float = STEP_SECONDS
    aged_seconds: float = AGED_SECONDS
    answer_tokens: int = ASSUMED_TOKENS
    reach_pages: int | None = None

    @property
    def most_pages(self) -> int:
        return self.pool.pages if self.reach_pages is None else self.reach_pages


@dataclass(frozen=True)
class Queues:
    """The scheduler's view. `running` (they hold slots) and `waiting` are in rank order, which is that of arrival
    unless a policy says otherwise; what is `computed` of a waiting one is cached. The first `online_running` and
    `online_waiting` of them count as online, the rest are offline. `line` is all of them in one order, online ones
    first, where a policy ranks them. `step_seconds`: what a timed step of them may take, where ranking has found it."""

    running: Ordered[Sequence]
    waiting: Ordered[Sequence]
    free_slots: int
    online_running: int = sys.maxsize
    online_waiting: int = sys.maxsize
    line: Ordered[Sequence] = ()
    step_seconds: float | None = None

    def without(self, others: Ordered[Sequence]) -> Queues:
        """Some who wait had better do so for a while."""
        gone = {sequence.order for sequence in others}
        waiting = [sequence for sequence in self.waiting if sequence.order not in gone]
        online = sum(sequence.order not in gone for sequence in self.waiting[: self.online_waiting])
        line = [sequence for sequence in self.line if sequence.order not in gone]
        return replace(self, waiting=waiting, online_waiting=online, line=line, step_seconds=None)


class Grant(NamedTuple):
    """`tokens` next tokens of a sequence, in each of its rows, for which it will hold `pages` pages in all; `sample` if
    they are its last."""

    sequence: Sequence
    tokens: int
    pages: int
    sample: bool


@dataclass(frozen=True)
class Decision:
    """The step: rows in `grants`; `admitted` (a prefix of waiting) need a slot first, `preempted` give theirs up (last
    in rank first), each for one of CAUSES. `why` has one sentence for each thing not done; `oldest_wait` is the age of
    the oldest request left waiting. `seconds`: what a timed step is expected to take, 0 of others."""

    grants: tuple[Grant, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]
    why: tuple[str, ...]
    oldest_wait: float
    causes: tuple[str, ...] = ()
    seconds: float = 0.0


# Who needed pages or a slot, for what, and who lost them.
CAUSES = tuple(
    f"{needs}_{phase}_preempt_{victim}"
    for needs, victim in (("online", "offline"), ("online", "online"), ("offline", "offline"))
    for phase in ("prefill", "decode")
)
