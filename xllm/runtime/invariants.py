"""What must hold of an engine's queues between steps, and of its pool at any time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from xllm.runtime.errors import InvariantBroken
from xllm.runtime.sequence import Sequence, State

if TYPE_CHECKING:
    from xllm.runtime.kv import KvPool


def check(pool: KvPool, running: list[Sequence], waiting: list[Sequence], leaving: list[Sequence]) -> None:
    """Raises InvariantBroken."""

    def by_order(sequence: Sequence) -> int:
        return sequence.order

    pool.check()
    holders = running + leaving
    slots = [slot for sequence in holders for slot in sequence.slots]
    problems = {
        "a slot has two sequences": len(set(slots)) < len(slots),
        "a running sequence has no slot": any(slot < 0 for slot in slots),
        "pages are miscounted": sum(sequence.pages for sequence in holders) != pool.promises.total,
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


def check_pool(pool: KvPool) -> None:
    """Every page has one state, and one owner or several that share it; all counters agree. The pool's lock is held.
    Raises InvariantBroken."""
    spans, cache = pool.spans, pool.spans.cache
    placed = [(slot, page) for slot, span in enumerate(spans.all) for page in span.pages]
    shared = {*cache.uses, *spans.forked}
    held = [(slot, page) for slot, page in placed if page not in shared]
    uses = Counter(page for span in spans.all for page in span.held)
    live = [spans[slot] for slot in spans.live]
    backed = {page for span in live for page in span.pages[: span.backed]}
    idle = sum(slot not in spans.live for slot, _ in held)
    _require({page: slot for slot, page in held} == spans.owner, "a page is in a span that does not own it")
    _require(len(held) == len(spans.owner), "a page is in two places")
    _require(cache.uses == {page: uses[page] for page in cache.uses}, "uses are miscounted")
    _require(spans.forked == {page: uses[page] for page in spans.forked}, "forks are miscounted")
    _require(all(spans.forked.values()), "a page is of no fork any more")
    _require(uses.keys() <= shared, "a page in use is neither cached nor forked")
    _require(len(shared) == len(cache) + len(spans.forked), "a page is cached and forked")
    _require(not shared & spans.owner.keys(), "a shared page is somebody's")
    _require(sum(not count for count in cache.uses.values()) == cache.unused, "unused cached pages are miscounted")
    _require(all(page in spans[slot].held for slot, page in placed if page in shared), "unheld page")
    _require(idle == spans.idle_pages, "pages of idle spans are miscounted")
    pool.promises.check(spans.live)
    _require(len(backed) <= pool.promises.total, "less is promised than is used")
    filed = {(length, slot) for length, slots in spans.idle.items() for slot in slots}
    lengths = {(len(span.pages), slot) for slot, span in enumerate(spans.all) if slot not in spans.live}
    _require(filed == lengths and all(spans.idle.values()), "idle spans are misfiled")
    for span in live:
        _require(span.backed <= len(span.pages) <= pool.plan.span_pages, "a backed page is not mapped")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantBroken(f"KV pool: {message}")
