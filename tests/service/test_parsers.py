"""Answers told apart: any cut of a text gives the same parts, what is no call is content, and nothing is lost."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.service.fakes import byte_tokenizer
from xllm.runtime import TokenOutput
from xllm.service.generation import Choice
from xllm.service.parsers import ALIASES, REASONING_PARSERS, SHAPES, TOOL_PARSERS
from xllm.service.parsers.parts import Call, Content, Markers, More, Part, joined
from xllm.service.parsers.reading import Dialect, Reading, choose
from xllm.service.parsers.shapes import shape
from xllm.service.parsers.values import typed
from xllm.service.tokenizer import TextCodec

BAR, LOW = "\N{FULLWIDTH VERTICAL LINE}", "\u2581"
SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": ["number", "null"]},
        "deep": {"$ref": "#/$defs/Deep"},
        "on": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "$defs": {"Deep": {"type": "object"}},
}
TOOLS = {"look_up": SCHEMA, "f": SCHEMA}
EAGER = frozenset(TOOLS)
SOME = st.sampled_from([frozenset(), EAGER, frozenset({"f"})])
NAMES = sorted((*SHAPES, "harmony"))
Calls = list[tuple[str, dict]]


def dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def deepseek(word: str) -> str:
    return f"<{BAR}{word.replace(' ', LOW)}{BAR}>"


def plain(value: object) -> str:
    return value if isinstance(value, str) else dumped(value)


def dsml(section: str, calls: Calls) -> str:
    def parameter(key: str, value: object) -> str:
        text = "true" if isinstance(value, str) else "false"
        return f'<{BAR}DSML{BAR}parameter name="{key}" string="{text}">{plain(value)}</{BAR}DSML{BAR}parameter>\n'

    blocks = [
        f'<{BAR}DSML{BAR}invoke name="{name}">\n'
        + "".join(parameter(*item) for item in arguments.items())
        + f"</{BAR}DSML{BAR}invoke>\n"
        for name, arguments in calls
    ]
    return f"<{BAR}DSML{BAR}{section}>\n{''.join(blocks)}</{BAR}DSML{BAR}{section}>"


def coder(name: str, arguments: dict) -> str:
    values = "".join(f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def glm(name: str, arguments: dict) -> str:
    values = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{values}</tool_call>"


def kimi(calls: Calls) -> str:
    blocks = [
        f"<|tool_call_begin|>functions.{name}:{at}<|tool_call_argument_begin|>{dumped(arguments)}<|tool_call_end|>"
        for at, (name, arguments) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(blocks)}<|tool_calls_section_end|>"


def deepseekv3(calls: Calls) -> str:
    begin, end, separator = deepseek("tool call begin"), deepseek("tool call end"), deepseek("tool sep")
    forms = "{0}function{2}{3}\n```json\n{4}\n```{1}", "{0}{3}{2}{4}{1}"  # of V3 and V3.1
    blocks = [
        forms[at % 2].format(begin, end, separator, name, dumped(arguments))
        for at, (name, arguments) in enumerate(calls)
    ]
    return deepseek("tool calls begin") + "\n".join(blocks) + deepseek("tool calls end")


def objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [dumped({"name": name, key: arguments}) for name, arguments in calls]


def python(call: tuple[str, dict]) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


WRITE = {  # how each family writes calls
    "qwen25": lambda calls: "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects(calls)),
    "qwen3_coder": lambda calls: "\n".join(coder(*call) for call in calls),
    "glm45": lambda calls: "\n".join(glm(*call) for call in calls),
    "kimi_k2": kimi,
    "deepseekv3": deepseekv3,
    "deepseekv32": lambda calls: dsml("function_calls", calls),
    "deepseekv4": lambda calls: dsml("tool_calls", calls),
    "pythonic": lambda calls: f"<|python_start|>[{', '.join(map(python, calls))}]<|python_end|>",
    "llama3_json": lambda calls: "<|python_tag|>" + "; ".join(objects(calls, "parameters")),
    "mistral": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{dumped(arguments)}" for name, arguments in calls),
    "json": lambda calls: f"[TOOL_CALLS][{', '.join(objects(calls))}]",
    "harmony": lambda calls: "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumped(arguments)}<|call|>"
        for name, arguments in calls
    ),
}


def read(reading: Reading, pieces: list[str]) -> list[Part]:
    """The parts of a text, those of one kind in a row as one, ids left out as they are drawn by chance."""
    reader = reading.reader()
    merged: list[Part] = []
    for part in [*(part for piece in pieces for part in reader.push(piece)), *reader.finish()]:
        if isinstance(part, More):
            call = merged[-1]
            assert isinstance(call, Call) and call.index == part.index and part.arguments
            merged[-1] = call._replace(arguments=call.arguments + part.arguments)
        elif isinstance(part, Call):
            assert part.id
            merged.append(part._replace(id=""))
        elif merged and type(merged[-1]) is type(part):
            merged[-1] = merged[-1]._replace(text=merged[-1].text + part.text)  # pyright: ignore
        else:
            merged.append(part)
    return merged


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[begin:end] for begin, end in pairwise(borders)]


def calls_of(parts: list[Part]) -> Calls:
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>[]{}|" + BAR), max_size=12)
TEXT = st.one_of(WORDS, st.sampled_from(["a}b", '"', "\\", "grüße 😀", "</s>", "{", "[1", "1 < 2"]))
VALUES = {
    "text": TEXT.filter(lambda text: not text.startswith("\n") and not text.endswith("\n")),
    "count": st.integers(-(10**20), 10**20),
    "ratio": st.one_of(st.none(), st.floats(-1e9, 1e9)),
    "deep": st.dictionaries(WORDS, st.one_of(TEXT, st.lists(st.dictionaries(WORDS, TEXT)))),
    "on": st.booleans(),
}
CALLS = st.lists(
    st.tuples(st.sampled_from(sorted(TOOLS)), st.fixed_dictionaries({}, optional=VALUES)), min_size=1, max_size=3
)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
BEFORE = WORDS.map(str.strip)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None)
@given(BEFORE, CALLS, CUTS, SOME)
def test_calls_are_read_as_they_were_written(name, before, calls, places, eager):
    final = f"<|channel|>final<|message|>{before}<|end|><|start|>assistant" if name == "harmony" else f"{before}\n"
    text = (final if before else "") + WRITE[name](calls)
    parts = read(Dialect(name).reading("", TOOLS, eager=eager), cut(text, places))
    assert calls_of(parts) == calls
    assert "".join(part.text for part in parts if isinstance(part, Content)) == before
    assert [part.index for part in parts if isinstance(part, Call)] == list(range(len(calls)))
    one = read(Dialect(name).reading("", TOOLS, one_call=True, eager=eager), cut(text, places))
    assert calls_of(one) == calls[:1]


def pieces_of(name: str) -> list[str]:
    """Texts that are, or nearly are, what a family looks for."""
    valid = WRITE[name]([("f", {"text": "a", "deep": {"b": [1]}})])
    markers = [*Reading(Dialect(name), TOOLS).markers, "<think>", "</think>"]
    broken = [marker[:at] for marker in markers for at in (1, len(marker) // 2, -1)]
    halves = [valid[:at] for at in range(0, len(valid), 7)] + [valid[at:] for at in range(0, len(valid), 7)]
    return [
        *markers, *broken, *halves, valid, valid.replace('"f"', '"no"'), '{"name": "f", "arguments": {', "}", "]", "{",
        "[", '"', "\\", "\n", "  ", "\t", "é", "😀", "\0", "</parameter>", "f", "[ARGS]", "```", "word",
        '{"name": "f", "arguments": "{}"}', '{"name": "f"}', '{"name": 1, "arguments": {}}', "NaN", "1e999",
    ]  # fmt: skip


GARBAGE = {name: st.lists(st.one_of(st.sampled_from(pieces_of(name)), TEXT), max_size=14) for name in NAMES}


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_behaviour_36_any_cut_of_any_text_gives_the_same(name, data):
    """And what is no call is all there, less markers and white space. Arguments are whole where no tool is eager."""
    text = "".join(data.draw(GARBAGE[name]))
    reasoning = data.draw(st.sampled_from(["none", "qwen3", "deepseek-r1", "kimi"]))
    eager = data.draw(SOME)
    reading = Dialect(name, "none" if name == "harmony" else reasoning).reading("", TOOLS, eager=eager)
    parts = read(reading, [text])
    assert read(reading, cut(text, data.draw(CUTS))) == parts
    assert read(reading, [*text]) == parts
    if name != "harmony" and reasoning == "none" and not any(isinstance(part, Call) for part in parts):
        left = Markers(shape(name).markers).remove(text)
        assert without_space("".join(part[0] for part in parts)) == without_space(left)  # pyright: ignore
    for call in parts:
        if isinstance(call, Call):
            assert call.name in TOOLS and call.arguments.startswith("{")
            assert call.name in eager or isinstance(json.loads(call.arguments), dict)


# What a text must have of a call that is complete, where that is no brace.
LAST = {"glm45": "</tool_call>", "qwen3_coder": "</function>", "pythonic": "]"}
LAST |= dict.fromkeys(("deepseekv32", "deepseekv4"), f"</{BAR}DSML{BAR}invoke>")


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_call_that_is_not_complete_is_content(name, data):
    """Wherever max_tokens ended it, and where another call begins in place of its end."""
    text, last = WRITE[name](data.draw(CALLS)[:1]), LAST.get(name, "}")
    begin = text.index("<|message|>") + 11 if name == "harmony" else 0  # a header that is cut off says nothing
    text = text[: data.draw(st.integers(begin, text.rindex(last) + len(last) - 1))]
    if name != "harmony" and data.draw(st.booleans()):
        text += shape(name).open
    reading = Dialect(name).reading("", TOOLS, eager=data.draw(st.sampled_from([frozenset(), frozenset({"other"})])))
    parts = read(reading, [text])
    assert not any(isinstance(part, Call) for part in parts)
    assert read(reading, cut(text, data.draw(CUTS))) == read(reading, [*text]) == parts
    shown = "".join(part.text for part in parts if isinstance(part, Content))
    left = text.partition("<|message|>")[2] if name == "harmony" else Markers(shape(name).markers).remove(text)
    assert without_space(shown) == without_space(left)


@given(WORDS, TEXT, CUTS)
@example("a", "<think> is a tag", [])
@example("", "</think>", [3])
def test_reasoning_opens_the_answer_and_later_mentions_are_text(thought, content, places):
    for prompt, opened in (("", "<think>\n"), ("<think>\n", ""), ("<think>", "<think>")):
        text = f"{opened}{thought}\n</think>\n\n{content}"
        parts = read(Dialect("qwen25", "qwen3").reading(prompt, TOOLS), cut(text, places))
        found = {type(part).__name__: part[0] for part in parts if not isinstance(part, Call)}  # pyright: ignore
        assert found.get("Reasoning", "") == thought.strip()
        assert found.get("Content", "") == content.lstrip()


def test_a_block_that_never_closes_is_all_reasoning():
    for parser, prompt, text, kind in (
        ("qwen3", "", "<think>a", "Reasoning"),
        ("qwen3", "<think>", "a", "Reasoning"),
        ("qwen3", "<think></think>", "a", "Content"),
        ("qwen3", "", "a", "Content"),
        ("deepseek-r1", "", "a", "Reasoning"),
        ("deepseek-r1", "<think>\n\n</think>\n", "a", "Content"),
        ("none", "<think>", "a", "Content"),
    ):
        [part] = read(Dialect("none", parser).reading(prompt), [text])
        assert (type(part).__name__, part[0]) == (kind, "a"), (parser, prompt)


def test_harmony_tells_channels_apart():
    text = (
        "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>commentary<|message|>so<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"on": true}<|call|>'
    )
    parts = read(Dialect("harmony", "harmony").reading("", TOOLS), [text])
    assert [(type(part).__name__, part[-1]) for part in parts] == [
        ("Reasoning", "why"), ("Content", "so"), ("Call", '{"on": true}')
    ]  # fmt: skip
    assert read(Dialect("harmony", "harmony").reading(""), [text])[-1].text == 'so{"on": true}'  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen25", 'a <tool_call>{"name": "other", "arguments": {}}</tool_call> b'),  # no such tool
        ("qwen25", 'a <tool_call>{"name": "f", "arguments"</tool_call> b'),
        ("qwen25", 'a <tool_call>{"name": "f", "arguments": [1]}</tool_call> b'),
        ("qwen25", 'a <tool_call>{"arguments": {"x": NaN}, "name": "f"}</tool_call> b'),
        ("qwen25", 'a <tool_call>{"arguments": {"x": ' + "9" * 5000 + '}, "name": "f"}</tool_call> b'),
        ("qwen25", "a <tool_call>" + '{"a":' * 5000 + "</tool_call> b"),
        ("qwen3_coder", "a <tool_call><function=f><parameter=text>x</function></tool_call> b"),
        ("glm45", "a <tool_call>f<arg_key>text</arg_key></tool_call> b"),
    ],
)
def test_what_is_no_call_stays_as_content_without_its_markers(name, text):
    [part] = read(Dialect(name).reading("", TOOLS), [text])
    assert part == Content(text.replace("<tool_call>", "").replace("</tool_call>", ""))


def test_forms_beside_the_usual_one():
    for name, text in (
        ("qwen25", '<tool_call>{"name": "f", "arguments": {"text": "</tool_call>"}}'),  # in a string, and never closed
        ("qwen25", '<tool_call>{"name": "f", "arguments": "{\\"text\\": \\"</tool_call>\\"}"}</tool_call>'),
        ("qwen25", '<tool_call>{"name": "f", "arguments": {"text": "</tool_call>"}}\n<tool_call>'),
        ("llama3_json", '{"name": "f", "parameters": {"text": "</tool_call>"}}'),
        ("llama3_json", '{"type": "function", "name": "f", "parameters": {"text": "</tool_call>"}}'),
        ("llama3_json", '<|python_start|><|python_end|>\n{"name": "f", "parameters": {"text": "</tool_call>"}}'),
        ("llama3_json", '<|python_start|>{"name": "f", "parameters": {"text": "</tool_call>"}}<|python_end|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"text": "</tool_call>"}, "id": "abcdefghi"}]'),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"text": "</tool_call>"}'),
        ("json", ' [{"name": "f", "arguments": {"text": "</tool_call>"}}]'),
    ):
        for pieces, eager in (([text], frozenset()), ([*text], frozenset()), ([*text], EAGER)):
            parts = read(Dialect(name).reading("", TOOLS, eager=eager), pieces)
            assert calls_of(parts) == [("f", {"text": "</tool_call>"})], text


def test_the_ids_of_a_model_are_kept_once_each():
    block = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    reader = Dialect("kimi_k2").reading("", TOOLS).reader()
    first, second = (part.id for part in reader.push(block + block) if isinstance(part, Call))
    assert first == "functions.f:0"
    assert re.fullmatch("call_[0-9a-f]{24}", second)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("5", "count", 5), ("5", "text", "5"), ("5", "unknown", "5"), ("five", "count", "five"),
        ("1.5", "count", "1.5"), ("1", "ratio", 1), ("null", "ratio", None), ("None", "on", None), ("True", "on", True),
        ("yes", "on", "yes"), ('{"a": [1]}', "deep", {"a": [1]}), ("{", "deep", "{"), ("1e999", "ratio", "1e999"),
        ("", "count", ""),
    ],
)  # fmt: skip
def test_the_schema_gives_values_of_tags_their_types(text, name, value):
    assert typed(text, name, SCHEMA) == value
    assert typed(text, name, {"properties": {name: {"$ref": f"#/properties/{name}"}}}) == text  # leads in a circle


TEMPLATES = {
    "<tool_call>{{ tools }}</tool_call><think>": ("qwen25", "qwen3"),
    "<tool_call><function=a>": ("qwen3_coder", "none"),
    "<tool_call><arg_key></think>": ("glm45", "qwen3"),
    "[TOOL_CALLS]": ("mistral", "none"),
    "<|start|>assistant<|channel|>": ("harmony", "harmony"),
    "<|tool_call_begin|>": ("kimi_k2", "none"),
    deepseek("tool call begin") + "</think>": ("deepseekv3", "qwen3"),
    f"<{BAR}DSML{BAR}function_calls>": ("deepseekv32", "none"),
    f"<{BAR}DSML{BAR}tool_calls>": ("deepseekv4", "none"),
    '{"name": function name, "parameters": dictionary of argument name and its value}': ("llama3_json", "none"),
    '<|python_start|> {"name": .., "parameters": dictionary of argument name and its value}': ("llama3_json", "none"),
    "<|python_start|>": ("pythonic", "none"),
    "{{ messages }}": ("none", "none"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_template_shows_the_parsers(template):
    assert choose(template) == Dialect(*TEMPLATES[template])
    assert choose(template, "none", "none") == Dialect()
    assert choose(None, "hermes", "kimi") == Dialect("qwen25", "kimi")


def test_names_that_are_not_there_are_refused_with_the_list():
    with pytest.raises(ValueError, match="qwen3_coder"):
        choose("", "qwen")
    with pytest.raises(ValueError, match="deepseek-r1"):
        choose("", None, "r1")
    with pytest.raises(ValueError, match="harmony reads both"):
        choose("<think>", "harmony")
    for name in (*TOOL_PARSERS, *ALIASES):
        if name not in ("none", "harmony"):
            shape(choose("", name).tools)
    for name in REASONING_PARSERS:
        choose("", None, name).reading().reader()


def test_every_name_is_in_the_table():
    table = Path(__file__).parents[2].joinpath("docs", "calls.md").read_text(encoding="utf-8")
    for name in (*TOOL_PARSERS, *REASONING_PARSERS):
        assert f"`{name}`" in table


def test_special_tokens_that_are_markers_are_seen_and_others_are_not():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    tokens = tokenizer.encode('[TOOL_CALLS]f[ARGS]<|start|>{"on": true}').ids
    choice = Choice(TextCodec(tokenizer), (), True, Dialect("mistral").reading("", TOOLS))
    outputs = [TokenOutput("a", token, at) for at, token in enumerate(tokens)]
    parts = [part for output in outputs for part in choice.push(output).parts]
    last = choice.push(TokenOutput("a", 257, len(tokens), finish_reason="stop"))
    assert calls_of([*joined([*parts, *last.parts])]) == [("f", {"on": True})]
    assert last.finish_reason == "tool_calls"
