"""The steps that `xllm profile` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm.runtime.executor import Limits

DECODED = 32  # tokens of each request of the engine


class ShapeError(ValueError):
    """A step that the artifact cannot run; the message says what it can."""


@dataclass(frozen=True)
class Shape:
    """`count` sequences decode with `context` tokens in all; or, decode False, one sequence's prompt of `count` tokens
    behind `context` others."""

    decode: bool
    count: int
    context: int

    @property
    def name(self) -> str:
        return f"{'decode' if self.decode else 'prefill'} {self.count} at {self.context}"

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Tokens of the step and tokens before them, of each."""
        return ((1, self.context - 1),) * self.count if self.decode else ((self.count, self.context),)

    def check(self, limits: Limits, task: str) -> None:
        """Raises ShapeError for a step the artifact does not take."""
        (tokens, past), most = self.sequences[0], limits.max_len - (DECODED if self.decode else 0)
        if self.decode and task != "generate":
            raise ShapeError(f"{self.name}: the artifact gives rows and decodes nothing; try --prefill")
        if self.decode and self.count > limits.max_seqs:
            raise ShapeError(f"{self.name}: the artifact decodes {limits.max_seqs} sequences together")
        if sum(tokens for tokens, _ in self.sequences) > limits.max_tokens_per_step:
            raise ShapeError(f"{self.name}: a step of the artifact has {limits.max_tokens_per_step} tokens")
        if tokens + past > most or past < 0:
            raise ShapeError(f"{self.name}: a context of 1 to {most} tokens fits the artifact")


def usual_shapes(limits: Limits, task: str) -> list[Shape]:
    """One sequence and eight decoding, and a prompt, as far as the artifact takes them."""
    context = min(256, limits.max_len - DECODED)
    prompt = Shape(False, min(512, limits.max_tokens_per_step, limits.max_len), 0)
    if task != "generate" or context < 1:
        return [prompt]
    return [*(Shape(True, n, context) for n in sorted({1, min(8, limits.max_seqs)})), prompt]
