"""What goes into a step together, and how long its prompts' pieces are: the plug-ins `batching`, `chunking` and
`preemption`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from xllm.runtime.policies.state import Budget
from xllm.runtime.policies.step import Step
from xllm.runtime.sequence import Sequence, State


def mixed(step: Step) -> None:
    """Decodes, then running prompts, then waiting ones. Beside decodes prompts get at most `beside_decodes` tokens: a
    long one does not hold up everybody's next token. Tokens then left go back to the prompts, first in rank first, as
    long as memory is ample: the pages taken leave one free page for every running sequence. All this for online
    sequences; then the same for offline ones, as far as the step has tokens and `step_seconds` left."""
    running, waiting, split = step.queues.running, step.queues.waiting, step.online_waiting
    timed = step.policy.timed
    if timed:
        step.keep_time_for(_phases(running[: step.online])[0])
    step.prefills = step.give_decodes(running[: step.online])
    if step.grants and not timed:
        step.prompt_tokens = min(step.prompt_tokens, step.limits.beside_decodes)
    for sequence in step.prefills:
        step.give_chunk(sequence)
    step.admit(waiting[:split], online=True)
    if not timed:
        step.give_leftover()
    offline = len(running) - step.online + len(waiting) - split
    if offline and min(step.tokens, step.prompt_tokens) < 1:
        step.why.append(f"{offline} offline sequences: online ones took the step")
    elif offline:
        step.keep_short()
        prefills = step.give_decodes(_in_time(step, running[step.online :]))
        step.prefills += prefills
        for sequence in prefills:
            step.give_chunk(sequence)
        if len(step.admitted) == split:
            step.admit(waiting[split:], online=False)


def prompts_first(step: Step) -> None:
    """A step is all prompts or all decodes: online prompts, those waiting too; if there are none that can go on, all
    decodes; offline prompts only while no online sequence decodes. The next pages of decodes are not given to prompts
    that wait: one that gave way to a decode would take its pages back before that decode had its step."""
    running, waiting, split = step.queues.running, step.queues.waiting, step.online_waiting
    decodes, step.prefills = _phases(running)
    online = {sequence.order for sequence in running[: step.online]}
    for sequence in step.prefills:
        if sequence.order in online:
            step.give_chunk(sequence)
    first = [sequence for sequence in decodes if sequence.order in online]
    step.admit(waiting[:split], online=True, reserved=step.next_pages(first))
    if not step.grants and not first:
        step.keep_short()
        for sequence in step.prefills:
            if sequence.order not in online:
                step.give_chunk(sequence)
        if split == 0:
            step.admit(waiting, online=False, reserved=step.next_pages(decodes))
    if not step.grants:
        step.give_decodes(decodes)
    elif step.seconds == math.inf:
        step.give_leftover()


def one_list(step: Step) -> None:
    """Everybody in rank order, whatever it needs: decodes, running prompts and waiting ones. Time is kept for online
    decodes; offline ones join as far as there is time."""
    running, waiting, split = step.queues.running, step.queues.waiting, step.online_waiting
    ahead, behind = (*running[: step.online], *waiting[:split]), (*running[step.online :], *waiting[split:])
    line = step.queues.line or (*ahead, *behind)
    decodes, prompts = _phases(running[: step.online])
    step.prefills = prompts + _phases(running[step.online :])[1]
    step.keep_time_for(decodes)
    step.prompt_tokens = max(0, step.tokens - len(decodes))
    full = False
    for online, part in ((True, line[: len(ahead)]), (False, line[len(ahead) :])):
        for state, group in groupby(part, key=attrgetter("state")):
            sequences = list(group)
            if not online:
                step.keep_short()
            if state is State.WAITING:
                full = full or len(step.admit(sequences, online)) < len(sequences)
                continue
            for sequence in step.give_decodes(sequences if online else _in_time(step, sequences)):
                step.give_chunk(sequence)


def _phases(running: Iterable[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """Those that decode, and those that are prompts; neither has its last token in flight. Asked about everybody in
    every step, so properties are spelled out."""
    decodes: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in running:
        known = len(sequence.tokens) + sequence.pending
        if sequence.rows and known - sequence.prompt_tokens < sequence.max_outputs:
            computed = sequence.computed
            decoding = known - computed == 1 and computed >= sequence.prompt_tokens
            (decodes if decoding else prompts).append(sequence)
    return decodes, prompts


def _in_time(step: Step, sequences: Iterable[Sequence]) -> list[Sequence]:
    """Without the offline decodes that the step has no time for."""
    held = list(sequences)
    decodes, _ = _phases(held)
    late = {sequence.order for sequence in decodes[step.timely(decodes) :]}
    if late:
        step.why.append(f"{len(late)} offline sequences: no time left in the step")
    return [sequence for sequence in held if sequence.order not in late]


def fixed_chunk(limits: Budget) -> int:
    """Everybody's prompt gets on a little in each step."""
    return limits.max_chunk


def whole_prompt(limits: Budget) -> int:
    """As much of a prompt as the step holds."""
    return limits.tokens


def matrix(needs: str) -> bool:
    """Offline prompts take from nobody; all others from those behind them, offline ones first."""
    return needs != "offline_prefill"
