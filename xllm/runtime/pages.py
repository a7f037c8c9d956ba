"""Sizes of a KV pool, and what its pages can be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xllm.runtime.errors import MemoryFault
from xllm.runtime.executor import KVSpec
from xllm.runtime.xtensor import choose_page_bytes


class PageState(IntEnum):
    """Free: nobody's. Allocated: taken, about to be mapped. Mapped: in the span of a live sequence. Reusable: in the
    span of no sequence, still mapped. Cached: in no span, its text may come again."""

    FREE = 0
    ALLOCATED = 1
    MAPPED = 2
    REUSABLE = 3
    CACHED = 4


@dataclass(frozen=True)
class PoolPlan:
    """Sizes of a pool, all fixed before serving. A span is `span_pages` long; there are `spans` of them."""

    kv: KVSpec
    page_bytes: int
    pages: int
    span_pages: int
    spans: int

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one sequence, in whole token groups."""
        return -(-self.kv.bytes_for(tokens) // self.page_bytes)

    def tokens_for(self, pages: int) -> int:
        """Most tokens of one sequence that `pages` pages hold."""
        return self.kv.tokens_in(pages * self.page_bytes)

    def complete(self, tokens: int) -> range:
        """Which pages of a span nothing writes to any more once `tokens` tokens are: not those of an incomplete group,
        nor of state that changes with every token."""
        first = -(-self.kv.fixed_bytes // self.page_bytes)
        end = self.kv.fixed_bytes + tokens // self.kv.group_tokens * self.kv.group_bytes
        return range(first, max(first, end // self.page_bytes))

    def waste_bytes(self, tokens: int) -> int:
        """Memory a sequence of `tokens` tokens is promised but does not use: always less than one page."""
        return self.pages_for(tokens) * self.page_bytes - self.kv.bytes_for(tokens)


def plan_pool(kv: KVSpec, max_len: int, max_seqs: int, kv_bytes: int, page_bytes: int | None = None) -> PoolPlan:
    """Divide `kv_bytes` into pages for `max_seqs` spans of `max_len` tokens. Raises MemoryFault (pool_too_small) when
    not even one page fits. More pages than all spans can hold together are not made."""
    span_bytes = kv.bytes_for(max_len)
    page_bytes = page_bytes or choose_page_bytes(kv_bytes, span_bytes, max_seqs)
    span_pages = -(-span_bytes // page_bytes)
    pages = min(kv_bytes // page_bytes, span_pages * max_seqs)
    if pages < 1:
        raise MemoryFault(
            "pool_too_small", f"{kv_bytes} bytes of KV memory hold no page of {page_bytes} bytes; raise it"
        )
    return PoolPlan(kv, page_bytes, pages, span_pages, max_seqs)


@dataclass(frozen=True)
class PoolFigures:
    """Pages by state now, and counters since start: critical maps happened while a step waited, hidden ones in the
    background."""

    states: dict[PageState, int]
    critical_maps: int
    hidden_maps: int
    unmaps: int
    evictions: int = 0
    prefix_pages: int = 0  # in the prefix cache, used or not
