"""Decides which part of an answer is reasoning: one block, which opens the answer or was opened by the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.service.parsers.parts import Part, Reader, Reasoning, Trimmed
from xllm.service.text import overlap


@dataclass(frozen=True)
class Thoughts:
    """The markers of reasoning. inside: answers begin in it, unless the prompt closed it."""

    open: str
    close: str
    inside: bool = False

    def opened_by(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins inside the block."""
        end = prompt.rstrip()
        return end.endswith(self.open) or (self.inside and not end.endswith(self.close))

    def open_in(self, text: str) -> bool:
        """Whether an answer that begins with this text goes on inside the block."""
        return text.rfind(self.open) > text.rfind(self.close)


class Thinking:
    """Splits reasoning off; the rest goes to the next reader. A block that the text never closes goes to its end.
    Later mentions of the markers are text: answers may be about them."""

    def __init__(self, thoughts: Thoughts, inside: bool, rest: Reader) -> None:
        self._thoughts, self._inside, self._rest = thoughts, inside, rest
        self._text = ""  # not decided on
        self._space: list[str] = []  # before it, where the text begins
        self._shown = Trimmed()
        self._shown.marker()
        self._state = "begin"

    @property
    def thinking(self) -> bool:
        return self._state == "block" or (self._state == "begin" and self._inside)

    @property
    def ended(self) -> bool:
        return self._rest.ended

    @property
    def cut(self) -> bool:
        return self._rest.cut

    def push(self, text: str) -> list[Part]:
        if self._state == "rest":
            return self._rest.push(text)
        self._text += text
        parts: list[Part] = []
        if self._state == "begin":
            self._begin()
        if self._state == "block":
            self._block(parts)
        if self._state == "after":
            self._text = self._text.lstrip()
            self._state = "rest" if self._text else "after"
        if self._state == "rest":
            parts += self._rest.push(self._text)
            self._text = ""
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        text, self._text = "".join((*self._space, self._text)), ""
        if self.thinking:
            self._reasoning(text, parts)
            if rest := self._shown.finish():
                parts.append(Reasoning(rest))
        else:
            parts += self._rest.push(text)
        return parts + self._rest.finish()

    def _begin(self) -> None:
        text, marker = self._text.lstrip(), self._thoughts.open
        self._space.append(self._text[: len(self._text) - len(text)])
        self._text = text
        if text.startswith(marker):
            self._state, self._text, self._space = "block", text[len(marker) :], []
        elif not marker.startswith(text):  # also true of an empty text: not decided yet
            self._state = "block" if self._inside else "rest"
            self._text, self._space = "".join((*self._space, text)), []

    def _block(self, parts: list[Part]) -> None:
        close = self._thoughts.close
        at = self._text.find(close)
        end = at if at >= 0 else len(self._text) - overlap(self._text, close)
        self._reasoning(self._text[:end], parts)
        self._text = self._text[end:]
        if at >= 0:
            self._state, self._text = "after", self._text[len(close) :]

    def _reasoning(self, text: str, parts: list[Part]) -> None:
        if shown := self._shown.push(text):
            parts.append(Reasoning(shown))
