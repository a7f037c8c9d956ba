"""Forks: a sequence that goes on from what another one has computed, with no token of it computed again.

Complete pages are the same in both spans, mapped read-only in that of the fork, as those of the prefix cache are. What
is still written to (the incomplete last group, and state that changes with every token) is copied. Where the fork's
span has the right pages already nothing is mapped: beams that die leave theirs to those that go on, and mostly differ
from them in the last page alone.

A page that several spans have is counted once, however it came: cached, or here. What all forks of one sequence may
need together is promised to the first of them (see KvPool.grow); each span has one page more at most at every place
where they differ, whoever forks from whom.
"""

from __future__ import annotations

from xllm.runtime.kv import KvPool


def fork(pool: KvPool, source: int, target: int, tokens: int) -> None:
    """Let live slot `target` begin with the `tokens` tokens that are written in live slot `source`. What it had is
    given up. No launched step may refer to `target`, nor write to `source`. Raises MemoryFault; `target` then can only
    be finished."""
    plan, memory = pool.plan, pool._memory
    size, complete = plan.kv.bytes_for(tokens), plan.complete(tokens)
    count = plan.pages_for(tokens)
    with pool._lock:
        parent, child = pool._spans[source], pool._spans[target]
        stays = 0
        while stays < min(count, len(child.pages)) and _fits(pool, source, target, stays, stays in complete):
            stays += 1
        if stays < count:
            _cut(pool, target, stays)
        for index in range(count):
            page, address = parent.pages[index], child.base + index * plan.page_bytes
            if index not in complete:
                if index >= stays:
                    pool._map_next(target, pool._take_page(target))
                    pool._critical_maps += 1
                memory.copy(page, address, min(plan.page_bytes, size - index * plan.page_bytes))
            elif index >= stays:
                _share(pool, source, page)
                memory.map(page, address, writable=False)
                _hold(pool, target, page)
                child.pages.append(page)
        child.committed, child.offered = count, complete.stop if complete else 0
        pool._feed(target)


def _fits(pool: KvPool, source: int, target: int, index: int, complete: bool) -> bool:
    page = pool._spans[target].pages[index]
    return page == pool._spans[source].pages[index] if complete else pool._owner.get(page) == target


def _cut(pool: KvPool, slot: int, first: int) -> None:
    """Turn the pages of a span from number `first` on into a hole."""
    span = pool._spans[slot]
    gone = span.pages[first:]
    if not gone:
        return
    pool._memory.unmap(span.base + first * pool.plan.page_bytes, len(gone))
    pool._unmaps += 1
    del span.pages[first:]
    span.committed = min(span.committed, first)
    for page in reversed(gone):
        if pool._owner.pop(page, None) is not None:
            pool._release(page)
        else:
            span.held.remove(page)
            pool._drop(page)


def _share(pool: KvPool, slot: int, page: int) -> None:
    """A page that was one span's alone becomes one of several."""
    if pool._owner.pop(page, None) is not None:
        pool._forked[page] = 1
        pool._spans[slot].held.append(page)


def _hold(pool: KvPool, slot: int, page: int) -> None:
    if page in pool._forked:
        pool._forked[page] += 1
    else:
        pool._cache.hold(page)
    pool._spans[slot].held.append(page)
