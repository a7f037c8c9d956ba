"""Forks: a sequence that goes on from what another one has computed, with no token of it computed again.

Complete pages are the same in both spans, mapped read-only in that of the fork, as those of the prefix cache are. What
is still written to (the incomplete last group, and state that changes with every token) is copied. Where the fork's
span has the right pages already nothing is mapped: beams that die leave theirs to those that go on, and mostly differ
from them in the last page alone. A page that several spans have is counted once, however it came: cached, or here.
"""

from __future__ import annotations

from collections.abc import Callable

from xllm.runtime.spans import Spans


def fork(spans: Spans, source: int, target: int, tokens: int, take: Callable[[], int]) -> int:
    """As KvPool.fork; `take` gives pages. Returns how many it took."""
    plan, parent, child = spans.plan, spans[source], spans[target]
    size, complete, count = plan.kv.bytes_for(tokens), plan.complete(tokens), plan.pages_for(tokens)
    stays = taken = 0
    while stays < len(child.pages) and _fits(spans, source, target, stays, stays in complete):
        stays += 1
    spans.cut(target, stays)
    for index in range(count):
        page = parent.pages[index]
        if index not in complete:
            if index >= stays:
                spans.map_next(target, take())
                taken += 1
            begin = index * plan.page_bytes
            spans.memory.copy(page, child.base + begin, min(plan.page_bytes, size - begin))
        elif index >= stays:
            spans.share(source, page)
            spans.map_shared(target, page)
            spans.hold(target, page)
    child.backed, child.offered = count, complete.stop if complete else 0
    return taken


def _fits(spans: Spans, source: int, target: int, index: int, complete: bool) -> bool:
    page = spans[target].pages[index]
    return page == spans[source].pages[index] if complete else spans.owner.get(page) == target
