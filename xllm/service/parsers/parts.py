"""Decides what an answer consists of: content, reasoning and calls, in the order of the text. Every reader is a state
machine over text whose parts, joined, do not depend on how the text was cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from xllm.service.text import overlap

Tools = Mapping[str, Mapping[str, Any]]  # the JSON schema of the parameters, by name of the tool


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


class Call(NamedTuple):
    """A call of a tool that exists. index: among the calls of its answer. arguments: a JSON object; of an eager tool
    nothing yet, `More` of it follow."""

    index: int
    id: str
    name: str
    arguments: str


class More(NamedTuple):
    """The next piece of the arguments of the last call."""

    index: int
    arguments: str


Whole = Content | Reasoning | Call
Part = Whole | More


def joined(parts: Iterable[Part]) -> list[Whole]:
    """The same with calls whole."""
    found: list[Whole] = []
    for part in parts:
        if isinstance(part, More):
            call = found[-1]
            assert isinstance(call, Call)
            found[-1] = call._replace(arguments=call.arguments + part.arguments)
        else:
            found.append(part)
    return found


class Reader(Protocol):
    """Text in, parts out. White space next to a marker belongs to the marker."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning."""
        ...

    @property
    def ended(self) -> bool:
        """Whether nothing may follow any more: the one call that was allowed is complete."""
        ...

    @property
    def cut(self) -> bool:
        """Whether the arguments of a call broke off after they had begun to leave."""
        ...

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        ...


class Plain:
    """All text is content."""

    thinking = ended = cut = False

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


class Trimmed:
    """Text as it comes, less white space next to markers: what ends a piece waits for what follows."""

    def __init__(self) -> None:
        self._space: list[str] = []
        self._behind_marker = False

    def push(self, text: str) -> str:
        seen = text.rstrip()
        if not seen:
            self._space += [text] if text else []
            return ""
        shown = "".join((*self._space, seen))
        if self._behind_marker:
            shown = shown.lstrip()
        self._space, self._behind_marker = [text[len(seen) :]], False
        return shown

    def marker(self) -> None:
        """A marker stands here."""
        self._space, self._behind_marker = [], True

    def finish(self) -> str:
        return "" if self._behind_marker else "".join(self._space)


class Markers:
    """Texts that are looked for as they come. None is the beginning of another, or begins inside another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(texts)
        self._any = re.compile("|".join(map(re.escape, self._texts)))
        self._quote_or_any = re.compile('"|' + self._any.pattern)

    def find(self, text: str, start: int = 0, quotes: bool = False) -> re.Match[str] | None:
        """The first one; with `quotes`, a quotation mark counts as one."""
        return (self._quote_or_any if quotes else self._any).search(text, start)

    def unfinished(self, text: str) -> int:
        """Characters at the end of text that may be the beginning of one."""
        return max(overlap(text, marker) for marker in self._texts)

    def remove(self, text: str) -> str:
        return self._any.sub("", text)
