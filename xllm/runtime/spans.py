"""Which page lies where in whose span: pages of one span alone, pages that several have because one forked from
another, and those of the prefix cache, which nobody writes to any more (see prefix).

A slot is a virtual span of max_len tokens. Its pages are mapped from the front; the first `backed` ones are the
sequence's, later ones are mapped ahead and may be taken back. Finished spans keep their pages mapped (Reusable) for the
next sequence of like length. A reused page still holds old bytes: nobody reads them, because kernels read positions
0..p of a span only, and all of those were written by its present owner, or by the one it shares a page with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.runtime.errors import MemoryFault
from xllm.runtime.pages import PoolPlan
from xllm.runtime.prefix import NO_MATCH, Match, PrefixIndex
from xllm.runtime.store import PageStore


@dataclass
class Span:
    """Of `pages`, front to back, those in `held` are cached or of several spans; it may hold those of `match`, which
    its sequence starts on, before they are in it."""

    base: int
    pages: list[int] = field(default_factory=list)
    backed: int = 0
    goal: int = 0  # pages worth having mapped, known from the prompt
    match: Match = NO_MATCH
    held: dict[int, None] = field(default_factory=dict)  # the last one first to go
    offered: int = 0  # pages up to here are complete and were offered to the cache

    @property
    def ahead(self) -> int:
        return len(self.pages) - self.backed


class Spans:
    """Of one pool. Not thread-safe: the store's lock is held."""

    def __init__(self, plan: PoolPlan, store: PageStore):
        self.plan, self.memory, self._free = plan, store.memory, store.free
        span_bytes = plan.span_pages * plan.page_bytes
        base = store.memory.reserve(span_bytes * plan.spans)
        self.all = [Span(base + slot * span_bytes) for slot in range(plan.spans)]
        self.live: set[int] = set()
        self.owner: dict[int, int] = {}  # page -> slot, of pages that one span alone has
        self.forked: dict[int, int] = {}  # pages of several spans that are not cached, and of how many
        self.cache = PrefixIndex(plan.kv, plan.page_bytes, store.clock)
        # Idle slots by how many pages they have: a start looks at a handful of lengths, not at every slot.
        self.idle: dict[int, list[int]] = {0: list(reversed(range(plan.spans)))}
        self.idle_pages = 0
        self.unmaps = 0

    def __getitem__(self, slot: int) -> Span:
        return self.all[slot]

    @property
    def pages(self) -> set[int]:
        """Every one, wherever it is."""
        return self.owner.keys() | self.cache.uses.keys() | self.forked.keys()

    @property
    def count(self) -> int:
        return len(self.owner) + len(self.cache) + len(self.forked)

    def begin(self, length: int, goal: int, match: Match) -> int:
        """The slot of an idle span of that many pages is a new sequence's."""
        slot = self.take_idle(length)
        span = self.all[slot]
        span.goal, span.match, span.offered = goal, match, len(match.shared)
        self.live.add(slot)
        self.idle_pages -= len(span.pages)
        for page in (*match.shared, *([match.tail] if match.size else [])):
            self.hold(slot, page)
        return slot

    def end(self, slot: int) -> None:
        """Its pages stay mapped for the next sequence, or are others' and the cache's."""
        span = self.all[slot]
        if span.held:
            self.cut(slot)
            for page in reversed([*span.held]):
                self.drop(slot, page)
        self.live.discard(slot)
        self.idle_pages += len(span.pages)
        span.backed, span.goal, span.match = 0, 0, NO_MATCH
        self.add_idle(slot)

    def take_idle(self, length: int) -> int:
        """The idle slot of that many pages that was used last: its caches are the warmest."""
        slots = self.idle[length]
        slot = slots.pop()
        if not slots:
            del self.idle[length]
        return slot

    def add_idle(self, slot: int) -> None:
        self.idle.setdefault(len(self.all[slot].pages), []).append(slot)

    def map_next(self, slot: int, page: int) -> int:
        """Map a page that is nobody's behind the last one; returns its address."""
        span = self.all[slot]
        address = span.base + len(span.pages) * self.plan.page_bytes
        try:
            self.memory.map(page, address)
        except MemoryFault:
            self._free.append(page)
            raise
        self.idle_pages += slot not in self.live
        self.owner[page] = slot
        span.pages.append(page)
        return address

    def map_shared(self, slot: int, page: int) -> None:
        """Map a page that the span holds behind the last one, to be read."""
        span = self.all[slot]
        self.memory.map(page, span.base + len(span.pages) * self.plan.page_bytes, writable=False)
        span.pages.append(page)

    def unmap_last(self, slot: int) -> int:
        """A page that the span has alone, which is nobody's then."""
        span = self.all[slot]
        self.memory.unmap(span.base + (len(span.pages) - 1) * self.plan.page_bytes)
        self.unmaps += 1
        page = span.pages.pop()
        del self.owner[page]
        self.idle_pages -= slot not in self.live
        return page

    def cut(self, slot: int, first: int = 0) -> None:
        """Turn the pages from number `first` on into a hole. They go from the last to the first: what comes later in a
        text is useless without what comes before it."""
        span = self.all[slot]
        gone = span.pages[first:]
        if not gone:
            return
        self.memory.unmap(span.base + first * self.plan.page_bytes, len(gone))
        self.unmaps += 1
        del span.pages[first:]
        span.backed = min(span.backed, first)
        for page in reversed(gone):
            if self.owner.pop(page, None) is None:
                self.drop(slot, page)
            else:
                self.idle_pages -= slot not in self.live
                self._free.append(page)

    def unmap_all(self) -> None:
        """Before `forget_all`, where the memory stays."""
        for span in self.all:
            if span.pages:
                self.memory.unmap(span.base, len(span.pages))

    def forget_all(self) -> set[int]:
        """At the end: the pages that these were, wherever."""
        pages = self.pages
        self.owner, self.forked, self.idle_pages = {}, {}, 0
        self.cache = PrefixIndex(self.plan.kv, self.plan.page_bytes, itertools.count())
        return pages

    def share(self, slot: int, page: int) -> None:
        """A page that one span may have alone becomes one of several."""
        if self.owner.pop(page, None) is not None:
            self.forked[page] = 0
            self.hold(slot, page)

    def hold(self, slot: int, page: int) -> None:
        """One span more has a cached page, or one of several."""
        if page in self.forked:
            self.forked[page] += 1
        else:
            self.cache.hold(page)
        self.all[slot].held[page] = None

    def drop(self, slot: int, page: int) -> None:
        """The span no longer has a page that it held."""
        del self.all[slot].held[page]
        if page not in self.forked:
            if not self.cache.drop(page):
                self._free.append(page)
            return
        self.forked[page] -= 1
        if not self.forked[page]:
            del self.forked[page]
            self._free.append(page)

    def take_held(self, slot: int) -> int:
        """The page that a span was to copy from, when all others are in use: it is nobody's then."""
        return self.cache.take(self.all[slot].held.popitem()[0])

    def offer(self, slot: int, chain: Sequence[bytes]) -> None:
        """Cache the pages of a span whose written text is `chain`; from an incomplete last one others copy."""
        span = self.all[slot]
        while span.offered < len(span.pages) and self.cache.groups_of(span.offered).stop <= len(chain):
            self._cache(slot, span.offered, chain)
            span.offered += 1
        if span.offered < len(span.pages) and self.cache.groups_of(span.offered).start < len(chain):
            self._cache(slot, span.offered, chain)

    def _cache(self, slot: int, index: int, chain: Sequence[bytes]) -> None:
        page = self.all[slot].pages[index]
        if page in self.forked:  # others have that text already, or nothing is cached
            return
        if self.cache_page(page, index, chain):
            del self.owner[page]
            self.hold(slot, page)

    def cache_page(self, page: int, index: int, chain: Sequence[bytes]) -> bool:
        """As PrefixIndex.add. Those that nothing leads to now are free."""
        added, gone = self.cache.add(page, index, chain)
        self._free += gone
        return added

    def forget(self) -> None:
        """Empty the cache, but for what is used; its pages are free then."""
        while self.cache.unused:
            self._free.append(self.cache.evict())
