"""Prompts whose every place is asked for: their rows of a step are computed in pieces, as many tokens as a step has
rows of logits, before the rest of it. Chunks change no bit, so neither the answer nor anybody else's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from xllm.kernels.cpu.sampling import Scores
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import PromptLogprobs, Request, joined


class Prompts:
    """Of one executor. `size`: tokens that may have a row of logits in one step."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._asked: dict[int, tuple[Sequence[int], int]] = {}  # by slot: the prompt, and how many of the best tokens

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None:
        """One that comes back with generated tokens has told its prompt's."""
        self.detach(slot)
        if (width := request.params.prompt_logprobs) is not None and not generated:
            self._asked[slot] = request.prompt, width

    def asks(self, batch: Batch) -> bool:
        """Whether `score` has anything to run of it."""
        return any(row.slot in self._asked and row.start < len(self._asked[row.slot][0]) - 1 for row in batch.rows)

    def detach(self, slot: int) -> None:
        self._asked.pop(slot, None)

    def score(
        self, batch: Batch, run: Callable[[Row, Sequence[int], int], Scores]
    ) -> tuple[Batch, dict[int, PromptLogprobs]]:
        """Runs the pieces, each with the tokens that come next and how many best ones are wanted. What is left of the
        batch (the place of the first draw, and all others), and the logprobs by slot."""
        found: dict[int, PromptLogprobs] = {}
        if not self._asked:
            return batch, found
        rows: list[Row] = []
        for row in batch.rows:
            prompt, width = self._asked.get(row.slot, ((), 0))
            count = min(len(row.tokens), len(prompt) - 1 - row.start)
            if count > 0:
                parts = []
                for at in range(0, count, self._size):
                    tokens, first = row.tokens[at : min(at + self._size, count)], row.start + at + 1
                    scores = run(
                        row._replace(start=first - 1, tokens=tokens), prompt[first : first + len(tokens)], width
                    )
                    parts.append(
                        PromptLogprobs(first, scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
                    )
                found[row.slot] = joined(parts)
                row = row._replace(start=row.start + count, tokens=row.tokens[count:])
            if row.tokens:
                rows.append(row)
        return replace(batch, rows=tuple(rows)), found
