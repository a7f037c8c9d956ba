"""Decides how each family of models writes calls: the markers of its blocks, and what a body between them calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from xllm.service.parsers import pythonic, values
from xllm.service.parsers.blocks import Body, Found, Read, Shape
from xllm.service.parsers.parts import Tools

NAME = r"(?P<name>[\w.-]+)"
# The beginning of an object with a call, up to its arguments where those are an object and no text.
OBJECT = (
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"{NAME}"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)


def _from_json(text: str, at: int = 0) -> tuple[Found, int]:
    """The call at a place, an object with the name and the arguments, which some models write as a text again."""
    fields, end = values.members(text, at)
    name = values.whole(fields.get("name", ""))
    arguments = fields.get("arguments", fields.get("parameters", ""))
    value = values.whole(arguments)
    if isinstance(value, str) and values.is_object(value):
        arguments, value = value.strip(), {}
    own = values.whole(fields.get("id", "null"))
    if not isinstance(name, str) or not isinstance(value, dict):
        raise ValueError("no call")
    return Found(name, arguments, own if isinstance(own, str) else None), end


def _one(body: str, tools: Tools) -> Read | None:
    """{"name": ..., "arguments": {...}}"""
    try:
        found, end = _from_json(body)
    except ValueError:
        return None
    return None if body[end:].strip() else ([found], "")


def _several(body: str, tools: Tools) -> Read | None:
    """Objects with a semicolon or a comma between them, or none; what follows the last one is text."""
    found, at = [], 0
    try:
        while (at := values.skip(body, at)) < len(body) and (not found or body[at] in ";,{"):
            call, at = _from_json(body, at + (body[at] in ";,"))
            found.append(call)
    except ValueError:
        return None
    return (found, body[at:]) if found else None


MISTRAL = re.compile(rf"\s*{NAME}(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?\s*(?=\{{)", re.ASCII)


def _mistral(body: str, tools: Tools) -> Read | None:
    """A list of objects; or, of newer models, one call: NAME, [CALL_ID] and its id, [ARGS], the arguments."""
    try:
        if head := MISTRAL.match(body):
            _, end = values.members(body, head.end())
            return [Found(head["name"], body[head.end() : end], head["id"])], body[end:]
        at = values.skip(body, 0)
        calls, end = values.parse(body, at)
        if not isinstance(calls, list) or not calls:
            return None
        read = _several(body[at + 1 : end - 1], tools)
    except ValueError:
        return None
    return None if read is None or read[1].strip() else (read[0], body[end:])


def _headed(head: str) -> Body:
    """A body of a heading (its groups: the name, and the id if the model gives one), JSON and an end of the heading's
    form; `...` in `head` stands for the JSON."""
    before, _, after = head.partition("...")
    begin, end = re.compile(before, re.ASCII), re.compile(after)

    def body(text: str, tools: Tools) -> Read | None:
        if not (match := begin.match(text)):
            return None
        try:
            _, at = values.members(text, match.end())
        except ValueError:
            return None
        own = match.groupdict().get("id")
        return ([Found(match["name"], text[match.end() : at], own)], "") if end.fullmatch(text, at) else None

    return body


def _either(*bodies: Body) -> Body:
    return lambda text, tools: next((read for body in bodies if (read := body(text, tools)) is not None), None)


def _tagged(begin: str, parameter: str, end: str, trim: bool = False) -> Body:
    """Tags: `begin` has the name; `parameter`, repeated, the key, the value, and `raw` for values that say themselves
    if they are text. trim: a line end at the borders of a value is not part of it."""
    first, each, last = (re.compile(pattern, re.DOTALL) for pattern in (begin, parameter, end))

    def body(text: str, tools: Tools) -> Read | None:
        if not (head := first.match(text)):
            return None
        at, arguments, schema = head.end(), {}, tools.get(head["name"], {})
        while match := each.match(text, at):
            key, value, at = match["key"], match["value"], match.end()
            if key in arguments:
                return None
            if trim:
                value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = _value(value, key, match.groupdict().get("raw"), schema)
        if not last.fullmatch(text, at):
            return None
        try:
            return [Found(head["name"], values.written(arguments))], ""
        except ValueError:
            return None

    return body


def _value(text: str, key: str, raw: str | None, schema: Mapping[str, Any]) -> Any:
    if raw == "true":
        return text
    try:
        return values.whole(text) if raw == "false" else values.typed(text, key, schema)
    except ValueError:
        return text


def _dsml(section: str) -> Shape:
    """DeepSeek's own tags. They say of each value whether it is text or JSON."""
    bar = "\N{FULLWIDTH VERTICAL LINE}"
    tag = f"{bar}DSML{bar}"
    parameter = (
        rf'\s*<{tag}parameter name="(?P<key>[^"]*)" string="(?P<raw>true|false)">(?P<value>.*?)</{tag}parameter>'
    )
    return Shape(
        f"<{tag}invoke",
        f"</{tag}invoke>",
        _tagged(r'\s*name="(?P<name>[^"]*)"\s*>', parameter, r"\s*"),
        sections=(f"<{tag}{section}>", f"</{tag}{section}>"),
        quoted=False,
        closed=True,
    )


