"""Decides how the answers of one model are read, and those of one request: content, reasoning and calls told apart."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

from xllm.service.parsers import (
    ALIASES,
    HARMONY,
    REASONING_PARSERS,
    SHAPES,
    THOUGHTS,
    THOUGHTS_SHOWN,
    TOOL_PARSERS,
    TOOLS_SHOWN,
    harmony,
)
from xllm.service.parsers.blocks import Blocks
from xllm.service.parsers.parts import Plain, Reader, Tools
from xllm.service.parsers.reasoning import Thinking, Thoughts
from xllm.service.parsers.shapes import shape


@dataclass(frozen=True)
class Dialect:
    """How a model writes calls and reasoning: names of parsers, "none" where it has no way that is known."""

    tools: str = "none"
    reasoning: str = "none"

    def reading(
        self,
        prompt: str = "",
        tools: Tools | None = None,
        one_call: bool = False,
        begun: str | None = None,
        eager: Set[str] = frozenset(),
    ) -> Reading:
        """How the answer to a prompt is read. Without tools nothing is a call. one_call: the first one ends it. begun:
        the text of the answer that is in the prompt already, where it goes on with one. eager: tools whose arguments
        leave as they are written, and not when their call is complete."""
        thoughts = self.thoughts
        inside = thoughts is not None and (thoughts.opened_by(prompt) if begun is None else thoughts.open_in(begun))
        return Reading(self, tools or {}, one_call, inside, begun is not None, eager)

    def before_call(self, prompt: str) -> tuple[str, Dialect]:
        """The prompt of an answer that is nothing but calls in our own form, and how that is read."""
        if HARMONY in (self.tools, self.reasoning):  # a message is opened for them, in the channel of calls
            return prompt + harmony.OPEN_CALLS, Dialect("json")
        return prompt, replace(self, tools="json")

    @property
    def thoughts(self) -> Thoughts | None:
        found = THOUGHTS.get(self.reasoning)
        return Thoughts(*found) if found else None


@dataclass(frozen=True)
class Reading:
    """How one answer is read. inside: it begins inside of reasoning. begun: its beginning is in the prompt."""

    dialect: Dialect = Dialect()
    tools: Tools = field(default_factory=dict)
    one_call: bool = False
    inside: bool = False
    begun: bool = False
    eager: Set[str] = frozenset()

    def reader(self) -> Reader:
        """A new one: each answer has its own."""
        tools, reasoning = self.dialect.tools, self.dialect.reasoning
        if HARMONY in (tools, reasoning):
            return harmony.Harmony(self.tools, self.one_call, self.begun, self.eager)
        calls = self.tools and tools in SHAPES
        rest = Blocks(shape(tools), self.tools, self.one_call, self.begun, self.eager) if calls else Plain()
        thoughts = self.dialect.thoughts
        return Thinking(thoughts, self.inside, rest) if thoughts and (self.inside or not self.begun) else rest

    @property
    def closing(self) -> str:
        """What ends reasoning; empty where there is none."""
        if HARMONY in (self.dialect.tools, self.dialect.reasoning):
            return harmony.CLOSE_ANALYSIS
        return self.dialect.thoughts.close if self.dialect.thoughts else ""

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts it looks for, which a tokenizer may hold to be special tokens."""
        tools, reasoning = self.dialect.tools, self.dialect.reasoning
        if HARMONY in (tools, reasoning):
            return harmony.MARKERS
        thoughts = self.dialect.thoughts
        calls = shape(tools) if self.tools and tools in SHAPES else None
        return ((thoughts.open, thoughts.close) if thoughts else ()) + (calls.markers + calls.inner if calls else ())


def choose(template: str | None, tools: str | None = None, reasoning: str | None = None) -> Dialect:
    """The dialect that a chat template shows, or what is named instead. Raises ValueError for unknown names."""
    shown = template or ""
    chosen = Dialect(
        _named(tools, "--tool-call-parser", TOOL_PARSERS) or _first(shown, TOOLS_SHOWN),
        _named(reasoning, "--reasoning-parser", REASONING_PARSERS) or _first(shown, THOUGHTS_SHOWN),
    )
    pair = {chosen.tools, chosen.reasoning} - {"none"}
    if HARMONY in pair and len(pair) > 1:
        raise ValueError(f"harmony reads both calls and reasoning, it can't be combined with {min(pair - {HARMONY})}")
    return chosen


def _named(name: str | None, flag: str, names: tuple[str, ...]) -> str | None:
    if name is not None and name not in names:
        raise ValueError(f"{flag} {name}: there is no such parser, there are {', '.join(names)}")
    return ALIASES.get(name, name) if name and flag == "--tool-call-parser" else name


def _first(template: str, shown: tuple[tuple[str, str], ...]) -> str:
    return next((name for marker, name in shown if marker in template), "none")


NO_DIALECT = Dialect()
PLAIN = Reading()
