"""Requests that start together or not at all: a group that one step can hold is not split over two because others took
a part of the step's tokens. What of it was about to start waits; the others run."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import replace

from xllm.runtime.scheduler import Budget, Decision, Queues
from xllm.runtime.sequence import Sequence


def whole_groups(decision: Decision, queues: Queues, budget: Budget) -> Decision:
    """The decision without the part of a group that was admitted while the rest was not. It stays where nothing else
    would be left of the step, or a whole step would not do; where others were admitted behind it, who would then
    overtake it; and where room was made for it. One that was preempted comes back alone."""
    if not decision.admitted or not (last := decision.admitted[-1].request.together):
        return decision
    admitted, members = _fresh(decision.admitted, last), _fresh(queues.waiting, last)
    orders = {sequence.order for sequence in admitted}
    others = any(grant.sequence.order not in orders for grant in decision.grants)
    last_ones = list(decision.admitted[len(decision.admitted) - len(admitted) :]) == admitted
    tokens = sum(sequence.remaining for sequence in members)
    whole = tokens <= budget.tokens and len(members) <= budget.pool.spans
    if len(admitted) == len(members) or not (others and last_ones and whole) or decision.preempted:
        return decision
    return replace(
        decision,
        grants=tuple([grant for grant in decision.grants if grant.sequence.order not in orders]),
        admitted=tuple([sequence for sequence in decision.admitted if sequence.order not in orders]),
        why=(*decision.why, f"group {last}: {len(admitted)} of {len(members)} would start, they wait for each other"),
    )


def _fresh(sequences: Ordered[Sequence], group: str) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.request.together == group and not sequence.recompute]