def _deepseek(word: str, bracket: str = "<{}>") -> str:
    return bracket.format("\N{FULLWIDTH VERTICAL LINE}" + word.replace(" ", "\u2581") + "\N{FULLWIDTH VERTICAL LINE}")


def _heads(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(rf"{pattern}(?=\{{)", re.ASCII) for pattern in patterns)


SEPARATOR = _deepseek("tool sep")
DEEPSEEK_V3 = rf"\s*\w+{SEPARATOR}{NAME}\s*```(?:json)?\s*"
DEEPSEEK_V31 = rf"\s*{NAME}{SEPARATOR}\s*"
KIMI = rf"\s*(?P<id>(?:functions\.)?{NAME}:\d+)\s*<\|tool_call_argument_begin\|>\s*"
_MAKE: dict[str, Callable[[], Shape]] = {
    "qwen25": lambda: Shape("<tool_call>", "</tool_call>", _one, heads=_heads(OBJECT)),
    "qwen3_coder": lambda: Shape(
        "<tool_call>",
        "</tool_call>",
        _tagged(
            r"\s*<function=(?P<name>[^<>]+)>",
            r"\s*<parameter=(?P<key>[^<>]+)>(?P<value>.*?)</parameter>",
            r"\s*</function>\s*",
            trim=True,
        ),
        quoted=False,
    ),
    "kimi_k2": lambda: Shape(
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        _headed(rf"{KIMI}...\s*"),
        sections=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        inner=("<|tool_call_argument_begin|>",),
        heads=_heads(KIMI),
    ),
    "deepseekv3": lambda: Shape(
        _deepseek("tool call begin"),
        _deepseek("tool call end"),
        _either(
            _headed(rf"{DEEPSEEK_V3}...\s*```\s*"),
            _headed(rf"{DEEPSEEK_V31}...\s*"),
        ),
        sections=(_deepseek("tool calls begin"), _deepseek("tool calls end")),
        inner=(SEPARATOR,),
        heads=_heads(DEEPSEEK_V3, DEEPSEEK_V31),
    ),
    "deepseekv32": lambda: _dsml("function_calls"),
    "deepseekv4": lambda: _dsml("tool_calls"),
    "glm45": lambda: Shape(
        "<tool_call>",
        "</tool_call>",
        _tagged(
            r"\s*(?P<name>[\w.-]+)",
            r"\s*<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            r"\s*",
        ),
        quoted=False,
        closed=True,
    ),
    # Templates of Llama 4 write text that comes with calls between markers of code, an empty one too.
    "llama3_json": lambda: Shape(
        "<|python_tag|>",
        "",
        _several,
        sections=("<|python_start|>", "<|python_end|>"),
        bare="{",
        heads=_heads(OBJECT),
    ),
    "mistral": lambda: Shape("[TOOL_CALLS]", "", _mistral, inner=("[CALL_ID]", "[ARGS]"), heads=(MISTRAL,)),
    "pythonic": lambda: Shape("<|python_start|>", "<|python_end|>", pythonic.calls, bare="[", quoted=False),
    # A list of objects, which needs no marker.
    "json": lambda: Shape("[TOOL_CALLS]", "", _mistral, bare="[", heads=_heads(rf"\s*\[{OBJECT}")),
}


@cache
def shape(name: str) -> Shape:
    """The shape of a name in SHAPES. Made when it is first asked for: a model needs one of them."""
    return _MAKE[name]()
