"""What a call from Python gives: completions as they grow, and a bar that shows how many are done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.runtime.request import PromptLogprobs, PromptToken, TokenOutput

if TYPE_CHECKING:
    from xllm.service.generation import Choice


@dataclass(frozen=True)
class Completion:
    """One generation, or a piece of one that is streamed (`finish_reason` is None then, except for the last piece).
    `logprobs` of the tokens and the best ones at each place (id, logprob) are empty unless asked for. `score`:
    of a beam search. `prompt`: of the prompt's tokens but the first, where `prompt_logprobs` asks for them."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    score: float | None = None
    prompt: tuple[PromptToken, ...] = ()


class Answer:
    """A completion as it grows."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._prompt: PromptLogprobs | None = None
        self._pieces: list[Completion] = []

    @property
    def ended(self) -> bool:
        return self._choice.finish_reason is not None

    def push(self, output: TokenOutput) -> Completion:
        """What one more output adds. Raises RuntimeError when the request failed."""
        raise_failure(output)
        delta = self._choice.push(output)
        if output.prompt is not None:
            self._prompt = output.prompt
        piece = Completion(
            delta.text,
            () if output.token is None else (output.token,),
            delta.finish_reason,
            () if output.logprob is None else (output.logprob,),
            (output.top_logprobs,) if output.top_logprobs else (),
        )
        self._pieces.append(piece)
        return piece

    def whole(self, prompt: Sequence[int] = ()) -> Completion:
        """All of it; `prompt` are the tokens before it."""
        pieces = self._pieces
        return Completion(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            self._choice.finish_reason,
            tuple(logprob for piece in pieces for logprob in piece.logprobs),
            tuple(best for piece in pieces for best in piece.top_logprobs),
            prompt=tuple(self._prompt.tokens(prompt)) if self._prompt else (),
        )


def raise_failure(output: TokenOutput) -> None:
    """Raises RuntimeError when the request of an output failed."""
    if output.finish_reason in ("error", "cancelled"):
        raise RuntimeError(output.error or "the request was cancelled")


@contextmanager
def bar(total: int, shown: bool | None) -> Iterator[Callable[[], None]]:
    """Something to call for each of `total` prompts that is done."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda: bar.advance(task)
