"""Who may start beside those that run: the plug-in `admission`. Memory for the whole text there is to compute, slots
and tokens are looked at for every policy (see step); these ask for more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import replace

import numpy as np

from xllm.runtime.pages import PoolPlan
from xllm.runtime.policies.state import Budget
from xllm.runtime.policies.step import Step
from xllm.runtime.sequence import Sequence

LONG = 0.95  # this share of the latest answers was not longer than what is assumed
LATEST = 256
ENOUGH = 16  # answers to go by, and how often they are looked at again
BACK = 2  # rounds until the pages of one that ended are free: a step launched meanwhile still has it
CHECKPOINTS = 64  # ends of answers that a simulation looks at one by one


def any_time(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Everybody."""
    return None


def zero_evict(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Only if the pool would hold all of them until each has ended: nobody is preempted as long as no answer is longer
    than assumed."""
    peak, most = peak_of((*running, *step.admitted, sequence), step.limits), step.limits.most_pages
    return f"would need {peak} of {most} pages later" if peak > most else None


def gang(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Only as one of a group that starts together, with room for the longest answers of all."""
    if running:
        return "waits for the group that runs"
    group = (*step.admitted, sequence)
    needed = sum(one.pages_at(step.pool, one.prompt_tokens + one.max_outputs - 1) for one in group)
    return f"the group would need {needed} pages" if needed > step.limits.most_pages else None


def peak_of(held: Ordered[Sequence], limits: Budget) -> int:
    """Most pages that these will have in use at once, by what is assumed."""
    piece = max(1, min(limits.tokens, limits.beside_decodes, limits.max_chunk))
    delay = sum(-(-one.remaining // piece) for one in held if not one.decoding)
    return peak_pages(held, limits.pool, limits.answer_tokens, delay)


class Lengths:
    """Follows how long answers are."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque(maxlen=LATEST)
        self._ended = 0

    def follow(self, budget: Budget, tokens: int) -> Budget:
        """The budget after an answer of so many tokens."""
        self._latest.append(tokens)
        self._ended += 1
        if self._ended % ENOUGH:
            return budget
        long = sorted(self._latest)[int(LONG * (len(self._latest) - 1))]
        return replace(budget, answer_tokens=max(1, long))


def assumed_outputs(sequence: Sequence, assumed: int) -> int:
    """Tokens the answer is taken to have in the end: doubled for one that is longer already."""
    while assumed <= sequence.outputs:
        assumed *= 2
    return min(assumed, sequence.max_outputs)


def peak_pages(sequences: Iterable[Sequence], pool: PoolPlan, assumed: int, delay: int) -> int:
    """Most pages in use at once while each generates a token a round until its assumed end and then gives them back.
    Those whose prompt is not computed yet grow from now on as well, but end `delay` rounds later: whenever they really
    start, they hold no more. It is looked up at the ends, before each of which it only grows; ends beyond CHECKPOINTS
    are taken together, as late as the last of them."""
    held = list(sequences)
    tokens = np.array([one.prompt_tokens + one.outputs for one in held])
    left = np.array([max(0, assumed_outputs(one, assumed) - one.outputs) for one in held])
    until = left + [BACK if one.decoding else BACK + delay for one in held]
    ends = np.unique(until)
    if len(ends) > CHECKPOINTS:
        ends = ends[np.linspace(0, len(ends) - 1, CHECKPOINTS).astype(int)]
        until = ends[np.searchsorted(ends, until)]
    # The last token is never fed back, so its KV needs no room.
    then = np.minimum(ends[:, None], left) + tokens - 1
    kv = pool.kv
    size = kv.fixed_bytes + -(-then // kv.group_tokens) * kv.group_bytes
    width, stem = np.array([one.width for one in held]), np.array([one.stem for one in held])
    pages = stem + width * (-(-size // pool.page_bytes) - stem)
    return int((pages * (until >= ends[:, None])).sum(axis=1).max())
