"""Arguments of calls: whole, or no call; of eager tools as they are written: all that is JSON so far, whatever the
cut; what breaks off stays cut. And arguments in the notation of Python, which wait until all is there."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.test_parsers import CUTS, EAGER, TEXT, TOOLS, calls_of, cut, read
from xllm.service.parsers import values
from xllm.service.parsers.growing import Arguments, is_whole
from xllm.service.parsers.parts import Call, Content
from xllm.service.parsers.reading import Dialect

DEEP = '{"a": ' * 64
BROKEN = [  # arguments, how far they are arguments, what is content
    ("{", "{", ""),
    ('{"x": NaN}', '{"x": ', "NaN}"),
    ('{"x": ' + "9" * 5000 + "}", '{"x": ', "9" * 5000 + "}"),
    ('{"x": "a\\q"}', '{"x": "a', '\\q"}'),
    ('{"x" 1}', '{"x" ', "1}"),
    ('{"x": "a"\x1f0', '{"x": "a"', "\x1f0"),  # white space elsewhere, not in JSON
    ('{"x": 1,}', '{"x": 1,', "}"),
    ('{"x": [1}', '{"x": [1', "}"),
    (DEEP + '{"a": 1}', DEEP, '{"a": 1}'),
]


@pytest.mark.parametrize("name", ["qwen25", "kimi_k2", "harmony"])
@pytest.mark.parametrize(("arguments", "sent", "rest"), BROKEN)
def test_arguments_that_break_off_are_no_call_and_of_an_eager_tool_cut_there(name, arguments, sent, rest):
    before, after = {
        "qwen25": ('<tool_call>{"name": "f", "arguments": ', "</tool_call>"),
        "kimi_k2": ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        "harmony": ("<|channel|>commentary to=functions.f<|message|>", "<|call|>"),
    }[name]
    text = before + arguments + after
    for pieces in ([text], [*text]):
        whole = Dialect(name).reading("", TOOLS, eager=frozenset({"look_up"}))  # which is another one
        marker = before if name == "harmony" else before[: before.index(">") + 1]
        assert read(whole, pieces) == [Content(text.removeprefix(marker).removesuffix(after))]
        parts = read(Dialect(name).reading("", TOOLS, eager=EAGER), pieces)
        assert [part.arguments for part in parts if isinstance(part, Call)] == [sent]
        assert "".join(part.text for part in parts if isinstance(part, Content)).lstrip() == rest.lstrip()
        alone = Dialect(name).reading("", TOOLS, one_call=True, eager=EAGER).reader()
        for piece in pieces:
            alone.push(piece)
        alone.finish()
        assert alone.cut, "nothing to carry out, though it is all there may be"


@given(st.dictionaries(TEXT, st.recursive(st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False), TEXT),
                                          lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner))), CUTS,
       st.sampled_from([None, 1]), st.booleans())  # fmt: skip
def test_arguments_leave_as_they_are_written(value, places, indent, escaped):
    text = json.dumps(value, indent=indent, ensure_ascii=escaped).replace("Infinity", "1e99") + " tail"
    growing, seen, left = Arguments(), 0, ""
    for piece in cut(text, places):
        seen += len(piece)
        left += growing.push(piece)
        assert text.startswith(left) and growing.taken == len(left) <= seen
        held = text[growing.taken : min(seen, len(text) - len(" tail"))]
        assert growing.done or not held or re.fullmatch(r"[-+\w.]+|\\(u\w{0,3})?", held), "only what is undecided stays"
    left += growing.push("", final=True)
    assert growing.done and not growing.broken and left == text.removesuffix(" tail") and is_whole(left)


@given(st.text('{}[]:,"\\a1-. \n\tefu0', max_size=30), CUTS)
def test_what_leaves_is_json_or_its_beginning(text, places):
    text = "{" + text
    whole, cuts = Arguments(), Arguments()
    once = whole.push(text, final=True)
    left = [cuts.push(piece) for piece in cut(text, places)]
    assert "".join([*left, cuts.push("", final=True)]) == once == text[: whole.taken]
    assert (whole.taken, whole.done, whole.broken) == (cuts.taken, cuts.done, cuts.broken)
    if whole.done:
        assert isinstance(json.loads(once), dict)
    try:
        found = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return
    assert whole.done and whole.taken == found[1]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(text='a', count=-1, on=true), f()]", [("f", {"text": "a", "count": -1, "on": True}), ("f", {})]),
        ("[f(deep={'a': [1, (2, None)]}, ratio=1e9)]", [("f", {"deep": {"a": [1, [2, None]]}, "ratio": 1e9})]),
        ("[f(text=open('x'))]", []),
        ("[f(text='a'.upper())]", []),
        ("[f('a')]", []),
        ("[f(**{'text': 'a'})]", []),
        ("[f(deep={1: 2})]", []),
        ("[f(deep={[]: 2})]", []),
        ("[f(text=b'a')]", []),
        ("[f(ratio=-1e999)]", []),
        ("[no(text='a')]", []),
        ("[f(text='a')", []),
        ("[" * 3000, []),
        ("[f(text='a')] and more", []),
    ],
)
def test_calls_in_the_notation_of_python_are_literals(text, calls):
    for pieces in ([text], [*text]):
        parts = read(Dialect("pythonic").reading("", TOOLS), pieces)
        assert calls_of(parts) == calls
        assert calls or "".join(part[0] for part in parts) == text  # pyright: ignore


@pytest.mark.parametrize("name", ["pythonic", "glm45"])
def test_half_of_a_pair_is_sent_as_its_escape(name):
    """Models may write one, as may whoever leads them to it; no UTF-8 has bytes for it."""
    text = {
        "pythonic": r"[f(deep={'a': '\ud800'})]",
        "glm45": r'<tool_call>f<arg_key>deep</arg_key><arg_value>{"a": "\ud800"}</arg_value></tool_call>',
    }[name]
    [call] = read(Dialect(name).reading("", {"f": {"properties": {"deep": {"type": "object"}}}}), [text])
    assert isinstance(call, Call) and call.arguments.encode() == rb'{"deep": {"a": "\ud800"}}'
    assert values.complete(call.arguments) == {"deep": {"a": "\N{REPLACEMENT CHARACTER}"}}
    assert values.complete(r'{"a": "\ud83d\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_python_says_nothing_of_what_a_model_wrote(recwarn):
    read(Dialect("pythonic").reading("", TOOLS), ["[f(count=1if 1 else 2)]"])
    assert not recwarn.list
