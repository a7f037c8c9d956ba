"""The xTensor pool: which physical page backs which part of which sequence's contiguous span.

A slot is a virtual span of max_len tokens. Its pages are mapped from the front; the first `committed` ones are promised
to the sequence, later ones are mapped ahead and may be taken back. Finished spans keep their pages mapped (Reusable)
for the next sequence of like length. A reused page still holds old bytes: nobody reads them, because kernels read
positions 0..p of a span only, and all of those were written by its present owner, or by the one it shares a page with.

Complete pages become part of the prefix cache while their writer still lives (see prefix); other spans map them
read-only. When their writer ends its span is emptied, and they wait, mapped nowhere, for the next use or to be evicted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xllm.runtime.errors import MemoryFault
from xllm.runtime.invariants import check_pool
from xllm.runtime.pages import PageState, PoolFigures, PoolPlan
from xllm.runtime.prefix import NO_MATCH, Match, PrefixIndex
from xllm.runtime.store import PageStore

AHEAD_PAGES = 8


@dataclass
class _Span:
    base: int
    pages: list[int]  # ids, front to back
    live: bool = False
    committed: int = 0  # the first ones, which nobody else may have
    promised: int = 0  # what it counts for in the pool: as many, but for forks (see forks)
    goal: int = 0  # pages worth having mapped, known from the prompt
    match: Match = NO_MATCH  # what the sequence starts on
    held: list[int] = field(default_factory=list)  # cached pages it uses: those of the match, then its own
    offered: int = 0  # pages up to here are complete and were offered to the cache


class KvPool:
    """The pages of one engine, from a store that pools of others may share (see store). Thread-safe: the store's lock,
    held for at most one map and one unmap at a time by the background.

    Commitments alone decide what fits: as long as they are within `free_pages`, `grow` succeeds, whatever has been
    mapped ahead. What is found in the cache may depend on the background thread's timing; no answer does.
    Raises MemoryFault when the store has no room for a longest request of this model.
    """

    def __init__(self, plan: PoolPlan, store: PageStore):
        self.plan, self.store = plan, store
        self._memory, self._lock = store.memory, store.lock
        self.committed = self.reserved = 0
        self.on_room: Callable[[], None] | None = None
        self._closing = self.resting = False  # resting: no page is to be touched
        span_bytes = plan.span_pages * plan.page_bytes
        base = self._memory.reserve(span_bytes * plan.spans)
        self._spans = [_Span(base + slot * span_bytes, []) for slot in range(plan.spans)]
        self._owner: dict[int, int] = {}  # page -> slot; the one place that knows whose a page is, if it is not cached
        self._cache = PrefixIndex(plan.kv, plan.page_bytes, store.clock)
        self._forked: dict[int, int] = {}  # pages of several spans that are not cached, and of how many
        self._live = 0
        self.idle_pages = 0  # in spans of no sequence
        # Idle slots by how many pages they have: a start looks at a handful of lengths, not at every slot.
        self._idle: dict[int, list[int]] = {0: list(reversed(range(plan.spans)))}
        self._hungry: dict[int, None] = {}  # live slots with fewer pages ahead than they should have, longest first
        self._critical_maps = self._hidden_maps = self._unmaps = self._evictions = 0
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        store.join(self)

    @property
    def free_pages(self) -> int:
        """Pages that can be promised to sequences (whether or not something is mapped); see PageStore.room_of."""
        return min(self.plan.pages - self.committed, self.store.room_of(self))

    def match(self, chain: Sequence[bytes]) -> int:
        """How many groups of a text are cached. While a step is planned they stay until the next `grow` at least."""
        with self._lock:
            return self._cache.match(chain).groups

    def start(self, tokens: int, chain: Sequence[bytes] = ()) -> int:
        """Give a span to a new sequence that will soon need `tokens` tokens; returns its slot. At most `spans` live.
        `chain` is the cached text it starts on, as long as `match` found it: the first `grow` maps it."""
        with self._lock:
            wanted = self.plan.pages_for(tokens)
            match = self._cache.match(chain)
            cost = self._cost_of if not match.groups else lambda length, _: (length,)
            slot = self._take_idle(min(self._idle, key=lambda length: cost(length, wanted)))
            span = self._spans[slot]
            span.live, span.goal, span.offered = True, wanted, len(match.shared)
            span.match, span.held = match, [*match.shared, *([match.tail] if match.size else [])]
            self._live += 1
            self.idle_pages -= len(span.pages)
            for page in span.held:
                self._cache.hold(page)
            if not match.groups:
                self._feed(slot)
            self._work.notify()
            return slot

    def base(self, slot: int) -> int:
        """Address of the slot's span; the same for the life of the pool."""
        return self._spans[slot].base

    def grow(self, slot: int, tokens: int, promise: int | None = None) -> None:
        """Back the first `tokens` tokens of a live slot, which counts for as many pages as that takes, or for `promise`
        where it is one of several that share some. Raises MemoryFault when the promises exceed the pool or a mapping
        fails (what was mapped until then stays)."""
        span = self._spans[slot]
        needed = self.plan.pages_for(tokens)
        more = max(0, (needed if promise is None else promise) - span.promised)
        if needed <= span.committed and not more:
            return
        with self._lock:
            if more > self.free_pages:
                raise MemoryFault("memory_unavailable", f"slot {slot} needs {more} pages, {self.free_pages} are free")
            fresh = span.match.groups > 0 and not span.committed
            if fresh:
                self._adopt(slot)
            while len(span.pages) < needed:
                self._map_next(slot, self._take_page(slot))
                self._critical_maps += 1
                if fresh and span.match.tail in span.held:
                    at = span.base + (len(span.pages) - 1) * self.plan.page_bytes
                    self._memory.copy(span.match.tail, at, span.match.size)
                    self._drop(span.held.pop())
            self.committed += more
            span.promised += more
            span.committed = max(needed, span.committed)
            self._feed(slot)

    def tokens_complete(self, slot: int) -> int:
        """Tokens of a live slot that must be written until its next page can be cached."""
        return self._cache.groups_of(self._spans[slot].offered).stop * self.plan.kv.group_tokens

    def offer(self, slot: int, chain: Sequence[bytes]) -> None:
        """Cache the pages of a live slot whose written text is `chain`. From an incomplete last one others copy."""
        with self._lock:
            self._offer(slot, chain)

    def finish(self, slot: int, chain: Sequence[bytes] = ()) -> None:
        """End a sequence: its pages stay mapped for the next one, or in the cache where `chain` names the text written
        to them. No launched step may still reference the slot."""
        with self._lock:
            span = self._spans[slot]
            self._offer(slot, chain)
            self.committed -= span.promised
            self._live -= 1
            self.idle_pages += sum(page in self._owner for page in span.pages)
            span.live, span.committed, span.promised, span.goal, span.match = False, 0, 0, 0, NO_MATCH
            if span.held:
                # The last page first: what comes later in a text is useless without what comes before it.
                self._empty(slot)
                while span.held:
                    self._drop(span.held.pop())
            self._add_idle(slot)
            self._hungry.pop(slot, None)
            self._work.notify()
        self.store.tell(self)

    def premap(self) -> bool:
        """Map one page ahead of need, for the live sequence that lacks one longest, else for the next one to start.
        Returns False when everybody has enough or no page is left that is not in use. The background thread does just
        this."""
        with self._lock:
            slot = self._neediest()
            if slot is None:
                return False
            span, page = self._spans[slot], self.store.untouched(self)
            assert page is not None
            if span.live:
                self._hungry.pop(slot)
                self._map_next(slot, page)
                self._feed(slot)
            else:
                self._take_idle(0)
                try:
                    self._map_next(slot, page)
                finally:
                    self._add_idle(slot)
            self._hidden_maps += 1
            address = span.base + (len(span.pages) - 1) * self.plan.page_bytes
        # Outside the lock: zeroing a page takes milliseconds. If it is taken back meanwhile, this touches a hole.
        self._memory.populate(address)
        return True

    def start_premapping(self) -> None:
        """Start the background thread. Off, the pool is deterministic and maps everything when it is needed."""
        self._thread = threading.Thread(target=self._premap_forever, name="xllm-premap", daemon=True)
        self._thread.start()

    def stop_premapping(self) -> None:
        """End the background thread, if there is one."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the background thread and give all pages back. No launched step may be left."""
        self.stop_premapping()
        with self._lock:
            if self.store.leave(self):
                for slot in range(self.plan.spans):
                    self._empty(slot)
                self.store.free += [*self._cache.uses, *self._forked]
        self.store.tell(self)

    @property
    def least(self) -> int:
        return 0 if self.resting else self.longest

    @property
    def longest(self) -> int:
        return min(self.plan.span_pages, self.plan.pages)

    @property
    def oldest_use(self) -> int | None:
        return self._cache.oldest_use

    @property
    def held_pages(self) -> set[int]:
        return self._owner.keys() | self._cache.uses.keys() | self._forked.keys()

    def figures(self) -> PoolFigures:
        with self._lock:
            cached = self._cache.unused
            held = len(self._owner) + len(self._cache) + len(self._forked)
            mapped = held - self.idle_pages - cached
            states = (len(self.store.free), self.store.filling, mapped, self.idle_pages, cached)
            by_state = dict(zip(PageState, states, strict=True))
            counts = self._critical_maps, self._hidden_maps, self._unmaps, self._evictions
            return PoolFigures(by_state, *counts, len(self._cache))

    def check(self) -> None:
        """Assert the invariants: every page has one state and one owner, and all counters agree. Raises
        InvariantBroken."""
        with self._lock:
            self.store.check()
            check_pool(self)

    def _cost_of(self, length: int, wanted: int) -> tuple[int, int, int]:
        """Order of idle spans for a demand: no unmapping first, then the fewest maps, then the least to spare.

        Pages to spare cost nothing: they are mapped already, and taken back when somebody needs them. Fresh pages
        cost a map and a zeroing, and make the pool touch memory it would never need.
        """
        missing, slack = max(0, wanted - length), max(0, length - wanted)
        return max(0, missing - len(self.store.free)), missing, slack

    def _take_idle(self, length: int) -> int:
        """The idle slot of that many pages that was used last: its caches are the warmest."""
        slots = self._idle[length]
        slot = slots.pop()
        if not slots:
            del self._idle[length]
        return slot

    def _add_idle(self, slot: int) -> None:
        self._idle.setdefault(len(self._spans[slot].pages), []).append(slot)

    def _map_next(self, slot: int, page: int) -> None:
        span = self._spans[slot]
        try:
            self._memory.map(page, span.base + len(span.pages) * self.plan.page_bytes)
        except MemoryFault:
            self._release(page)
            raise
        self.idle_pages += not span.live
        self._owner[page] = slot
        span.pages.append(page)

    def _take_page(self, slot: int) -> int:
        """A page for a step that waits. When all are in use, it goes on in the very page it was to copy from."""
        page = self.store.take(self, slot)
        return self._cache.take(self._spans[slot].held.pop()) if page is None else page

    def give_idle(self) -> int:
        """The last page of the shortest idle span: long spans stay whole for long sequences."""
        slot = self._take_idle(min(length for length in self._idle if length))
        try:
            page = self._unmap_last(slot)
        finally:
            self._add_idle(slot)
        self.idle_pages -= 1
        return page

    def give_cached(self) -> int:
        self._evictions += 1
        return self._cache.evict()

    def give_ahead(self, but: int = -1) -> int | None:
        live = (slot for slot, span in enumerate(self._spans) if span.live and slot != but)
        richest = max(live, key=self._ahead, default=but)
        if richest == but or not self._ahead(richest):
            return None
        return self._unmap_last(richest)

    def _unmap_last(self, slot: int) -> int:
        span = self._spans[slot]
        self._memory.unmap(span.base + (len(span.pages) - 1) * self.plan.page_bytes)
        self._unmaps += 1
        page = span.pages.pop()
        del self._owner[page]
        return page

    def _adopt(self, slot: int) -> None:
        """Map the cached pages a sequence starts on, read-only, in place of what its span had."""
        span = self._spans[slot]
        self._empty(slot)
        for page in span.match.shared:
            self._memory.map(page, span.base + len(span.pages) * self.plan.page_bytes, writable=False)
            span.pages.append(page)

    def _empty(self, slot: int) -> None:
        """Turn a span into one hole; its pages are free then, except for cached ones."""
        span = self._spans[slot]
        if span.pages:
            self._memory.unmap(span.base, len(span.pages))
        self._unmaps += bool(span.pages)
        for page in span.pages:
            if self._owner.pop(page, None) is not None:
                self.idle_pages -= not span.live
                self._release(page)
        span.pages = []

    def _offer(self, slot: int, chain: Sequence[bytes]) -> None:
        span = self._spans[slot]
        while span.offered < len(span.pages) and self._cache.groups_of(span.offered).stop <= len(chain):
            self._cache_page(slot, span.offered, chain)
            span.offered += 1
        if span.offered < len(span.pages) and self._cache.groups_of(span.offered).start < len(chain):
            self._cache_page(slot, span.offered, chain)

    def _cache_page(self, slot: int, index: int, chain: Sequence[bytes]) -> None:
        span = self._spans[slot]
        if span.pages[index] in self._forked:  # others have that text already, or nothing is cached
            return
        added, gone = self._cache.add(span.pages[index], index, chain)
        if added:
            del self._owner[span.pages[index]]
            self._cache.hold(span.pages[index])
            span.held.append(span.pages[index])
        for page in gone:
            self._release(page)

    def _drop(self, page: int) -> None:
        if page in self._forked:
            self._forked[page] -= 1
            if not self._forked[page]:
                del self._forked[page]
                self._release(page)
        elif not self._cache.drop(page):
            self._release(page)

    def _release(self, page: int) -> None:
        self.store.free.append(page)

    def _ahead(self, slot: int) -> int:
        return len(self._spans[slot].pages) - self._spans[slot].committed

    def _feed(self, slot: int) -> None:
        """Note whether a live slot should get more pages ahead: all of its prompt, and its share of AHEAD_PAGES."""
        span = self._spans[slot]
        share = -(-AHEAD_PAGES // self._live)
        if len(span.pages) < min(self.plan.span_pages, max(span.goal, span.committed + share)):
            self._hungry[slot] = None
            self._work.notify()
        else:
            self._hungry.pop(slot, None)

    def _neediest(self) -> int | None:
        if self.resting or self.store.awaited:
            return None
        if self._hungry and self.store.has_untouched():
            return next(iter(self._hungry))
        if self.store.free and self.idle_pages < AHEAD_PAGES and 0 in self._idle:
            return self._idle[0][-1]
        return None

    def _premap_forever(self) -> None:
        while True:
            with self._lock:
                while not self._closing and self._neediest() is None:
                    self._work.wait()
                if self._closing:
                    return
            try:
                self.premap()
            except MemoryFault:
                # The step that needs the page will meet the same fault and report it; trying again would spin.
                return
