"""What must hold of an engine's queues between steps."""

from __future__ import annotations

from xllm.runtime.errors import InvariantBroken
from xllm.runtime.kv import KvPool
from xllm.runtime.sequence import Sequence, State


def check(pool: KvPool, running: list[Sequence], waiting: list[Sequence], leaving: list[Sequence]) -> None:
    """Raises InvariantBroken."""

    def by_order(sequence: Sequence) -> int:
        return sequence.order

    pool.check()
    holders = running + leaving
    slots = [sequence.slot for sequence in holders]
    problems = {
        "a slot has two sequences": len(set(slots)) < len(slots),
        "a running sequence has no slot": any(slot < 0 for slot in slots),
        "pages are miscounted": sum(sequence.pages for sequence in holders) != pool.committed,
        "tokens lie beyond the pages": any(sequence.computed > sequence.capacity for sequence in holders),
        "running is out of order": running != sorted(running, key=by_order),
        "waiting is out of order": waiting != sorted(waiting, key=by_order),
        "a waiting sequence holds something": any(
            sequence.slot >= 0 or sequence.pages or sequence.flights or sequence.pending for sequence in waiting
        ),
        "a leaving sequence is not in flight": any(not sequence.flights for sequence in leaving),
        "states are wrong": any(sequence.state != State.RUNNING for sequence in running)
        or any(sequence.state != State.WAITING for sequence in waiting)
        or any(sequence.state != State.LEAVING for sequence in leaving),
    }
    for problem, found in problems.items():
        if found:
            raise InvariantBroken(f"engine: {problem}")
