"""Which tokens of which sequences make up the next step. A pure function: it reads the state, changes nothing, looks at
no clock, and gives the same decision for the same state and policy.

The policy says what a step is made of (see policies); whatever it is, budgets hold, nobody gives way to one behind it
in rank, and the first can always go on, so everything ends (see policies.orders).
"""

from __future__ import annotations

import math

from xllm.runtime.policies import CHUNKED
from xllm.runtime.policies.orders import View
from xllm.runtime.policies.policy import Policy
from xllm.runtime.policies.state import Budget, Decision, Grant, Queues, StepCost, TokenCost
from xllm.runtime.policies.step import Step, chunk

__all__ = ["Budget", "Decision", "Grant", "Queues", "StepCost", "TokenCost", "chunk", "decide"]
NO_MODEL = TokenCost()


def decide(
    queues: Queues,
    budget: Budget,
    free_pages: int,
    now: float,
    policy: Policy = CHUNKED,
    cost: StepCost = NO_MODEL,
) -> Decision:
    """The next step. `queues` are in rank order, `free_pages` are pages promised to nobody, `now` is in seconds like
    Request.arrival. An empty `grants` means that nothing can run before a launched step is committed (or that there is
    nothing)."""
    limit = queues.step_seconds if policy.timed else math.inf
    if limit is None:
        limit = View(queues.running, queues.waiting, budget, cost, now).step_seconds
    step = Step(queues, budget, free_pages, policy, cost, limit)
    policy.batching(step)
    if not step.grants:
        step.free_the_first()
    if step.skipped:
        step.why.append(f"{step.skipped} running sequences: no tokens left in the step")
    waiting = queues.waiting[len(step.admitted) :]
    oldest_wait = max(0.0, now - min([sequence.arrived for sequence in waiting])) if waiting else 0.0
    return Decision(
        tuple(step.grants.values()),
        tuple(step.admitted),
        tuple(step.preempted),
        tuple(step.why),
        oldest_wait,
        tuple(step.causes),
        cost.of(step.sizes()) if policy.timed else 0.0,
    )
