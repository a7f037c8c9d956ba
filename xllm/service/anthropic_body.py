"""Decides what a request to Anthropic's Messages API asks for, in the terms of a chat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from xllm.service.body import CalledFunction, ChatBody, Function, Message, Tool, ToolCall
from xllm.service.errors import invalid

# Fields of the API that are not supported, with the values that ask for nothing and are therefore honoured.
NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "container": (None,),
    "context_management": (None,),
    "diagnostics": (None,),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "output_config": (None,),
    "service_tier": (None, "auto", "standard_only"),
    "speed": (None, "standard"),
}
# What a chat calls otherwise, in its errors.
NAMES = tuple(
    (re.compile(name), own)
    for name, own in (
        (r"^stop$", "stop_sequences"),
        (r"^continue_final_message$", "messages"),
        (r"^thinking_token_budget$", "thinking.budget_tokens"),
        (r"^(tools\[\d+\])\.function", r"\1"),
    )
)
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """`budget_tokens` of reasoning at most; what closes it comes on top."""

    type: str
    budget_tokens: int | None = None


class Choice(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class CustomTool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: dict[str, Any] | None = None  # prefixes are kept whether it is asked for or not


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]]


class MessagesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/messages, and /v1/messages/count_tokens, which generates nothing."""

    messages: list[Turn]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    tools: list[CustomTool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    metadata: Metadata | None = None
    cache_control: dict[str, Any] | None = None
    ignore_eos: bool | None = None


def chat_body(body: MessagesBody) -> ChatBody:
    """The chat that is asked for. Raises ApiError 400."""
    turns: list[Message] = []
    if body.system:
        turns.append(Message("system", _text(body.system, "system")))
    for at, turn in enumerate(body.messages):
        turns += _turn(turn, f"messages[{at}]")
    goes_on = bool(turns) and turns[-1].role == "assistant"
    if goes_on and isinstance(said := turns[-1].content, str) and said != said.rstrip():
        text = "messages ends with a text of the assistant that has white space at its end: leave that to the answer"
        raise invalid("invalid_request", text, f"messages[{len(body.messages) - 1}].content")
    choice = body.tool_choice
    return ChatBody(
        messages=turns,
        model=body.model,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
        ignore_eos=body.ignore_eos,
        chat_template_kwargs=_thinking(body.thinking),
        continue_final_message=goes_on or None,
        thinking_token_budget=body.thinking.budget_tokens if body.thinking else None,
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or [])] or None,
        tool_choice=_choice(choice) if choice else None,
        parallel_tool_calls=False if choice and choice.disable_parallel_tool_use else None,
    )


def _turn(turn: Turn, path: str) -> Iterator[Message]:
    """The messages of one turn: results of tools are messages of their own, before what the user says."""
    if turn.role not in ("user", "assistant"):
        text = f"{path}.role is {turn.role[:64]!r}, allowed are user and assistant; the system prompt has its own field"
        raise invalid("invalid_request", text, f"{path}.role")
    blocks = [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for at, block in enumerate(blocks):
        where, kind = f"{path}.content[{at}]", block.get("type")
        if kind == "text":
            texts.append(_field(block, "text", str, where, ("citations",)))
        elif kind == "tool_result" and turn.role == "user":
            content = block.get("content") or ""
            known = ("content", "is_error")
            name = _field(block, "tool_use_id", str, where, known)
            yield Message("tool", _text(content, f"{where}.content"), tool_call_id=name)
        elif kind == "thinking" and turn.role == "assistant":
            thoughts.append(_field(block, "thinking", str, where, ("signature",)))
        elif kind == "tool_use" and turn.role == "assistant":
            given = _field(block, "input", dict, where, ("id", "name"))
            name = _field(block, "name", str, where, ("id", "input"))
            arguments = msgspec.json.encode(given).decode()
            calls.append(ToolCall(CalledFunction(name, arguments), _field(block, "id", str, where, ("name", "input"))))
        else:
            text = f"{where} has type {str(kind)[:64]!r}, which this model or this role can't have"
            raise invalid("unsupported_content", text, f"{where}.type")
    if texts or calls or thoughts or not blocks:
        reasoning = "\n".join(thoughts) if thoughts else None
        yield Message(turn.role, "\n".join(texts), reasoning_content=reasoning, tool_calls=calls or None)


def _text(given: str | list[dict[str, Any]], path: str) -> str:
    """A text, or blocks of text."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not all(isinstance(block, dict) for block in given):
        raise invalid("invalid_type", f"{path} must be a text or a list of blocks", path)
    for at, block in enumerate(given):
        if block.get("type") != "text":
            text = f"{path}[{at}] has type {str(block.get('type'))[:64]!r}, only text is taken"
            raise invalid("unsupported_content", text, f"{path}[{at}].type")
    return "\n".join(_field(block, "text", str, f"{path}[{at}]", ("citations",)) for at, block in enumerate(given))


def _field(block: dict[str, Any], name: str, kind: type, path: str, others: tuple[str, ...]) -> Any:
    """A field that a block must have; beside it only `others` may be there, and a hint at a cache."""
    if extra := sorted(block.keys() - {"type", "cache_control", name, *others}):
        raise invalid("unknown_parameter", f"unknown field `{path}.{extra[0][:64]}`", f"{path}.{extra[0][:64]}")
    if not isinstance(found := block.get(name), kind):
        word = "a text" if kind is str else "an object"
        raise invalid("invalid_type", f"{path}.{name} must be {word}", f"{path}.{name}")
    return found


def _tool(tool: CustomTool, path: str) -> Tool:
    if tool.type not in (None, "custom"):
        text = f"{path}.type is {tool.type[:64]!r}: this server runs no tools of its own, only custom ones are taken"
        raise invalid("unsupported_parameter", text, f"{path}.type")
    function = Function(tool.name, tool.description, tool.input_schema, tool.strict)
    return Tool("function", function, tool.eager_input_streaming)


def _choice(choice: Choice) -> str | dict[str, Any]:
    if choice.type == "tool" and choice.name is not None:
        return {"type": "function", "function": {"name": choice.name}}
    if choice.type not in CHOICES or choice.name is not None:
        text = "tool_choice.type is auto, any, none, or tool with the name of one"
        raise invalid("invalid_request", text, "tool_choice")
    return CHOICES[choice.type]


def _thinking(given: Thinking | None) -> dict[str, Any] | None:
    if given is None:
        return None
    if given.type not in ("enabled", "disabled", "adaptive"):
        text = f"thinking.type is {given.type[:64]!r}, allowed are enabled, disabled and adaptive"
        raise invalid("invalid_request", text, "thinking.type")
    if given.budget_tokens is not None and given.type != "enabled":
        text = "thinking.budget_tokens is for type enabled"
        raise invalid("invalid_request", text, "thinking.budget_tokens")
    return None if given.type == "adaptive" else {"enable_thinking": given.type == "enabled"}
