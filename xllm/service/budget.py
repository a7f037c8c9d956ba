"""Decides when reasoning has to end: once its budget is used, the tokens that close it are the only ones allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.runtime.request import Grammar, Matcher
from xllm.service.parsers.reading import Reading
from xllm.service.tokenizer import TextCodec


class Bounded(Grammar):
    """Answers that are read so, with at most `budget` tokens of reasoning; those that close it come on top. grammar: of
    the whole answer, or none."""

    def __init__(self, grammar: Grammar | None, reading: Reading, budget: int, codec: TextCodec, vocab: int) -> None:
        self._grammar, self.reading, self.budget, self.codec = grammar, reading, budget, codec
        self.closing = tuple(codec.encode(reading.closing, False))
        self.free = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)

    def start(self) -> Spending:
        return Spending(self, self._grammar.start() if self._grammar is not None else None)


class Spending:
    """A matcher that reads the answer as its client will, and counts."""

    def __init__(self, of: Bounded, inner: Matcher | None) -> None:
        self._of, self._inner = of, inner
        self._reader, self._detokenizer = of.reading.reader(), of.codec.detokenizer(True, of.reading.markers)
        self._left = of.budget
        self._forced: Sequence[int] = ()
        self._look()

    def take(self, tokens: Sequence[int]) -> None:
        if self._inner is not None:
            self._inner.take(tokens)
        for token in tokens:
            self._left -= self._reader.thinking
            self._reader.push(self._detokenizer.push(token))
            self._forced = self._forced[1:]
            self._look()

    def fill(self, mask: np.ndarray) -> None:
        if self._forced:
            mask[:] = 0
            mask[self._forced[0] // 32] = 1 << self._forced[0] % 32
        elif self._inner is not None:
            self._inner.fill(mask)
        else:
            mask[:] = self._of.free

    def _look(self) -> None:
        if not self._forced and self._left <= 0 and self._reader.thinking:
            self._forced = self._of.closing
