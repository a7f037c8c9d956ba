"""The physical pages of a process: one store, from which the pools of all its models take and to which they give back.

Pages that are promised to a sequence are its own for as long as it wants (see promises); nobody is preempted for
another model. All else may go to whoever needs a page, in this order: free pages, those in spans of no sequence, cached
ones that no sequence uses (the oldest use first, whoever's), those mapped ahead.

Bytes stay in a page that goes from one pool to another. Nobody reads them: kernels read what its present owner wrote,
and what a pool knew about the text of a page is dropped when the page leaves.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Protocol

from xllm.runtime.errors import InvariantBroken, MemoryFault
from xllm.runtime.promises import Ledger, Promises
from xllm.runtime.xtensor import PageMemory


class Holder(Protocol):
    """A pool, as the store sees it. Whatever it gives is unmapped, and nobody's any more; None: there is no such
    page."""

    promises: Promises
    on_room: Callable[[], None] | None  # called, from any thread, when others may have left something for it

    @property
    def idle_pages(self) -> int: ...

    @property
    def oldest_use(self) -> int | None:
        """When the cached page was used that would go next, by the store's clock."""
        ...

    @property
    def held_pages(self) -> set[int]:
        """Every page it has; for checks."""
        ...

    def give_idle(self) -> int: ...

    def give_cached(self) -> int: ...

    def give_ahead(self, but: int = -1) -> int | None:
        """A page beyond what the live sequences, but for this slot, were promised."""
        ...


class PageStore:
    """`pages` pages of a memory, which ends with the last pool. `lock` guards them and all that pools know of theirs.
    `planning` is held from reading what there is room for until it is promised, by whoever plans a step.
    """

    def __init__(self, memory: PageMemory, pages: int):
        self.memory, self.ledger = memory, Ledger(pages)
        self.lock = threading.Lock()
        self.planning = threading.Lock()
        self.free = list(reversed(memory.create_pages(pages)))
        self.filling = 0  # pages that a tier is writing to, which are in no pool
        self.filled = threading.Condition(self.lock)
        self.awaited = False  # a step waits for one of these, which nobody is to map ahead
        self.clock = itertools.count()
        self._pools: tuple[Holder, ...] = ()
        self._discarded = False
        self.changes = 0  # that may let somebody go on who could not

    def join(self, pool: Holder) -> None:
        """Raises MemoryFault (pool_too_small) when there is no room for the longest requests of all."""
        with self.planning, self.lock:
            needed, pages = sum(other.promises.share for other in (*self._pools, pool)), self.ledger.pages
            if needed > pages:
                size = self.memory.page_bytes
                raise MemoryFault(
                    "pool_too_small",
                    f"{pages * size} bytes of KV memory do not hold a longest request of every model, which take"
                    f" {needed * size}; raise it",
                )
            self._pools += (pool,)
            self.ledger.open(pool.promises)

    def leave(self, pool: Holder) -> bool:
        """A pool ends: whether it has to give its pages back, as there are others; with the last one the memory goes.
        The lock is held. Calling it again does nothing."""
        if pool not in self._pools:
            return False
        self._pools = tuple([other for other in self._pools if other is not pool])
        self.ledger.close(pool.promises)
        if not self._pools:
            self.memory.release()
        return bool(self._pools)

    @property
    def shared(self) -> bool:
        return len(self._pools) > 1

    def reserve(self, pool: Holder, pages: int) -> None:
        """Promise no other what a pool's sequences, of which there are some, will need in all, as far as it is free
        now. `planning` is held."""
        if pool.promises.reserve(pages):
            self.tell(pool)

    def claim(self, pool: Holder) -> bool:
        """Keep a pool all that it may have, for a sequence that waits for that. False: another one has claimed it.
        `planning` is held."""
        if self.ledger.claimant is None:
            self.ledger.claimant = pool.promises
            self.tell(pool)
        return self.ledger.claimant is pool.promises

    def unclaim(self, pool: Holder) -> None:
        """That sequence has ended, or may wait. No lock is held."""
        if self.ledger.claimant is pool.promises:
            self.ledger.claimant = None
            self.tell(pool)

    def take(self, pool: Holder, slot: int) -> int | None:
        """A page for a step that waits, of the pool's slot; None when all are in use. The lock is held."""
        self.awaited = True
        self.filled.wait_for(lambda: not self.filling or self.has_spare())
        self.awaited = False
        page = self.spare(pool)
        if page is None:
            page = pool.give_ahead(but=slot)
        for other in self._pools if page is None else ():
            if other is not pool and page is None:
                page = other.give_ahead()
        return page

    def spare(self, pool: Holder) -> int | None:
        """A page that no live sequence has. The lock is held."""
        page = self.untouched(pool)
        if page is None:
            uses = [(used, at) for at, other in enumerate(self._pools) if (used := other.oldest_use) is not None]
            page = self._pools[min(uses)[1]].give_cached() if uses else None
        return page

    def untouched(self, pool: Holder) -> int | None:
        """A page that nobody knows the text of. The lock is held."""
        if self.free:
            return self.free.pop()
        if pool.idle_pages:
            return pool.give_idle()
        richest = max(self._pools, key=lambda other: other.idle_pages)
        return richest.give_idle() if richest.idle_pages else None

    def has_untouched(self) -> bool:
        """Would `untouched` find one?"""
        return bool(self.free) or any(pool.idle_pages for pool in self._pools)

    def has_spare(self) -> bool:
        """Would `spare` find one?"""
        return self.has_untouched() or any(pool.oldest_use is not None for pool in self._pools)

    def tell(self, pool: Holder) -> None:
        """The pool needs less than it did, or claims all: say so to those who may wait for it. No lock of a pool or an
        engine is held."""
        with self.lock:
            self.changes += 1
        for other in self._pools:
            if other is not pool and other.on_room is not None:
                other.on_room()

    def rest(self) -> None:
        """A pool began to rest, or left. When all do, the memory of all pages is the system's until one wakes; their
        bytes are lost then. The lock is held. Raises MemoryFault."""
        if not self._discarded and all(pool.promises.resting for pool in self._pools):
            self.memory.discard()
            self._discarded = True

    def rouse(self) -> None:
        """Before a pool wakes up. The lock is held. Raises MemoryFault when others have the memory now."""
        if self._discarded:
            self.memory.reclaim()
            self._discarded = False

    def check(self) -> None:
        """Assert that every page is in one place and that promises can be kept. The lock is held. Raises
        InvariantBroken."""
        held = [page for pool in self._pools for page in pool.held_pages]
        everywhere = held + self.free
        if len(set(everywhere)) != len(everywhere):
            raise InvariantBroken("page store: a page is in two places")
        if len(everywhere) + self.filling != self.ledger.pages:
            raise InvariantBroken(f"page store: {len(everywhere)} of {self.ledger.pages} pages are anywhere")
        self.ledger.check()
