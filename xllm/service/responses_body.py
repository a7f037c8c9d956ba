"""Decides what a request to OpenAI's Responses API asks for, in the terms of a chat."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from xllm.service.body import CalledFunction, ChatBody, Function, JsonSchema, Message, ResponseFormat, Tool, ToolCall
from xllm.service.errors import invalid

# Fields of the API that are not supported, with the values that ask for nothing and are therefore honoured.
NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "max_tool_calls": (None,),
    "moderation": (None,),
    "prompt": (None,),
    "prompt_cache_retention": (None, "in_memory"),
    "service_tier": (None, "auto", "default"),
    "truncation": (None, "disabled"),
}
# What a chat calls otherwise, in its errors.
NAMES = tuple(
    (re.compile(name), own)
    for name, own in (
        (r"\bmax_tokens\b", "max_output_tokens"),
        (r"^messages$", "input"),
        (r"^logprobs$", "top_logprobs"),
        (r"^response_format\.json_schema\b", "text.format"),
        (r"^response_format\b", "text.format"),
        (r"^(tools\[\d+\])\.function", r"\1"),
    )
)
ROLES = ("user", "assistant", "system", "developer")
LOGPROBS = "message.output_text.logprobs"
TEXTS = ("input_text", "output_text", "text")
OF_ITEMS = ("id", "status", "phase")  # that answers have and that say nothing of the text


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None  # as in a chat


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """`effort`: "none" asks the template for an answer without; other values are not supported."""

    effort: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_obfuscation: events of text are padded, so that their sizes tell less of what they say."""

    include_obfuscation: bool | None = None


class ResponsesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses. `input`: a text, or items: messages, calls, their results and reasoning."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None  # prefixes are found whatever they are called
    safety_identifier: str | None = None
    user: str | None = None


def items_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The input as items."""
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": body.input}]}]
    return body.input


def chat_body(body: ResponsesBody, items: Sequence[dict[str, Any]]) -> ChatBody:
    """The chat that is asked for; `items` are those before this turn and of it. Raises ApiError 400."""
    messages = [Message("developer", body.instructions)] if body.instructions else []
    messages += _messages(items)
    for at, name in enumerate(body.include or []):
        if name != LOGPROBS:
            text = f"include[{at}] is {name[:64]!r}: only {LOGPROBS} can be included"
            raise invalid("unsupported_parameter", text, f"include[{at}]")
    if body.stream_options is not None and not body.stream:
        raise invalid("invalid_request", "stream_options needs stream: true", "stream_options")
    logprobs = bool(body.include or body.top_logprobs)
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.keys() == {"type", "name"}:
        choice = {"type": choice["type"], "function": {"name": choice["name"]}}
    return ChatBody(
        messages=messages,
        model=body.model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        top_logprobs=body.top_logprobs if logprobs else None,
        stream=body.stream,
        response_format=_format(body.text.format) if body.text and body.text.format else None,
        chat_template_kwargs=_reasoning(body.reasoning),
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or [])] or None,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
    )


def _messages(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Reasoning, text and calls of one answer are items of their own, and one message."""
    found: list[Message] = []
    thoughts: str | None = None
    for at, item in enumerate(items):
        path, kind = f"input[{at}]", item.get("type", "message")
        if kind == "message":
            role = _field(item, "role", path, ("content", *OF_ITEMS))
            if role not in ROLES:
                raise invalid("invalid_request", f"{path}.role is {role[:64]!r}, allowed: {', '.join(ROLES)}", path)
            text = _text(item.get("content"), f"{path}.content")
            found.append(Message(role, text, reasoning_content=thoughts if role == "assistant" else None))
            thoughts = None
        elif kind == "reasoning":
            texts = [part.get("text") for part in item.get("content") or () if isinstance(part, dict)]
            thoughts = "\n".join(text for text in texts if isinstance(text, str)) or None
        elif kind == "function_call":
            others = ("name", "arguments", *OF_ITEMS)
            call = CalledFunction(_field(item, "name", path, ("call_id", *others)), _arguments(item, path))
            made = ToolCall(call, _field(item, "call_id", path))
            if not found or found[-1].role != "assistant":
                found.append(Message("assistant", "", reasoning_content=thoughts))
                thoughts = None
            found[-1].tool_calls = [*(found[-1].tool_calls or ()), made]
        elif kind == "function_call_output":
            name = _field(item, "call_id", path, ("output", *OF_ITEMS))
            found.append(Message("tool", _text(item.get("output"), f"{path}.output"), tool_call_id=name))
        else:
            text = f"{path} has type {str(kind)[:64]!r}: messages, calls of functions, their outputs and reasoning are"
            raise invalid("unsupported_content", f"{text} taken", f"{path}.type")
    return found


def _text(given: Any, path: str) -> str:
    """A text, or parts of text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not all(isinstance(part, dict) for part in given):
        raise invalid("invalid_type", f"{path} must be a text or a list of parts", path)
    for at, part in enumerate(given):
        if part.get("type") not in TEXTS:
            text = f"{path}[{at}] has type {str(part.get('type'))[:64]!r}, this model reads text only"
            raise invalid("unsupported_content", text, f"{path}[{at}].type")
    return "\n".join(
        _field(part, "text", f"{path}[{at}]", ("annotations", "logprobs")) for at, part in enumerate(given)
    )


def _field(item: dict[str, Any], name: str, path: str, others: Sequence[str] | None = None) -> str:
    """A text that an item must have; beside it only `others` may be there, where they are given."""
    if others is not None and (extra := sorted(item.keys() - {"type", name, *others})):
        raise invalid("unknown_parameter", f"unknown field `{path}.{extra[0][:64]}`", f"{path}.{extra[0][:64]}")
    if not isinstance(found := item.get(name), str):
        raise invalid("invalid_type", f"{path}.{name} must be a text", f"{path}.{name}")
    return found


def _arguments(item: dict[str, Any], path: str) -> str:
    text = _field(item, "arguments", path)
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid("invalid_request", f"{path}.arguments is not a JSON object as text", f"{path}.arguments")
    return text


def _tool(tool: FunctionTool, path: str) -> Tool:
    if tool.type != "function" or tool.name is None:
        text = f"{path} must be a function with a name: this server runs no tools of its own"
        raise invalid("unsupported_parameter", text, f"{path}.type")
    function = Function(tool.name, tool.description, tool.parameters, tool.strict)
    return Tool("function", function, tool.eager_input_streaming)


def _format(given: TextFormat) -> ResponseFormat:
    if given.type == "json_schema":
        return ResponseFormat("json_schema", JsonSchema(given.name or "answer", given.schema))
    return ResponseFormat(given.type)


def _reasoning(given: Reasoning | None) -> dict[str, Any] | None:
    if given is None or given.effort is None:
        return None
    if given.effort != "none":
        text = f"reasoning.effort {given.effort[:64]!r} is not supported: only none is, or to leave it out"
        raise invalid("unsupported_parameter", text, "reasoning.effort")
    return {"enable_thinking": False}
