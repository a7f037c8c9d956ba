"""A group of beams in the engine: one request, of which a step has a row for every beam. They are computed alike: all
have the same number of tokens, so that a step has the whole group or nothing of it, and the scheduler sees one sequence
of several rows.

Its prompt is computed once, as anybody's. What the rows of a step say is merged when the step has ended; before the
next one those that go on are put in place. A beam's first child goes on in its parent's span; others get a fork of it,
in the span of a beam that died if there is one. A group that gave up its pages computes what its beams have in common
once, then the rest of each.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import replace

from xllm.runtime.beams import BeamParams, BeamSearch, asked
from xllm.runtime.executor import Executor, Row
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PoolPlan
from xllm.runtime.request import Request
from xllm.runtime.sequence import Sequence


class BeamGroup(Sequence):
    """`tokens` are those of the best beam, in `slot`; or, when the pages were given up, what all have in common."""

    __slots__ = ("_attached", "_eos_ids", "_gathering", "_kept", "_parents", "_root", "_spans", "_spares", "search")

    def __init__(
        self, request: Request, beams: BeamParams, max_outputs: int, plan: PoolPlan, eos_ids: Iterable[int]
    ) -> None:
        super().__init__(request, max_outputs)
        self.width, self.stem = beams.width, len(plan.complete(self.prompt_tokens))
        self._eos_ids = tuple(eos_ids)
        self._kept = self.prompt_tokens // plan.kv.group_tokens  # digests of its text that stay right
        self._gathering = False  # it computes what its beams have in common
        self._spans: list[int] = []  # slots of the beams that live, in their order; empty while one row is all
        self._spares: list[int] = []  # of beams that died
        self._parents: list[int] | None = None  # places of those who go on; None: all are in place
        self._attached: set[int] = set()
        self._root = -1  # the slot that the whole group is promised to
        self.limit(max_outputs)

    def limit(self, max_outputs: int) -> None:
        """Before anything runs: how many tokens an answer gets."""
        self.max_outputs = max_outputs
        assert self.request.beams is not None
        self.search = BeamSearch(self.request.params, self.request.beams, self._eos_ids, max_outputs)

    @property
    def slots(self) -> Ordered[int]:
        return (*(self._spans or (self.slot,)), *self._spares)

    @property
    def drawn(self) -> int:
        """Rows of its launched step."""
        return len(self._spans) or 1

    def begin(self, executor: Executor) -> None:
        """It was admitted to `slot`. Raises StepError."""
        self._root = self.slot
        self._attach(executor, self.slot, self.generated)

    def spread(self, pool: KvPool, executor: Executor) -> None:
        """Put all in place, after `take`. Raises MemoryFault or StepError."""
        if self._parents is None:
            return
        before = list(self._spans or (self.slot,))
        dead = [slot for at, slot in enumerate(before) if at not in self._parents]
        missing = len(self._parents) - len(set(self._parents)) - len(dead) - len(self._spares)
        self._spares += [pool.start(0) for _ in range(missing)]
        left, places = [*self._spares, *dead], []
        for parent in self._parents:
            place = before[parent]
            if place in places:
                place = left.pop()
                pool.fork(before[parent], place, self.computed)
            places.append(place)
        anew = self._gathering or self.request.params.looks_back
        self._spans, self._spares, self._parents, self._gathering = places, left, None, False
        for slot, beam in zip(places, self.search.live, strict=True):
            if anew or slot not in before:
                self._attach(executor, slot, beam.tokens)

    def grow(self, pool: KvPool, tokens: int, pages: int) -> None:
        """Back the first `tokens` tokens of each row; the group has `pages` pages then. Raises MemoryFault."""
        rows = self._spans or (self.slot,)
        pool.grow(self._root, tokens if self._root in rows else 0, pages)
        for slot in rows:
            if slot != self._root:
                pool.grow(slot, tokens, 0)

    def step_rows(self, pool: KvPool, tokens: int, sample: bool) -> list[Row]:
        """Its rows of a step, the next `tokens` tokens of each."""
        begin, end = self.computed, self.computed + tokens
        if not self._spans:
            return [Row(self.slot, pool.base(self.slot), begin, self.tokens[begin:end], sample)]
        made = slice(begin - self.prompt_tokens, end - self.prompt_tokens)
        beams = zip(self._spans, self.search.live, strict=True)
        return [Row(slot, pool.base(slot), begin, beam.tokens[made], sample) for slot, beam in beams]

    def take(self, best: Ordered[Ordered[tuple[int, float]]]) -> bool:
        """The step has ended: how each row may go on. False: that was no step of the search."""
        searched = not self._gathering
        if searched:
            self.search.advance(best)
            self._parents = self.search.parents
        else:
            self._parents = [0] * len(self.search.live)
        if live := self.search.live:
            self.slot = (self._spans or (self.slot,))[self._parents[0]]
            self.tokens = [*self.request.prompt, *live[0].tokens]
            self.rows = len(live)
            self._forget()
        return searched

    def leave(self, pool: KvPool, executor: Executor) -> None:
        """Give all up but `slot`, which is the caller's to finish."""
        for slot in self._attached:
            executor.detach(slot)
        if self._root != self.slot:  # or others might be promised pages that are not given up yet
            pool.promises.hand_on(self._root, self.slot)
        for slot in self.slots:
            if slot != self.slot:
                pool.finish(slot)
        self._attached.clear()
        self._spans, self._spares, self._parents, self._root = [], [], None, -1

    def come_back(self) -> None:
        """Nothing of it is computed any more."""
        self.tokens = [*self.request.prompt, *self.search.common]
        self._gathering, self.rows = len(self.search.live) > 1, 1
        self.recompute += max(0, self.recompute - len(self.tokens)) * (len(self.search.live) - 1)
        self._forget()

    def _forget(self) -> None:
        """Another beam may be the best one now: what is known of its text is that of the prompt."""
        del self.chain[self._kept :]
        self.publish_at = sys.maxsize

    def _attach(self, executor: Executor, slot: int, generated: Ordered[int]) -> None:
        if slot in self._attached:
            executor.detach(slot)
        self._attached.add(slot)
        params = asked(self.request.params, self.search.wanted)
        executor.attach(slot, replace(self.request, params=params), generated)
