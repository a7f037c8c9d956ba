"""Which sequence starts on what others computed, who had better wait for an older one, and when a page is offered to
others. The pages themselves and their digests are the pool's (see prefix)."""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from xllm.runtime.config import EngineConfig
from xllm.runtime.executor import KVSpec
from xllm.runtime.kv import KvPool
from xllm.runtime.prefix import extend_chain
from xllm.runtime.scheduler import Budget
from xllm.runtime.sequence import Sequence


class Sharing:
    """Of one core. looked_up_tokens and cached_tokens: prompt tokens of admitted requests, and those of them found."""

    def __init__(self, pool: KvPool, kv: KVSpec, config: EngineConfig):
        self._pool = pool
        self._group_tokens = kv.group_tokens
        # State that does not grow is of the whole text before it: no page of it fits another text.
        self._on = config.prefix_cache and not kv.fixed_bytes
        self.looked_up_tokens = self.cached_tokens = 0

    def look_up(
        self, waiting: Ordered[Sequence], running: Ordered[Sequence], slots: int, budget: Budget
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Find the cached part of those that this step could admit; at least one token is always left to compute. The
        second list are those that had better wait: an older prompt is about to compute what they would need next."""
        found: list[Sequence] = []
        later: list[Sequence] = []
        if not (self._on and waiting):
            return found, later
        ahead = {sequence.order: sequence for sequence in running if sequence.written < sequence.prompt_tokens}
        tokens, pages = budget.tokens, self._pool.free_pages
        for sequence in waiting:
            if tokens <= 0 or pages < 0 or len(found) == slots:
                break
            if (behind := sequence.behind) and ahead.get(behind[0]) and ahead[behind[0]].publish_at == behind[1]:
                later.append(sequence)  # the older one published nothing since
                continue
            groups = (len(sequence.tokens) - 1) // self._group_tokens
            chain = self._chain(sequence, groups)
            if sequence.scored:
                chain, groups = [], 0
            matched = self._pool.match(chain)
            having = (other for other in ahead.values() if self._will_have(other, chain, matched))
            if matched < groups and (older := next(having, None)) is not None:
                sequence.behind = older.order, older.publish_at
                later.append(sequence)
                continue
            sequence.computed = matched * self._group_tokens
            tokens -= min(sequence.remaining, budget.max_chunk)
            pages -= self._pool.plan.pages_for(len(sequence.tokens))
            found.append(sequence)
            ahead[sequence.order] = sequence
        return found, later

    def start(self, sequence: Sequence) -> None:
        """Give an admitted sequence its span, the cached part of its text in it."""
        found = sequence.computed
        chain = self._chain(sequence, found // self._group_tokens)
        sequence.slot = self._pool.start(found + sequence.remaining, chain)
        sequence.written = found
        if not self._on:
            return
        self._expect(sequence)
        if not sequence.recompute:
            sequence.cached = min(found, sequence.prompt_tokens)
            self.cached_tokens += sequence.cached
            self.looked_up_tokens += sequence.prompt_tokens

    def publish(self, sequence: Sequence) -> None:
        """Offer the pages that are complete to others."""
        self._pool.offer(sequence.slot, self._chain(sequence, sequence.written // self._group_tokens))
        self._expect(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give its span back; what it has of a text may stay cached, unless it failed."""
        known = 0 if sequence.finish == "error" else sequence.written // self._group_tokens
        self._pool.finish(sequence.slot, self._chain(sequence, known))

    def _will_have(self, older: Sequence, chain: list[bytes], group: int) -> bool:
        """Does the prompt of a sequence that is not through with it contain this group of another text?"""
        return group < older.prompt_tokens // self._group_tokens and older.chain[group] == chain[group]

    def _chain(self, sequence: Sequence, groups: int) -> list[bytes]:
        """Digests of the first `groups` whole groups of its text; none when nothing is cached."""
        if not self._on:
            return []
        extend_chain(sequence.chain, sequence.tokens, self._group_tokens, sequence.request.cache_salt)
        return sequence.chain[:groups]

    def _expect(self, sequence: Sequence) -> None:
        """Publish again when the next page is complete, and when the prompt is."""
        end = self._pool.tokens_complete(sequence.slot)
        if sequence.written < sequence.prompt_tokens:
            end = min(end, sequence.prompt_tokens)
        sequence.publish_at = end
