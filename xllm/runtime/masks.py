"""Which tokens a grammar lets each slot draw next: filled in a thread of its own while the step computes, since an
executor knows the token before only once the step before has been sampled.

What becomes of a slot depends on its own tokens only. A grammar that fails, or takes too long, ends its own sequence.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence

import numpy as np

from xllm.runtime.request import Grammar, Matcher

log = logging.getLogger("xllm.runtime")
STUCK_SECONDS = 5.0  # a mask takes microseconds, rarely milliseconds
WAITS = 50  # in so many parts, so that a process that was stopped for long takes nobody for stuck
GRAMMAR_FAILED = -2
NOTHING_ALLOWED = -3  # what samplers say


class _Slot:
    """One attachment. `mask` is what the sampler reads; `news` are the tokens its matcher has not seen."""

    def __init__(self, grammar: Grammar, generated: Sequence[int], words: int) -> None:
        self.grammar = grammar
        self.matcher: Matcher | None = None
        self.news = list(generated)
        self.mask = np.zeros(words, np.uint32)
        self.filled = threading.Event()
        self.failed = False

    def fill(self) -> None:
        bits = np.zeros_like(self.mask)
        try:
            if self.matcher is None:
                self.matcher = self.grammar.start()
            news, self.news = self.news, []
            self.matcher.take(news)
            self.matcher.fill(bits)
        except Exception as error:  # whatever it is, it is this sequence's alone
            log.warning("a grammar failed while tokens were drawn: %s", error)
            self.failed = True
        if not self.failed:  # nor given up for stuck
            self.mask[:] = bits
        self.filled.set()


class Masks:
    """The masks of an executor's slots. `begin`, `wait` (unless it found none) and `take` are called in this order,
    once per step, by the thread that samples; the others when no launched step refers to the slot."""

    def __init__(self, vocab: int) -> None:
        self._words = -(-vocab // 32)
        self._slots: dict[int, _Slot] = {}
        self._work: queue.SimpleQueue[_Slot | None] | None = None

    def attach(self, slot: int, grammar: Grammar | None, generated: Sequence[int]) -> np.ndarray | None:
        """The mask of the slot, uint32[ceil(vocab / 32)]; None where no grammar constrains it."""
        self.detach(slot)
        if grammar is None:
            return None
        made = self._slots[slot] = _Slot(grammar, generated, self._words)
        return made.mask

    def detach(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def begin(self, slots: Sequence[int]) -> list[_Slot | None]:
        """Starts on the masks of a step that will sample these slots; `wait` and `take` get what this returns."""
        found = [self._slots.get(slot) for slot in slots]
        for slot in found:
            if slot is not None and not slot.failed:
                slot.filled.clear()
                self._queue().put(slot)
        return found

    def wait(self, found: list[_Slot | None]) -> None:
        """Until all masks are there. One that does not come is given up, and its thread with it."""
        left = [slot for slot in found if slot is not None and not slot.failed]
        for at, slot in enumerate(left):
            if not any(slot.filled.wait(STUCK_SECONDS / WAITS) for _ in range(WAITS)):
                slot.failed = True
                log.error("a grammar's mask did not come within %g s: its request ends", STUCK_SECONDS)
                self._leave_thread()
                for other in left[at + 1 :]:
                    self._queue().put(other)

    def take(self, found: list[_Slot | None], tokens: np.ndarray) -> np.ndarray:
        """Notes the tokens that were drawn, int32[S]; GRAMMAR_FAILED in place of those that could not be."""
        if any(found):
            tokens = tokens.copy()
        for row, slot in enumerate(found):
            if slot is not None and slot.failed:
                tokens[row] = GRAMMAR_FAILED
            elif slot is not None and tokens[row] >= 0:
                slot.news.append(int(tokens[row]))
        return tokens

    def close(self) -> None:
        if self._work is not None:
            self._work.put(None)

    def _leave_thread(self) -> None:
        """Should it come back, it finds nothing to do and ends."""
        assert self._work is not None
        work, self._work = self._work, None
        with contextlib.suppress(queue.Empty):
            while True:
                work.get_nowait()
        work.put(None)

    def _queue(self) -> queue.SimpleQueue[_Slot | None]:
        if self._work is None:
            self._work = queue.SimpleQueue()
            # A daemon: native code that never returns must not keep the process.
            threading.Thread(target=_fill, args=(self._work,), name="xllm-masks", daemon=True).start()
        return self._work


def _fill(work: queue.SimpleQueue[_Slot | None]) -> None:
    while (slot := work.get()) is not None:
        slot.fill()
