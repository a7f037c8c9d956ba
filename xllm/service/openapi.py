"""Decides what the OpenAPI document says: every route with what it takes and answers. Bodies are those that requests
are parsed with, so that the document can't say anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from xllm import __version__
from xllm.service.answer import Endpoint
from xllm.service.errors import ANTHROPIC_TYPES, TYPES
from xllm.service.gate import PUBLIC, App

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{name}"
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SOME: Schema = {"type": "object"}


def closed(**properties: Schema) -> Schema:
    """An object that has all of these, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def envelope(**properties: Schema) -> Schema:
    return closed(id=TEXT, object=TEXT, created=WHOLE, model=TEXT, **properties)


COUNTS = closed(prompt_tokens=WHOLE, total_tokens=WHOLE)
USAGE = closed(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details=SOME)
REASON = {"enum": ["stop", "length", "tool_calls"]}
MODEL = closed(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, max_model_len=WHOLE)
SAID = closed(role=TEXT, content=maybe(TEXT))
RANKED = closed(index=WHOLE, relevance_score=NUMBER)
ITEMS = closed(object={"const": "list"}, data=many(SOME))
ANSWERS: Mapping[str, Schema] = {  # by the kind of an endpoint
    "completion": envelope(
        choices=many(closed(index=WHOLE, text=TEXT, logprobs=maybe(SOME), finish_reason=REASON)), usage=USAGE
    ),
    "chat": envelope(
        choices=many(
            closed(index=WHOLE, message=SAID, logprobs=maybe(SOME), finish_reason=REASON)
        ),
        usage=USAGE,
    ),
    "response": closed(
        id=TEXT, object={"const": "response"}, created_at=WHOLE, model=TEXT, usage=SOME,
        status={"enum": ["completed", "incomplete"]},
        output=many(closed(id=TEXT, type={"enum": ["message", "reasoning", "function_call"]})),
    ),
    "message": closed(
        id=TEXT, type={"const": "message"}, role={"const": "assistant"}, model=TEXT,
        content=many(closed(type={"enum": ["text", "thinking", "tool_use"]})),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]}, stop_sequence=maybe(TEXT),
        usage=closed(input_tokens=WHOLE, output_tokens=WHOLE),
    ),
    "sample": envelope(
        choices=many(
            closed(index=WHOLE, text=TEXT, logprobs=maybe(SOME), finish_reason={"enum": [
                "selector_match", "empty_logprobs"
            ]})
        ),
        usage=USAGE,
    ),
    "count": closed(input_tokens=WHOLE),
    "embedding": closed(object={"const": "list"}, data=many(closed(index=WHOLE, object=TEXT)), usage=COUNTS),
    "rerank": closed(id=TEXT, model=TEXT, usage=COUNTS, results=many(RANKED)),
    "score": closed(id=TEXT, model=TEXT, usage=COUNTS, data=many(closed(index=WHOLE, score=NUMBER))),
    "classify": closed(id=TEXT, usage=COUNTS, data=many(closed(index=WHOLE, label=TEXT, probs=many(NUMBER)))),
    "tokenize": closed(tokens=many(WHOLE), count=WHOLE, max_model_len=WHOLE),
    "detokenize": closed(prompt=TEXT),
}  # fmt: skip
READ: Mapping[str, tuple[str, Schema]] = {
    "/health": ("Alive and able to answer", closed(status=TEXT)),
    "/livez": ("As /health", closed(status=TEXT)),
    "/ready": ("Taking requests", closed(status=TEXT)),
    "/readyz": ("As /ready", closed(status=TEXT)),
    "/metrics": ("Counters and histograms in Prometheus' text format", TEXT),
    "/version": ("The version of the server", closed(version=TEXT)),
    "/openapi.json": ("This document", SOME),
    "/v1/models": ("The model that is served", closed(object=TEXT, data=many(MODEL))),
    "/v1/models/{model}": ("The model that is served", MODEL),
    "/v1/responses/{response_id}": ("A stored response", ANSWERS["response"]),
    "/v1/responses/{response_id}/input_items": ("What a stored response was asked for, latest first", ITEMS),
}


def document(asked: Mapping[str, App], needs_key: bool) -> Schema:
    """OpenAPI 3.1. `asked`: the handlers of POST routes."""
    endpoints = {path: handler for path, handler in asked.items() if isinstance(handler, Endpoint)}
    bodies = list(dict.fromkeys(endpoint.body for endpoint in endpoints.values()))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=REFERENCE)
    paths: dict[str, Schema] = {}
    for path, (summary, answer) in READ.items():
        paths[path] = {"get": _operation(path, "get", summary, _answer(path, answer))}
    deleted = _answer("", closed(id=TEXT, deleted={"const": True}))
    at = "/v1/responses/{response_id}"
    paths[at]["delete"] = _operation(at, "delete", "Forgets a stored response", deleted)
    for path, endpoint in endpoints.items():
        name = endpoint.body.__name__
        schemas[name]["properties"] |= {field: _refused(values) for field, values in endpoint.refused.items()}
        content = _answer(path, ANSWERS[endpoint.kind])
        if "stream" in schemas[name]["properties"] and endpoint.kind != "count":
            content["text/event-stream"] = {"schema": TEXT}
        said = (type(endpoint).__doc__ or "").removeprefix(f"POST {path}").strip(" .:")
        operation = _operation(path, "post", said or f"{endpoint.kind}: tasks {', '.join(endpoint.tasks)}", content)
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": REFERENCE.format(name=name)}}}}
        paths[path] = {"post": operation | {"requestBody": body}}
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "xllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas | _errors(), "securitySchemes": keys},
        "security": [{name: []} for name in keys] if needs_key else [],
    }


def _operation(path: str, method: str, summary: str, content: Schema) -> Schema:
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    failed = {"application/json": {"schema": {"$ref": REFERENCE.format(name=error)}}}
    operation: Schema = {
        "operationId": method + path.replace("/", "_").replace("{", "").replace("}", ""),
        "summary": summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": {"description": "What is wrong, and what to try", "content": failed},
        },
    }
    if "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": TEXT}]
    if path in PUBLIC:
        operation["security"] = []
    return operation


def _answer(path: str, schema: Schema) -> Schema:
    return {"text/plain" if path == "/metrics" else "application/json": {"schema": schema}}


def _refused(values: tuple[Any, ...]) -> Schema:
    return {"enum": list(values), "description": "not supported: these values ask for nothing"}


def _errors() -> dict[str, Schema]:
    hint = closed(cause=TEXT, knob=TEXT, fix=TEXT)
    kinds = sorted({*TYPES.values()})
    error = closed(message=TEXT, type={"enum": kinds}, param=maybe(TEXT), code=TEXT, request_id=TEXT)
    error["properties"]["hint"] = hint
    other = closed(type={"enum": sorted({*kinds, *ANTHROPIC_TYPES.values()})}, message=TEXT)
    return {
        "Error": closed(error=error),
        "AnthropicError": closed(type={"const": "error"}, error=other, request_id=TEXT),
    }
