"""Who goes first: ten orders, each a key of a sequence under a view of all; and the ranking every policy shares.

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

from xllm.runtime.policies.state import OFFLINE_AGED, Budget, Queues, StepCost
from xllm.runtime.sequence import Sequence, State

Key = tuple[float, ...]
PRIORITIES = {"HIGH": 0, "DEFAULT": 1, "NORMAL": 1, "LOW": 2}
WEIGHTS = {"HIGH": 4.0, "DEFAULT": 2.0, "NORMAL": 2.0, "LOW": 1.0}
NEGLIGIBLE = 1e-9  # seconds
TIGHTEST_SHARE = 0.65  # of the least TPOT asked for: no step is cut shorter
URGENT, RELAXED, LATE = 0.0, 1.0, 2.0


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

    def work(self, before: int, after: int) -> float:
        """Seconds for the tokens from `before` to `after` of a prompt, without the constant."""
        return (after - before) * (self.linear + self.square * (after + before))


@dataclass(frozen=True)
class View:
    """What keys may look at besides the sequence: the time, and of the whole load what work is left (`total`), all in
    seconds. `decode` is what one more decode adds to a step."""

    now: float
    curve: Curve = Curve(0.0, 0.0, 0.0)
    decode: float = 0.0
    total: float = 0.0
    step_seconds: float = 0.0

    @staticmethod
    def of(running: Ordered[Sequence], waiting: Ordered[Sequence], budget: Budget, cost: StepCost, now: float) -> View:
        curve = Curve.of(cost, max(1, budget.tokens // 2))
        decodes, work = [], 0.0
        for sequence in (*running, *waiting):
            if sequence.decoding:
                decodes += sequence.pieces(1)
            else:
                work += sequence.rows * curve.work(sequence.computed, sequence.computed + sequence.remaining)
        added = cost.seconds(decodes) - curve.constant if decodes else 0.0
        least = step_seconds(running, waiting, budget, now)
        return View(now, curve, added / max(1, len(decodes)), work + added, least)

    def work(self, sequence: Sequence, decoding: bool) -> float:
        """Seconds for what the model has not seen of a sequence."""
        if decoding:
            return max(max(1, sequence.rows) * self.decode, NEGLIGIBLE)
        work = self.curve.work(sequence.computed, sequence.computed + sequence.remaining)
        return max(max(1, sequence.rows) * work, NEGLIGIBLE)

    def class_of(self, sequence: Sequence, decoding: bool, due: float) -> float:
        """URGENT: due before all that is left could be done. LATE: no first token yet, and too late for it to be in
        time even alone; such requests leave room for those that still can be."""
        left, constant = due - self.now, self.curve.constant
        if not decoding:
            if sequence.first_at is None and left < self.work(sequence, decoding):
                return LATE
            return URGENT if left < self.total + constant else RELAXED
        if self.step_seconds <= constant:
            return URGENT
        return URGENT if left < self.total * self.step_seconds / (self.step_seconds - constant) else RELAXED


def due(sequence: Sequence, now: float) -> float:
    """When its next token should come; infinity when nothing is asked. `now` is when the launched steps will have
    ended, so that is when a first token in flight is there."""
    urgency, outputs = sequence.request.urgency, sequence.outputs
    if not outputs:
        return sequence.arrived + urgency.ttft
    return (now if sequence.first_at is None else sequence.first_at) + urgency.tpot * outputs


def step_seconds(running: Ordered[Sequence], waiting: Ordered[Sequence], budget: Budget, now: float) -> float:
    """What a step may take: the least time left of those decodes that can still be served in time, but never less
    than a share of the tightest TPOT asked for. While nobody decodes, the least time left until a first token, but
    never less than `step_seconds`."""
    decodes = [sequence for sequence in running if sequence.decoding]
    if not decodes:
        left = [due(sequence, now) - now for sequence in (*running, *waiting)]
        return max(min((time for time in left if time > 0), default=math.inf), budget.step_seconds)
    tightest = min(sequence.request.urgency.tpot for sequence in decodes)
    if math.isinf(tightest):
        return budget.step_seconds
    least = TIGHTEST_SHARE * tightest
    left = [due(sequence, now) - now for sequence in decodes]
    return max(min((time for time in left if time >= least), default=least), least)


def _fcfs(sequence: Sequence, view: View, decoding: bool) -> Key:
    return ()


def _priority(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (PRIORITIES[sequence.request.urgency.priority],)


def _deadline(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (due(sequence, view.now),)


def _sjf(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (view.work(sequence, decoding),)


def _density(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (-WEIGHTS[sequence.request.urgency.priority] / view.work(sequence, decoding),)


def _decode_deadline(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (not decoding, due(sequence, view.now))


def _decode_density(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (not decoding, *_density(sequence, view, decoding))


def _urgency_density(sequence: Sequence, view: View, decoding: bool) -> Key:
    at = due(sequence, view.now)
    group = view.class_of(sequence, decoding, at)
    return (group, at) if group == RELAXED else (group, *_decode_density(sequence, view, decoding))


def _urgency_priority(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (view.class_of(sequence, decoding, due(sequence, view.now)), *_priority(sequence, view, decoding))


def _decode_urgency_density(sequence: Sequence, view: View, decoding: bool) -> Key:
    return (not decoding, *_urgency_density(sequence, view, decoding))


@dataclass(frozen=True)
class Order:
    """A key, lowest first; `costed` ones look at what work takes. Without a key it is the order of arrival."""

    key: Callable[[Sequence, View, bool], Key] | None
    costed: bool = False


ORDERS = {
    "fcfs": Order(None),
    "priority": Order(_priority),
    "deadline": Order(_deadline),
    "sjf": Order(_sjf, costed=True),
    "density": Order(_density, costed=True),
    "decode_deadline": Order(_decode_deadline),
    "decode_density": Order(_decode_density, costed=True),
    "urgency_density": Order(_urgency_density, costed=True),
    "urgency_priority": Order(_urgency_priority, costed=True),
    "decode_urgency_density": Order(_decode_urgency_density, costed=True),
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
    aged = _aged(running, waiting, budget.aged_seconds, now)
    view = View.of(running, waiting, budget, cost, now) if order.costed else View(now)
    key = order.key or _fcfs

    def place(sequence: Sequence) -> tuple[bool, bool, Key, int]:
        first = sequence is aged
        offline = sequence.request.urgency.offline and not first
        return not first, offline, key(sequence, view, sequence.decoding), sequence.order

    line = sorted((*running, *waiting), key=place)
    runs = [sequence for sequence in line if sequence.state is not State.WAITING]
    waits = [sequence for sequence in line if sequence.state is State.WAITING]

    def online(queue: list[Sequence]) -> int:
        return sum(not sequence.request.urgency.offline or sequence is aged for sequence in queue)

    return Queues(runs, waits, slots, online(runs), online(waits), line)


def _aged(running: Ordered[Sequence], waiting: Ordered[Sequence], seconds: float, now: float) -> Sequence | None:
    """The oldest of those older than their bound: one alone, or a crowd of them would undo the order for all."""

    def first(queue: Ordered[Sequence]) -> Sequence | None:
        for sequence in queue:
            bound = seconds * OFFLINE_AGED if sequence.request.urgency.offline else seconds
            if now - sequence.arrived > bound:
                return sequence
        return None

    found = [sequence for queue in (running, waiting) if (sequence := first(queue)) is not None]
    return min(found, key=lambda sequence: sequence.order, default=None)
