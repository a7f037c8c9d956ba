"""Who goes first: ten orders, each a key of all sequences, column by column; and the ranking every policy shares.

The oldest request that has waited too long is first of all, then all online ones by the key, then the offline ones by
the key; equal keys go by arrival. So the order is total. Proof that everything ends, for any key: the oldest live
request ages, and is from then on first until it ends; nobody is admitted before it, nobody takes its pages, and it
takes those of others, so each step either computes for it or for those running before it got in, whose work is finite.
Then the next one is the oldest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xllm.runtime.policies.state import OFFLINE_AGED, Budget, Queues, StepCost
from xllm.runtime.sequence import Sequence

PRIORITIES = {"HIGH": 0, "DEFAULT": 1, "NORMAL": 1, "LOW": 2}
WEIGHTS = {"HIGH": 4.0, "DEFAULT": 2.0, "NORMAL": 2.0, "LOW": 1.0}
NEGLIGIBLE = 1e-9  # seconds
TIGHTEST_SHARE = 0.65  # of the least TPOT asked for: no step is cut shorter
URGENT, RELAXED, LATE = 0.0, 1.0, 2.0
# What is known of a sequence as soon as it is queued, by its place in `facts`; DUE is the first token's.
NUMBER, ARRIVED, DUE, TPOT, PROMPT, OFFLINE, PRIORITY, WEIGHT = range(FACTS := 8)


@dataclass(frozen=True)
class Curve:
    """Seconds of a prompt alone, as constant + linear x tokens + square x tokens^2; what is added by tokens after
    others is the difference."""

    constant: float
    linear: float
    square: float

    @staticmethod
    def of(cost: StepCost, tokens: int) -> Curve:
        """Through what the model says of nothing, of so many tokens and of twice as many."""
        constant = cost.seconds(())
        once, twice = (cost.seconds(((0, count),)) - constant for count in (tokens, 2 * tokens))
        square = max(0.0, (twice - 2 * once) / (2 * tokens * tokens))
        return Curve(constant, max(0.0, once / tokens - square * tokens), square)

    def work(self, before, after):
        """Seconds for the tokens from `before` to `after` of a prompt, without the constant; of arrays, one each."""
        return (after - before) * (self.linear + self.square * (after + before))


@dataclass(frozen=True, eq=False)
class View:
    """What keys look at: columns of N sequences, those that run and then those that wait, and figures of all of them.
    Times are in seconds. Each column is made when it is first asked for: a thousand sequences are ranked in every step.
    """

    running: Ordered[Sequence]
    waiting: Ordered[Sequence]
    budget: Budget
    cost: StepCost
    now: float

    @cached_property
    def everybody(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    @cached_property
    def facts(self) -> np.ndarray:
        """[FACTS, N] of what does not change while a sequence lives: each packs its own once."""
        packed = b"".join([sequence.facts or _pack(sequence) for sequence in self.everybody])
        return np.frombuffer(packed).reshape(-1, FACTS).T

    @cached_property
    def offline(self) -> np.ndarray:
        return self.facts[OFFLINE] > 0

    @cached_property
    def computed(self) -> np.ndarray:
        return np.array([sequence.computed for sequence in self.everybody], float)

    @cached_property
    def known(self) -> np.ndarray:
        """Tokens of the text, those in flight included."""
        return np.array([len(sequence.tokens) + sequence.pending for sequence in self.everybody], float)

    @cached_property
    def outputs(self) -> np.ndarray:
        return self.known - self.facts[PROMPT]

    @cached_property
    def decoding(self) -> np.ndarray:
        return (self.computed >= self.facts[PROMPT]) & (self.known - self.computed == 1)

    @cached_property
    def first_at(self) -> np.ndarray:
        """When the first token was known; infinity where none is."""
        firsts = [sequence.first_at for sequence in self.everybody]
        return np.array([math.inf if at is None else at for at in firsts], float)

    @cached_property
    def due(self) -> np.ndarray:
        """When the next token should come; infinity when nothing is asked. `now` is when the launched steps will have
        ended, so that is when a first token in flight is there."""
        first = np.where(self.first_at == math.inf, self.now, self.first_at)
        return np.where(self.outputs == 0, self.facts[DUE], first + self.facts[TPOT] * np.maximum(self.outputs, 1))

    @cached_property
    def curve(self) -> Curve:
        return Curve.of(self.cost, max(1, self.budget.tokens // 2))

    @cached_property
    def decodes(self) -> tuple[int, float]:
        """How many decode, and what all of them add to a step."""
        decoding = [self.everybody[at] for at in np.flatnonzero(self.decoding).tolist()]
        rows = [piece for sequence in decoding for piece in sequence.pieces(1)]
        return len(rows), self.cost.seconds(rows) - self.curve.constant if rows else 0.0

    @cached_property
    def rows(self) -> np.ndarray:
        """Of each in a step; a group of beams has several."""
        return np.array([sequence.drawn for sequence in self.everybody], float)

    @cached_property
    def work(self) -> np.ndarray:
        """For what the model has not seen of each."""
        count, seconds = self.decodes
        one = seconds / max(1, count)
        prompts = self.curve.work(self.computed, self.known)
        return np.maximum(self.rows * np.where(self.decoding, one, prompts), NEGLIGIBLE)

    @cached_property
    def total(self) -> float:
        """Of all work."""
        prompts = ~self.decoding
        each = self.rows[prompts] * self.curve.work(self.computed[prompts], self.known[prompts])
        return float(each.sum()) + self.decodes[1]

    @cached_property
    def step_seconds(self) -> float:
        """What a step may take: the least time left of those decodes that can still be served in time, but never less
        than a share of the tightest TPOT asked for. While nobody decodes, the least time left until a first token, but
        never less than `step_seconds` of the budget."""
        left, count = self.due - self.now, len(self.running)
        decodes = np.flatnonzero(self.decoding[:count])
        if not len(decodes):
            return max(_least(left[left > 0], math.inf), self.budget.step_seconds)
        tightest = float(self.facts[TPOT, decodes].min())
        if math.isinf(tightest):
            return self.budget.step_seconds
        least = TIGHTEST_SHARE * tightest
        left = left[decodes]
        return max(_least(left[left >= least], least), least)

    @cached_property
    def classes(self) -> np.ndarray:
        """URGENT: due before all that is left could be done. LATE: no first token yet, and too late for it to be in
        time even alone; such requests leave room for those that still can be."""
        left, constant, step = self.due - self.now, self.curve.constant, self.step_seconds
        decodes = left < self.total * step / (step - constant) if step > constant else True
        urgent = np.where(self.decoding, decodes, left < self.total + constant)
        late = ~self.decoding & (self.first_at == math.inf) & (left < self.work)
        return np.where(late, LATE, np.where(urgent, URGENT, RELAXED))


Keys = list[np.ndarray]  # columns, the one that decides first in front


def _least(values: np.ndarray, default: float) -> float:
    return float(values.min()) if len(values) else default


def _priority(view: View) -> Keys:
    return [view.facts[PRIORITY]]


def _deadline(view: View) -> Keys:
    return [view.due]


def _sjf(view: View) -> Keys:
    return [view.work]


def _density(view: View) -> Keys:
    return [-view.facts[WEIGHT] / view.work]


def _decode_deadline(view: View) -> Keys:
    return [~view.decoding, view.due]


def _decode_density(view: View) -> Keys:
    return [~view.decoding, *_density(view)]


def _urgency_density(view: View) -> Keys:
    relaxed = view.classes == RELAXED
    prompt, density = _decode_density(view)
    return [view.classes, np.where(relaxed, view.due, prompt), np.where(relaxed, 0.0, density)]


def _urgency_priority(view: View) -> Keys:
    return [view.classes, view.facts[PRIORITY]]


def _decode_urgency_density(view: View) -> Keys:
    return [~view.decoding, *_urgency_density(view)]


@dataclass(frozen=True)
class Order:
    """Keys of all sequences, lowest first. Without any it is the order of arrival."""

    keys: Callable[[View], Keys] | None


ORDERS = {
    "fcfs": Order(None),
    "priority": Order(_priority),
    "deadline": Order(_deadline),
    "sjf": Order(_sjf),
    "density": Order(_density),
    "decode_deadline": Order(_decode_deadline),
    "decode_density": Order(_decode_density),
    "urgency_density": Order(_urgency_density),
    "urgency_priority": Order(_urgency_priority),
    "decode_urgency_density": Order(_decode_urgency_density),
}


def rank(
    running: Ordered[Sequence],
    waiting: Ordered[Sequence],
    slots: int,
    order: Order,
    budget: Budget,
    cost: StepCost,
    now: float,
) -> Queues:
    """The queues in rank order; both come in order of arrival. Pure."""
    view = View(running, waiting, budget, cost, now)
    number, first = view.facts[NUMBER], _aged(view)
    offline = view.offline & ~first
    keys = order.keys(view) if order.keys else []
    places = np.lexsort((number, *reversed(keys), offline, ~first))
    runs = places < len(running)
    online = ~offline[places]

    def named(at: np.ndarray) -> list[Sequence]:
        return list(map(view.everybody.__getitem__, at.tolist()))

    return Queues(
        named(places[runs]), named(places[~runs]), slots, int((runs & online).sum()), int((~runs & online).sum()),
        named(places), view.step_seconds if "step_seconds" in vars(view) else None,
    )  # fmt: skip


def _aged(view: View) -> np.ndarray:
    """Is it the oldest of those older than their bound? One alone, or a crowd of them would undo the order for all."""
    bound = view.budget.aged_seconds * np.where(view.offline, OFFLINE_AGED, 1)
    aged, number = view.now - view.facts[ARRIVED] > bound, view.facts[NUMBER]
    return aged & (number == number[aged].min()) if aged.any() else aged


def _pack(sequence: Sequence) -> bytes:
    """FACTS of a sequence that has been queued, as float64; they stay with it."""
    urgency = sequence.request.urgency
    sequence.facts = np.array(
        [
            sequence.order, sequence.arrived, sequence.arrived + urgency.ttft, urgency.tpot, sequence.prompt_tokens,
            urgency.offline, PRIORITIES[urgency.priority], WEIGHTS[urgency.priority],
        ], float,
    ).tobytes()  # fmt: skip
    return sequence.facts
