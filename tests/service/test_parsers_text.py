"""Nothing that a model wrote is lost, but for the markers."""

from __future__ import annotations

import pytest

from tests.service.test_parsers import EAGER, TOOLS, calls_of, read
from xllm.service.parsers.parts import Content
from xllm.service.parsers.reading import Dialect


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Let me think.<|start|>assistant<|channel|>final<|message|>a", ["Let me think.", "a"]),
        ("<|channel|>final<|message|>a<|end|>lost<|start|>assistant<|channel|>final<|message|>b", ["a", "lost", "b"]),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|end|>", ["a", "b", "c"]),
        ("x" * 508 + "<|channel|>final<|message|>hi", ["x" * 508, "hi"]),
        ("assistant<|channel|>final<|message|>a", ["a"]),
        (" to=functions.f<|channel|>commentary json<|message|>[]", ["[]"]),
    ],
)
def test_harmony_shows_all_that_is_no_marker(text, parts):
    for pieces in ([text], [*text]):
        found = read(Dialect("harmony", "harmony").reading("", TOOLS), pieces)
        assert all(isinstance(part, Content) for part in found)
        assert "".join(part.text for part in found) == "".join(parts)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "text", "behind"),
    [
        ("mistral", '[TOOL_CALLS]f{"on": true} and x = y[', "and x = y["),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"on": true}}] a [TOOL', "a [TOOL"),
        ("json", '[{"name": "f", "arguments": {"on": true}}] [', "["),
        ("llama3_json", '{"name": "f", "parameters": {"on": true}} if a <', "if a <"),
    ],
)
def test_text_behind_a_call_is_whole_though_it_ends_like_a_marker(name, text, behind):
    for pieces, eager in (([text], frozenset()), ([*text], frozenset()), ([*text], EAGER)):
        parts = read(Dialect(name).reading("", TOOLS, eager=eager), pieces)
        assert calls_of(parts) == [("f", {"on": True})]
        assert "".join(part.text for part in parts if isinstance(part, Content)) == behind


def test_values_that_are_too_deep_are_content():
    mark = "\N{FULLWIDTH VERTICAL LINE}DSML\N{FULLWIDTH VERTICAL LINE}"
    begin, end = (
        f'<{mark}invoke name="f"><{mark}parameter name="x" string="false">',
        f"</{mark}parameter></{mark}invoke>",
    )
    for depth in range(900, 1000):  # one of them can be read and not be written
        read(Dialect("deepseekv32").reading("", TOOLS), [begin + "[" * depth + "]" * depth + end])
