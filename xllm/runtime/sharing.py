"""Which sequence starts on what others computed, who had better wait for an older one or for a tier, and when a page is
offered to others. The pages themselves and their digests are the pool's (see prefix), slower memory is the tiers'."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Any

from xllm.runtime.config import EngineConfig
from xllm.runtime.executor import KVSpec
from xllm.runtime.kv import KvPool
from xllm.runtime.prefix import extend_chain
from xllm.runtime.scheduler import Budget, Queues
from xllm.runtime.sequence import Sequence
from xllm.runtime.tiers import Tiers


class Sharing:
    """Of one core. looked_up_tokens and cached_tokens: prompt tokens of admitted requests, and those of them found."""

    def __init__(self, pool: KvPool, kv: KVSpec, config: EngineConfig, tiers: Tiers | None = None):
        self._pool = pool
        self._tiers = tiers
        self._identity = config.tiers.identity if config.tiers else ""
        self._loads_ended: int | None = None  # before somebody was told to wait for a load, in the latest step
        self._group_tokens = kv.group_tokens
        # State that does not grow is of the whole text before it: no page of it fits another text.
        self._on = config.prefix_cache and not kv.fixed_bytes
        self._first_weights, self._weights = config.weights, ""  # the second names those that came later
        self.looked_up_tokens = self.cached_tokens = 0

    @property
    def loading(self) -> bool:
        """Did the latest step put off somebody until a load ends?"""
        return self._loads_ended is not None

    @property
    def parked(self) -> bool:
        """Has none of those loads ended since, nor got stuck?"""
        return self._tiers is not None and self._loads_ended == self._tiers.ended and not self._tiers.stuck

    def look_up(self, queues: Queues, budget: Budget) -> tuple[list[Sequence], Queues]:
        """Find the cached part of those that this step could admit; at least one token is always left to compute. The
        queues come back without those that had better wait: a prompt before them in rank is about to compute what they
        would need next (one behind them may be out of tokens for long), or a tier gives it."""
        ended, self._loads_ended = self._tiers.ended if self._tiers else 0, None
        found: list[Sequence] = []
        later: list[Sequence] = []
        waiting, running, slots = queues.waiting, queues.running, queues.free_slots
        if queues.online_waiting:  # offline ones give way to these: their prompts, and their slots
            slots += len(running[queues.online_running :])
            running = running[: queues.online_running]
        if not (self._on and waiting):
            return found, queues
        ahead = {sequence.order: sequence for sequence in running if sequence.written < sequence.prompt_tokens}
        tokens, pages = budget.tokens, self._pool.free_pages
        coming, room = 0, pages - self._promised(running, budget) if self._tiers else 0  # pages, of those that load
        for sequence in waiting:
            if tokens <= 0 or pages < 0 or len(found) == slots:
                break
            number, end = sequence.behind or (-1, 0)
            older = ahead.get(number)
            if older is not None and older.publish_at == end and _before(older, sequence, queues.line):
                later.append(sequence)  # the older one published nothing since
                continue
            groups = (len(sequence.tokens) - 1) // self._group_tokens
            chain = self._chain(sequence, groups)
            if sequence.scored:
                chain, groups = [], 0
            matched = self._pool.match(chain)
            having = (other for other in ahead.values() if self._will_have(other, chain, matched))
            older = next(having, None) if matched < groups else None
            if older is not None and _before(older, sequence, queues.line):
                sequence.behind = older.order, older.publish_at
                later.append(sequence)
                continue
            needed = sequence.pages_at(self._pool.plan, len(sequence.tokens))
            if matched < groups and self._load(sequence, chain, matched, coming + needed <= room, coming > 0):
                self._loads_ended = ended
                later.append(sequence)
                coming += needed
                continue
            sequence.computed = matched * self._group_tokens
            tokens -= min(sequence.remaining, budget.max_chunk)
            pages, room = pages - needed, room - needed
            found.append(sequence)
            ahead[sequence.order] = sequence
        return found, queues.without(later) if later else queues

    def start(self, sequence: Sequence) -> None:
        """Give an admitted sequence its span, the cached part of its text in it."""
        found = sequence.computed
        chain = self._chain(sequence, found // self._group_tokens)
        sequence.slot = self._pool.start(found + sequence.remaining, chain)
        sequence.written = found
        sequence.load, sequence.kept = None, 0
        if not self._on:
            return
        self._expect(sequence)
        if not sequence.recompute:
            sequence.cached = min(found, sequence.prompt_tokens)
            self.cached_tokens += sequence.cached
            self.looked_up_tokens += sequence.prompt_tokens

    def renew(self, weights: str, waiting: Ordered[Sequence]) -> None:
        """Nothing that was computed with other weights is found any more."""
        self._weights = "" if weights == self._first_weights else weights
        for sequence in waiting:
            sequence.chain, sequence.behind, sequence.load, sequence.kept = [], None, None, 0

    def publish(self, sequence: Sequence) -> None:
        """Offer the pages that are complete to others."""
        chain = self._chain(sequence, sequence.written // self._group_tokens)
        self._pool.offer(sequence.slot, chain)
        self._keep(sequence, chain)
        self._expect(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give its span back; what it has of a text may stay cached, unless it failed."""
        known = 0 if sequence.finish == "error" else sequence.written // self._group_tokens
        chain = self._chain(sequence, known)
        self._pool.finish(sequence.slot, chain)
        self._keep(sequence, chain)
        if self._tiers:
            self._tiers.refresh(chain)

    def _keep(self, sequence: Sequence, chain: list[bytes]) -> None:
        """Have what was written go to the tiers; it is in the pool by now, where nothing keeps it."""
        if self._tiers and len(chain) > sequence.kept:
            self._tiers.keep(chain, sequence.kept)
            sequence.kept = len(chain)

    def _load(self, sequence: Sequence, chain: list[bytes], matched: int, room: bool, others: bool) -> bool:
        """Had it better wait until a tier has loaded more of its text? A load, one for each, begins when it could be
        admitted but for the `others` that load: sooner, what it brings would be driven out, or drive out theirs."""
        if self._tiers is None:
            return False
        if sequence.load is None and (room or others):
            known = self._tiers.has(chain, matched)
            if known and room:
                sequence.load = self._tiers.load(chain[:known], lambda: sequence.finish is None)
            return known > 0
        return sequence.load is not None and not (sequence.load.done or self._tiers.stuck)

    def _promised(self, running: Ordered[Sequence], budget: Budget) -> int:
        """Free pages that no admission may have (see scheduler)."""
        if not running:
            return 0
        prompts = (sequence for sequence in running if sequence.computed < sequence.prompt_tokens)
        promised = sum(max(0, one.pages_at(self._pool.plan, len(one.tokens)) - one.pages) for one in prompts)
        return promised + self._pool.plan.pages - budget.admit_pages

    def tier_figures(self) -> dict[str, Any]:
        """Those of EngineStats."""
        if self._tiers is None:
            return {}
        return {
            "tiers": self._tiers.figures(),
            "loads": self._tiers.loads,
            "not_stored": self._tiers.not_stored,
        }

    def _will_have(self, older: Sequence, chain: list[bytes], group: int) -> bool:
        """Does the prompt of a sequence that is not through with it contain this group of another text?"""
        return group < older.prompt_tokens // self._group_tokens and older.chain[group] == chain[group]

    def _chain(self, sequence: Sequence, groups: int) -> list[bytes]:
        """Digests of the first `groups` whole groups of its text; none when nothing is cached."""
        if not self._on:
            return []
        salt = self._identity + self._weights + sequence.request.cache_salt
        extend_chain(sequence.chain, sequence.tokens, self._group_tokens, salt)
        return sequence.chain[:groups]

    def _expect(self, sequence: Sequence) -> None:
        """Publish again when the next page is complete, and when the prompt is."""
        end = self._pool.tokens_complete(sequence.slot)
        if sequence.written < sequence.prompt_tokens:
            end = min(end, sequence.prompt_tokens)
        sequence.publish_at = end


def _before(one: Sequence, other: Sequence, line: Ordered[Sequence]) -> bool:
    """In rank: where there is no line, those that run are before those that wait."""
    return not line or line.index(one) < line.index(other)
