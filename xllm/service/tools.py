"""Decides which tools a chat offers to the model, how the calls of earlier turns reach the template, and what text a
call that is required may be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm.service.body import ChatBody, Tool, ToolCall
from xllm.service.errors import ApiError, Hint, invalid
from xllm.service.parsers import values
from xllm.service.parsers.parts import Tools
from xllm.service.parsers.reading import Dialect

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1 << 18  # of all tools as JSON: the template writes them into every prompt
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Offer:
    """Tools that the model may call. shown: as the template gets them, all of them. forced: one must be called; named:
    the only one in `schemas`. eager: those whose arguments are sent as they are written."""

    shown: list[dict[str, Any]]
    schemas: Tools
    forced: bool = False
    named: bool = False
    eager: frozenset[str] = frozenset()


def offered(body: ChatBody, dialect: Dialect) -> Offer | None:
    """What a chat offers; None for nothing. Raises ApiError 400, and for a choice that can't be kept."""
    tools, choice = body.tools or [], body.tool_choice
    if len(tools) > MAX_TOOLS:
        raise invalid("invalid_request", f"tools has {len(tools)} tools, at most {MAX_TOOLS} are taken", "tools")
    schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}
    eager = frozenset(tool.function.name for tool in tools if tool.eager_input_streaming and body.stream)
    forced = _is_forced(choice, schemas)
    shown = [_shown(tool, f"tools[{at}]", forced) for at, tool in enumerate(tools)]
    if len(text := json.dumps(shown, ensure_ascii=False)) > MAX_TOOLS_CHARS:
        message = f"tools has {len(text)} characters as JSON, at most {MAX_TOOLS_CHARS} are taken"
        raise invalid("invalid_request", message, "tools")
    if len(schemas) < len(tools):
        raise invalid("invalid_request", "two of the tools have the same name", "tools")
    if not tools or choice == "none":
        return None
    if forced:  # in a form of ours, which every model can be held to
        if isinstance(choice, dict):
            schemas = {name: schema for name, schema in schemas.items() if name == choice["function"]["name"]}
        return Offer(shown, schemas, forced=True, named=isinstance(choice, dict), eager=eager)
    if dialect.tools == "none":
        text = "tools can't be called: it is not known how this model writes calls"
        hint = Hint("its chat template shows no form of calls", "xllm serve --tool-call-parser", "name the form")
        raise ApiError(400, "unsupported_parameter", text, "tools", hint)
    return Offer(shown, schemas, eager=eager)


def _shown(tool: Tool, path: str, held: bool) -> dict[str, Any]:
    function = tool.function
    if tool.type != "function":
        raise invalid("unsupported_parameter", f"{path}.type is not function, other tools are not here", f"{path}.type")
    if not NAME.fullmatch(function.name):
        text = f"{path}.function.name has 1 to 64 letters, digits, underscores, dots and dashes"
        raise invalid("invalid_request", text, f"{path}.function.name")
    if function.strict and not held:
        text = f"{path}.function.strict needs a tool_choice that forces a call: no other is held to the schema"
        raise invalid("unsupported_parameter", text, f"{path}.function.strict")
    fields = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _is_forced(choice: str | dict[str, Any] | None, schemas: Tools) -> bool:
    """Whether a call must come."""
    if isinstance(choice, dict):
        named = choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        if choice.keys() != {"type", "function"} or choice["type"] != "function" or not isinstance(name, str):
            text = 'tool_choice is auto, none, required, or {"type": "function", "function": {"name": ...}}'
            raise invalid("invalid_request", text, "tool_choice")
        if name not in schemas:
            raise invalid("invalid_request", "tool_choice names a tool that tools does not have", "tool_choice")
        return True
    if choice not in (None, "auto", "none", "required"):
        text = "tool_choice is auto, none, required, or an object that names a function"
        raise invalid("invalid_request", text, "tool_choice")
    if choice == "required" and not schemas:
        raise invalid("invalid_request", "tool_choice required needs tools", "tool_choice")
    return choice == "required"


def earlier_calls(calls: Sequence[ToolCall], path: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer for a template, their arguments as objects."""
    return [_earlier(call, f"{path}[{at}]") for at, call in enumerate(calls)]


def _earlier(call: ToolCall, path: str) -> dict[str, Any]:
    if call.type != "function":
        raise invalid("unsupported_parameter", f"{path}.type is not function", f"{path}.type")
    try:
        arguments = values.sendable(json.loads(call.function.arguments or "{}"))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        text = f"{path}.function.arguments is not a JSON object as text"
        raise invalid("invalid_request", text, f"{path}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return ({"id": call.id} if call.id is not None else {}) | {"type": "function", "function": function}


def call_schema(tools: Tools, one: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls, in the form that the parser `json` reads; `one`: of exactly one."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name in tools
    ]
    most = {"maxItems": 1} if one else {}
    schemas = {name: _moved(dict(schema) or {"type": "object"}, f"#/$defs/{name}") for name, schema in tools.items()}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}, "$defs": schemas}


def _moved(schema: Any, place: str) -> Any:
    """A schema at another place: its references to itself lead there."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(reference := moved.get("$ref"), str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
