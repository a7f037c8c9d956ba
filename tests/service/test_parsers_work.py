"""The work of a reader is in proportion to the text, however it is cut: characters that it looks at or copies are
counted, and no text makes them grow faster than itself."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.service.test_parsers import BAR, EAGER, NAMES, TOOLS, deepseek
from xllm.service.parsers import SHAPES, parts, shapes
from xllm.service.parsers.reading import Dialect, Reading

LONG, TIMES = 1500, 4  # characters, and how much longer the longer text is


class Work:
    characters = 0


class Text(str):
    """Counts what is done with it, and with what is made of it."""

    def __add__(self, other: str) -> Text:
        Work.characters += len(self) + len(other)
        return Text(str.__add__(self, other))

    def __radd__(self, other: str) -> Text:
        Work.characters += len(self) + len(other)
        return Text(str.__add__(other, self))

    def __getitem__(self, at: Any) -> Text:
        found = Text(str.__getitem__(self, at))
        Work.characters += len(found)
        return found

    def find(self, what: str, *span: int) -> int:  # pyright: ignore
        Work.characters += len(range(*slice(*span).indices(len(self)))) if len(span) > 1 else len(self) - sum(span)
        return str.find(self, what, *span)

    def lstrip(self, *chars: str) -> Text:  # pyright: ignore
        Work.characters += len(self)
        return Text(str.lstrip(self, *chars))

    def rstrip(self, *chars: str) -> Text:  # pyright: ignore
        Work.characters += len(self)
        return Text(str.rstrip(self, *chars))

    def strip(self, *chars: str) -> Text:  # pyright: ignore
        Work.characters += len(self)
        return Text(str.strip(self, *chars))

    def join(self, texts: Any) -> Text:  # pyright: ignore
        found = Text(str.join(self, texts))
        Work.characters += len(found)
        return found


class Pattern:
    """One that counts what it goes through: to the end of the match, or all of the text where there is none."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._own, self.pattern = pattern, pattern.pattern

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._own, name)

        def counted(text: str, *more: Any) -> Any:
            found = call(text, *more)
            if name in ("search", "match", "fullmatch"):
                start = more[0] if more else 0
                Work.characters += max(0, (found.end() if found and name != "fullmatch" else len(text)) - start)
            else:
                Work.characters += len(more[-1] if more else text)
            return found

        return counted


class Compiling:
    """The module `re` for who compiles when it is made."""

    escape = staticmethod(re.escape)

    @staticmethod
    def compile(*args: Any) -> Pattern:
        return Pattern(re.compile(*args))


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    for name in ("blocks", "growing", "harmony", "shapes", "values"):
        module = sys.modules[f"xllm.service.parsers.{name}"]
        for known, value in list(vars(module).items()):
            if isinstance(value, re.Pattern):
                monkeypatch.setattr(module, known, Pattern(value))
    monkeypatch.setattr(parts, "re", Compiling)
    made = {name: shapes.shape(name) for name in SHAPES}
    counted = {name: replace(found, heads=tuple(map(Pattern, found.heads))) for name, found in made.items()}  # pyright: ignore
    monkeypatch.setattr("xllm.service.parsers.reading.shape", counted.__getitem__)


def work(reading: Reading, text: str, whole: bool) -> int:
    reader = reading.reader()
    Work.characters = 0
    for piece in [text] if whole else text:
        reader.push(Text(piece))
    reader.finish()
    return Work.characters


BEGUN = {  # as far as arguments, or values of tags
    "qwen25": '<tool_call>{"name": "f", "arguments": ',
    "qwen3_coder": "<tool_call><function=f><parameter=text>",
    "glm45": "<tool_call>f<arg_key>text</arg_key><arg_value>",
    "kimi_k2": "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>",
    "deepseekv3": f"{deepseek('tool call begin')}f{deepseek('tool sep')}",
    "llama3_json": '{"name": "f", "parameters": ',
    "mistral": "[TOOL_CALLS]f[ARGS]",
    "json": '[{"name": "f", "arguments": ',
    "pythonic": "[f(text=",
    "harmony": "<|channel|>commentary to=functions.f<|message|>",
}
BEGUN |= dict.fromkeys(
    ("deepseekv32", "deepseekv4"), f'<{BAR}DSML{BAR}invoke name="f"><{BAR}DSML{BAR}parameter name="text" string="true">'
)
ENDLESS = {  # what is repeated behind a beginning
    "string": ('{"text": "', "x"),
    "escapes": ('{"text": "', "\\\\"),
    "digits": ('{"text": ', "9"),
    "word": ('{"text": ', "N"),
    "numbers": ('{"text": [', "1,"),
    "space": ("", " "),
    "braces": ("", "{"),
    "objects": ("{", '"a": {'),
    "halves of markers": ("", "<"),
    "text": ("", "a"),
}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ENDLESS)
def test_what_never_ends_is_read_once(name, case, eager):
    """A call that goes on and on, a character at a time."""
    before, again = ENDLESS[case]
    reading = Dialect(name).reading("", TOOLS, eager=EAGER if eager else frozenset())
    begun = BEGUN[name] + before
    short, long = (work(reading, begun + again * (size // len(again)), False) for size in (LONG, LONG * TIMES))
    assert long <= 1.5 * TIMES * short


OF_READERS = {name: [f"{BEGUN[name]}{{", BEGUN[name]] for name in NAMES}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_answers_that_repeat_themselves_are_read_once(name, whole):
    """Space, words, markers, and calls that begin and break off, in one piece and a character at a time."""
    for reasoning in ("none",) if name == "harmony" else ("none", "qwen3"):
        reading = Dialect(name, reasoning).reading("", TOOLS, eager=EAGER)
        for again in (" ", "a ", "<th", *reading.markers, *OF_READERS[name]):
            short, long = (work(reading, again * (size // len(again)), whole) for size in (LONG, LONG * TIMES))
            assert long <= 1.5 * TIMES * short, again
