"""The xTensor pool: gives each sequence a contiguous span that grows by pages as it does, mapped when a step needs them
or ahead of that, from whatever nobody was promised.

Complete pages become part of the prefix cache while their writer still lives (see prefix); other spans map them
read-only. When their writer ends its span is emptied, and they wait, mapped nowhere, for the next use or to be evicted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from xllm.runtime.errors import MemoryFault
from xllm.runtime.forks import fork
from xllm.runtime.invariants import check_pool
from xllm.runtime.pages import PageState, PoolFigures, PoolPlan
from xllm.runtime.promises import Promises
from xllm.runtime.spans import Spans
from xllm.runtime.store import PageStore

AHEAD_PAGES = 8


class KvPool:
    """The pages of one engine, from a store that pools of others may share (see store). Thread-safe: the store's lock,
    held for at most one map and one unmap at a time by the background.

    Promises alone decide what fits: as long as there is room for them, `grow` succeeds, whatever has been mapped ahead.
    What is found in the cache may depend on the background thread's timing; no answer does. Raises MemoryFault when the
    store has no room for a longest request of this model.
    """

    def __init__(self, plan: PoolPlan, store: PageStore):
        self.plan, self.store = plan, store
        self._memory, self._lock = store.memory, store.lock
        self.promises = Promises(store.ledger, plan.pages, min(plan.span_pages, plan.pages))
        self.spans = Spans(plan, store)
        self.on_room: Callable[[], None] | None = None
        self._closing = False
        self._hungry: dict[int, None] = {}  # live slots with fewer pages ahead than they should have, longest first
        self._critical_maps = self._hidden_maps = self._evictions = 0
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        store.join(self)

    @property
    def free_pages(self) -> int:
        """Pages that can be promised to sequences, whether or not something is mapped."""
        return self.promises.room

    def match(self, chain: Sequence[bytes]) -> int:
        """How many groups of a text are cached. While a step is planned they stay until the next `grow` at least."""
        with self._lock:
            return self.spans.cache.match(chain).groups

    def start(self, tokens: int, chain: Sequence[bytes] = ()) -> int:
        """Give a span to a new sequence that will soon need `tokens` tokens; returns its slot. At most `spans` live.
        `chain` is the cached text it starts on, as long as `match` found it: the first `grow` maps it."""
        with self._lock:
            wanted = self.plan.pages_for(tokens)
            match = self.spans.cache.match(chain)
            cost = self._cost_of if not match.groups else lambda length, _: (length,)
            slot = self.spans.begin(min(self.spans.idle, key=lambda length: cost(length, wanted)), wanted, match)
            if not match.groups:
                self._feed(slot)
            self._work.notify()
            return slot

    def base(self, slot: int) -> int:
        """Address of the slot's span; the same for the life of the pool."""
        return self.spans[slot].base

    def grow(self, slot: int, tokens: int, promise: int | None = None) -> None:
        """Back the first `tokens` tokens of a live slot, which is promised as many pages as that takes, or `promise`
        where it is one of several that share some. Raises MemoryFault when there is no room for that or a mapping fails
        (what was mapped until then stays)."""
        span = self.spans[slot]
        needed = self.plan.pages_for(tokens)
        more = max(0, (needed if promise is None else promise) - self.promises.of(slot))
        if needed <= span.backed and not more:
            return
        with self._lock:
            if more > self.promises.room:
                text = f"slot {slot} needs {more} pages, {self.promises.room} are free"
                raise MemoryFault("memory_unavailable", text)
            fresh = span.match.groups > 0 and not span.backed
            if fresh:
                self.spans.cut(slot)
                for page in span.match.shared:
                    self.spans.map_shared(slot, page)
            while len(span.pages) < needed:
                address = self.spans.map_next(slot, self._take_page(slot))
                self._critical_maps += 1
                if fresh and span.match.tail in span.held:
                    self._memory.copy(span.match.tail, address, span.match.size)
                    self.spans.drop(slot, span.match.tail)
            self.promises.add(slot, more)
            span.backed = max(needed, span.backed)
            self._feed(slot)

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Let live slot `target` begin with the `tokens` tokens that are written in live slot `source` (see forks),
        within what is promised to one of their group. What it had is given up. No launched step may refer to `target`,
        nor write to `source`. Raises MemoryFault; `target` then can only be finished."""
        with self._lock:
            self._critical_maps += fork(self.spans, source, target, tokens, lambda: self._take_page(target))
            self._feed(target)

    def tokens_complete(self, slot: int) -> int:
        """Tokens of a live slot that must be written until its next page can be cached."""
        return self.spans.cache.groups_of(self.spans[slot].offered).stop * self.plan.kv.group_tokens

    def offer(self, slot: int, chain: Sequence[bytes]) -> None:
        """Cache the pages of a live slot whose written text is `chain`. From an incomplete last one others copy."""
        with self._lock:
            self.spans.offer(slot, chain)

    def finish(self, slot: int, chain: Sequence[bytes] = ()) -> None:
        """End a sequence: its pages stay mapped for the next one, or in the cache where `chain` names the text written
        to them. No launched step may still reference the slot."""
        with self._lock:
            self.spans.offer(slot, chain)
            self.promises.end(slot)
            self.spans.end(slot)
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
            page = self.store.untouched(self)
            assert page is not None
            if slot in self.spans.live:
                self._hungry.pop(slot)
                address = self.spans.map_next(slot, page)
                self._feed(slot)
            else:
                self.spans.take_idle(0)
                try:
                    address = self.spans.map_next(slot, page)
                finally:
                    self.spans.add_idle(slot)
            self._hidden_maps += 1
        # Outside the lock: zeroing a page takes milliseconds. If it is taken back meanwhile, this touches a hole.
        self._memory.populate(address)
        return True

    def start_premapping(self) -> None:
        """Start the background thread. Off, the pool is deterministic and maps everything when it is needed."""
        self._thread = threading.Thread(target=self._premap_forever, name="xllm-premap", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """End the background thread and what others may wait for, but keep the pages: a step may still write to
        them."""
        with self._lock:
            self._closing = True
            self._work.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.store.unclaim(self)

    def close(self) -> None:
        """End the background thread and give all pages back. No launched step may be left. Calling it again does
        nothing."""
        self.abandon()
        try:
            with self._lock:
                self.store.filled.wait_for(lambda: not self.store.filling)
                shared = self.store.leave(self)
                try:
                    if shared:
                        self.spans.unmap_all()
                finally:  # whatever can be said of the spans of an engine that failed, others may have these now
                    self.store.free += self.spans.forget_all()
                    self.promises.end_all()
                if shared:
                    self.store.rest()
        finally:
            self.store.tell(self)

    @property
    def idle_pages(self) -> int:
        return self.spans.idle_pages

    @property
    def oldest_use(self) -> int | None:
        return self.spans.cache.oldest_use

    @property
    def held_pages(self) -> set[int]:
        return self.spans.pages

    def figures(self) -> PoolFigures:
        with self._lock:
            idle, cached = self.spans.idle_pages, self.spans.cache.unused
            mapped = self.spans.count - idle - cached
            states = (len(self.store.free), self.store.filling, mapped, idle, cached)
            by_state = dict(zip(PageState, states, strict=True))
            counts = self._critical_maps, self._hidden_maps, self.spans.unmaps, self._evictions
            return PoolFigures(by_state, *counts, len(self.spans.cache))

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

    def _take_page(self, slot: int) -> int:
        """A page for a step that waits. When all are in use, it goes on in the very page it was to copy from."""
        page = self.store.take(self, slot)
        return self.spans.take_held(slot) if page is None else page

    def give_idle(self) -> int:
        """The last page of the shortest idle span: long spans stay whole for long sequences."""
        slot = self.spans.take_idle(min(length for length in self.spans.idle if length))
        try:
            return self.spans.unmap_last(slot)
        finally:
            self.spans.add_idle(slot)

    def give_cached(self) -> int:
        self._evictions += 1
        return self.spans.cache.evict()

    def give_ahead(self, but: int = -1) -> int | None:
        live = (slot for slot in self.spans.live if slot != but)
        richest = max(live, key=lambda slot: self.spans[slot].ahead, default=but)
        return self.spans.unmap_last(richest) if richest != but and self.spans[richest].ahead else None

    def _feed(self, slot: int) -> None:
        """Note whether a live slot should get more pages ahead: all of its prompt, and its share of AHEAD_PAGES."""
        span = self.spans[slot]
        share = -(-AHEAD_PAGES // len(self.spans.live))
        if len(span.pages) < min(self.plan.span_pages, max(span.goal, span.backed + share)):
            self._hungry[slot] = None
            self._work.notify()
        else:
            self._hungry.pop(slot, None)

    def _neediest(self) -> int | None:
        if self.promises.resting or self.store.awaited:
            return None
        if self._hungry and self.store.has_untouched():
            return next(iter(self._hungry))
        if self.store.free and self.spans.idle_pages < AHEAD_PAGES and 0 in self.spans.idle:
            return self.spans.idle[0][-1]
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
