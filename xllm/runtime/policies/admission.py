"""Who may start beside those that run: the plug-in `admission`. Memory for the whole text there is to compute, slots and
tokens are looked at for every policy (see step); these ask for more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Ordered

import numpy as np

from xllm.runtime.pages import PoolPlan
from xllm.runtime.policies.step import Step
from xllm.runtime.sequence import Sequence

ASSUMED_TOKENS = 256  # of an answer, where max_tokens does not say less; doubled for one that is longer already
CHECKPOINTS = 64  # ends of answers that a simulation looks at one by one


def any_time(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Everybody."""
    return None


def zero_evict(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Only if the pool would hold all of them until each has ended: nobody is preempted as long as no answer is longer
    than assumed."""
    peak = peak_pages((*running, *step.admitted, sequence), step.pool)
    return f"would need {peak} of {step.pool.pages} pages later" if peak > step.pool.pages else None


def gang(step: Step, running: Ordered[Sequence], sequence: Sequence) -> str | None:
    """Only as one of a group that starts together, with room for the longest answers of all."""
    if running:
        return "waits for the group that runs"
    group = (*step.admitted, sequence)
    needed = sum(step.pool.pages_for(one.prompt_tokens + one.max_outputs - 1) for one in group)
    return f"the group would need {needed} pages" if needed > step.pool.pages else None


def assumed_outputs(sequence: Sequence) -> int:
    """Tokens the answer is taken to have in the end."""
    assumed = ASSUMED_TOKENS
    while assumed <= sequence.outputs:
        assumed *= 2
    return min(assumed, sequence.max_outputs)


def peak_pages(sequences: Iterable[Sequence], pool: PoolPlan) -> int:
    """Most pages in use at once while each generates a token a round until its assumed end, prompts being computed. It
    is looked up at ends of answers, before each of which it only grows; ends beyond CHECKPOINTS are taken together, as
    late as the last of them."""
    held = list(sequences)
    tokens = np.array([one.prompt_tokens + one.outputs for one in held])
    left = np.array([max(0, assumed_outputs(one) - one.outputs) for one in held])
    ends = np.unique(left)
    if len(ends) > CHECKPOINTS:
        ends = ends[np.linspace(0, len(ends) - 1, CHECKPOINTS).astype(int)]
        left = ends[np.searchsorted(ends, left)]
    # The last token is never fed back, so its KV needs no room.
    then = np.minimum(ends[:, None], left) + tokens - 1
    kv = pool.kv
    size = kv.fixed_bytes + -(-then // kv.group_tokens) * kv.group_bytes
    pages = -(-size // pool.page_bytes) * (left >= ends[:, None])
    return int(pages.sum(axis=1).max())
