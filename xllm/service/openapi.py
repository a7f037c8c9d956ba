"""Decides what the OpenAPI document says: every route with what it takes and answers. Bodies are those that requests
are parsed with, so that the document can't say anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from xllm import __version__
from xllm.service.endpoint import Endpoint
from xllm.service.errors import ANTHROPIC_TYPES, TYPES
from xllm.service.gate import PUBLIC, App

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{name}"
TEXT: Schema = {"type": "string"}
EVENT = {  # of a stream, each
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
WHOLE: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SOME: Schema = {"type": "object"}
FLAG: Schema = {"type": "boolean"}


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
BATCH = closed(id=TEXT, object={"const": "batch"}, endpoint=TEXT, status=TEXT, request_counts=SOME, created_at=WHOLE)
FILE = closed(id=TEXT, object={"const": "file"}, bytes=WHOLE, created_at=WHOLE, filename=TEXT, purpose=TEXT)
STORED: Mapping[str, tuple[str, Schema]] = {
    "/v1/files": ("Files that are kept, latest first", ITEMS),
    "/v1/files/{file_id}": ("A file that is kept", FILE),
    "/v1/files/{file_id}/content": ("What is in the file", TEXT),
    "/v1/batches": ("Batches, latest first", ITEMS),
    "/v1/batches/{batch_id}": ("A batch", BATCH),
}
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
    **dict.fromkeys(("pause", "resume"), closed(status={"enum": ["paused", "running"]}, changed=FLAG)),
    **dict.fromkeys(("sleep", "wakeup"), closed(is_sleeping=FLAG, level=maybe(TEXT), changed=FLAG)),
    "update": closed(weights=TEXT, changed=FLAG),
    "abort": closed(aborted=WHOLE),
    "batch": BATCH,
}  # fmt: skip
IS_SLEEPING = "/is_sleeping"
READ: Mapping[str, tuple[str, Schema]] = {
    "/health": ("Alive and able to answer", closed(status=TEXT)),
    "/livez": ("As /health", closed(status=TEXT)),
    "/ready": ("Taking requests", closed(status=TEXT)),
    "/readyz": ("As /ready", closed(status=TEXT)),
    "/metrics": ("Counters and histograms in Prometheus' text format", TEXT),
    "/version": ("The version of the server", closed(version=TEXT)),
    IS_SLEEPING: ("Whether it gave memory back by /sleep", closed(is_sleeping=FLAG, level=maybe(TEXT))),
    "/openapi.json": ("This document", SOME),
    "/ui/state": ("The figures that the page at / draws", closed(draining=FLAG, models=many(SOME))),
    "/v1/models": ("The models that are served", closed(object=TEXT, data=many(MODEL))),
    "/v1/models/{model}": ("A model that is served", MODEL),
    "/v1/responses/{response_id}": ("A stored response", ANSWERS["response"]),
    "/v1/responses/{response_id}/input_items": ("What a stored response was asked for, latest first", ITEMS),
}
SWITCHED = closed(status={"enum": ["running", "stopped"]}, changed={"type": "boolean"})
SWITCHES: Mapping[str, tuple[str, Schema]] = {  # POST without a body, or with an empty one
    "/start_profile": ("Starts a profile, where the server was given a folder for them", SWITCHED),
    "/stop_profile": ("Ends it and writes its files", SWITCHED),
}
OF_MODELS = (*PUBLIC, "/is_sleeping", "/ui/state", *SWITCHES)  # take ?model=


def document(asked: Mapping[str, App], read: Mapping[str, App], needs_key: bool) -> Schema:
    """OpenAPI 3.1. `asked`: the handlers of POST routes; `read`: those of GET routes, not of what is stored."""
    endpoints = {path: handler for path, handler in asked.items() if isinstance(handler, Endpoint)}
    bodies = list(dict.fromkeys(endpoint.body for endpoint in endpoints.values()))
    _, schemas = msgspec.json.schema_components(bodies, ref_template=REFERENCE)
    paths = _stored() if "/v1/batches" in endpoints else {}
    for path, (summary, answer) in READ.items():
        if path == IS_SLEEPING and path not in read:
            continue
        paths[path] = {"get": _operation(path, "get", summary, _answer(path, answer))}
    for path, (summary, answer) in SWITCHES.items():
        if path not in asked:
            continue
        empty = {"content": {"application/json": {"schema": {"type": "object", "additionalProperties": False}}}}
        paths[path] = {"post": _operation(path, "post", summary, _answer(path, answer)) | {"requestBody": empty}}
    deleted = _answer("", closed(id=TEXT, deleted={"const": True}))
    at = "/v1/responses/{response_id}"
    paths[at]["delete"] = _operation(at, "delete", "Forgets a stored response", deleted)
    for path, endpoint in endpoints.items():
        name = endpoint.body.__name__
        schemas[name]["properties"] |= {field: _refused(values) for field, values in endpoint.refused.items()}
        content = _answer(path, ANSWERS[endpoint.kind])
        if "stream" in schemas[name]["properties"] and endpoint.kind != "count":
            content["text/event-stream"] = {"schema": EVENT}
        said = (type(endpoint).__doc__ or "").removeprefix(f"POST {path}").strip(" .:")
        operation = _operation(path, "post", said or f"{endpoint.kind}: tasks {', '.join(endpoint.tasks)}", content)
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": REFERENCE.format(name=name)}}}}
        paths.setdefault(path, {})["post"] = operation | {"requestBody": body}
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


def _stored() -> dict[str, Schema]:
    """What is kept on disk, but for the making of a batch."""
    paths: dict[str, Schema] = {}
    for path, (summary, answer) in STORED.items():
        content = (
            {"application/octet-stream": {"schema": answer}} if path.endswith("/content") else _answer(path, answer)
        )
        paths[path] = {"get": _operation(path, "get", summary, content)}
    form = closed(file={"type": "string", "format": "binary"}, purpose={"enum": ["batch"]})
    body = {"required": True, "content": {"multipart/form-data": {"schema": form | {"additionalProperties": False}}}}
    upload = _operation("/v1/files", "post", "Keeps a file", _answer("", FILE))
    paths["/v1/files"]["post"] = upload | {"requestBody": body}
    at = "/v1/files/{file_id}"
    paths[at]["delete"] = _operation(at, "delete", "Deletes a file", _answer("", closed(id=TEXT, object=TEXT)))
    at = "/v1/batches/{batch_id}/cancel"
    paths[at] = {"post": _operation(at, "post", "Ends a batch with the results it has", _answer("", BATCH))}
    return paths


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
    if path in OF_MODELS:
        named = {"name": "model", "in": "query", "required": False, "schema": TEXT}
        operation["parameters"] = [named | {"description": "one of the models; without it, all or the first"}]
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
