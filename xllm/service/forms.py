"""Decides what form an answer must have: by response_format, structured_outputs, or a call of a tool that must come.
Pure; grammar compiles it."""

from __future__ import annotations

from typing import Any, NamedTuple

from xllm.service.body import ResponseFormat, Sampling, StructuredOutputs
from xllm.service.errors import invalid

KINDS = ("json", "json_object", "regex", "choice", "grammar")


class Form(NamedTuple):
    """What a field asks for; `param` is its name. `source` is a schema, a list of texts, or text. `after`: the text
    that comes before, "" where the form is all of the answer."""

    kind: str
    source: Any
    param: str
    after: str = ""


def form_of(body: Sampling, call: Form | None = None) -> Form | None:
    """The form that a request asks for, if it does; `call` is that of a call that must come. Raises ApiError 400."""
    found = (_of_format(body.response_format), of_outputs(body.structured_outputs), call)
    asked = [form for form in found if form]
    if len(asked) > 1:
        text = f"{asked[0].param} and {asked[1].param} both give the answer a form, one of them can"
        raise invalid("invalid_request", text, asked[1].param)
    if asked and body.ignore_eos:
        text = "ignore_eos can't be combined with a form of the answer, which ends by an end token"
        raise invalid("invalid_request", text, "ignore_eos")
    return asked[0] if asked else None


def _of_format(given: ResponseFormat | None) -> Form | None:
    if given is None or (given.type == "text" and given.json_schema is None):
        return None
    if given.type == "json_object" and given.json_schema is None:
        return Form("json", {"type": "object"}, "response_format")
    if given.type == "json_schema" and given.json_schema is not None:
        schema = given.json_schema.schema
        return Form("json", {"type": "object"} if schema is None else schema, "response_format.json_schema.schema")
    if given.type in ("text", "json_object", "json_schema"):
        word = "missing" if given.type == "json_schema" else f"not for type {given.type}"
        raise invalid("invalid_request", f"response_format.json_schema is {word}", "response_format.json_schema")
    text = f"response_format.type is {given.type[:64]!r}, allowed are text, json_object and json_schema"
    raise invalid("unsupported_parameter", text, "response_format.type")


def of_outputs(given: StructuredOutputs | None) -> Form | None:
    if given is None:
        return None
    named = [kind for kind in KINDS if getattr(given, kind) not in (None, False)]
    if len(named) != 1:
        text = f"structured_outputs needs exactly one of {', '.join(KINDS)}"
        raise invalid("invalid_request", text, "structured_outputs")
    kind, source = named[0], getattr(given, named[0])
    if not source or (kind == "choice" and not all(source)):
        raise invalid("invalid_request", f"structured_outputs.{kind} is empty", f"structured_outputs.{kind}")
    param = f"structured_outputs.{kind}"
    return Form("json", {"type": "object"}, param) if kind == "json_object" else Form(kind, source, param)
