"""Behaviour 63: what is answered is what the types of the official clients say, no member lost or of another type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai.types import Batch, Completion, CreateEmbeddingResponse, FileObject, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.service.fakes import rows_service, running

SAY = [{"role": "user", "content": "hello"}]
COMPLETION = {"model": "fake", "prompt": "hello", "logprobs": 2, "n": 2, "temperature": 0}
CHAT = {"model": "fake", "messages": SAY, "logprobs": True, "top_logprobs": 2, "n": 2}
RESPONSE = {"model": "fake", "input": "hello", "max_output_tokens": 5}
MESSAGE = {"model": "fake", "messages": SAY, "max_tokens": 50}
POSTED = {
    "completion": ("/v1/completions", COMPLETION, Completion),
    "chat": ("/v1/chat/completions", CHAT, ChatCompletion),
    "response": ("/v1/responses", RESPONSE, Response),
    "message": ("/v1/messages", MESSAGE, Message),
    "count": ("/v1/messages/count_tokens", {"model": "fake", "messages": SAY}, MessageTokensCount),
}
STREAMED = {
    "completion": ("/v1/completions", COMPLETION | {"stream_options": {"include_usage": True}}, Completion),
    "chat": ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, ChatCompletionChunk),
    "response": ("/v1/responses", RESPONSE, ResponseStreamEvent),
    "message": ("/v1/messages", MESSAGE, RawMessageStreamEvent),
}


def assert_lossless(found: Any, kind: Any) -> None:
    """Validates as that type, nothing made of something else, and comes back whole."""
    parsed = TypeAdapter(kind).validate_json(json.dumps(found), strict=True)
    assert isinstance(parsed, BaseModel)
    assert parsed.model_dump(mode="json", exclude_unset=True, by_alias=True) == found
    assert not parsed.model_extra or parsed.model_extra.keys() <= {"store"}, parsed.model_extra  # as OpenAI has it


def events(lines: Iterator[str]) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


@pytest.mark.parametrize("name", POSTED)
def test_behaviour_63_answers_are_of_the_clients_types(http: httpx.Client, name: str) -> None:
    path, body, kind = POSTED[name]
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert_lossless(answer.json(), kind)


@pytest.mark.parametrize("name", STREAMED)
def test_behaviour_63_events_are_of_the_clients_types(http: httpx.Client, name: str) -> None:
    path, body, kind = STREAMED[name]
    with http.stream("POST", path, json=body | {"stream": True}) as answer:
        found = events(answer.iter_lines())
    assert len(found) > 2
    for event in found:
        if kind is Completion:  # its parts have null before the end, as OpenAI's have, which the type does not know
            for choice in event["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        assert_lossless(event, kind)


def test_behaviour_63_models_files_and_batches(http: httpx.Client) -> None:
    [model] = http.get("/v1/models").json()["data"]
    assert_lossless({name: model[name] for name in model if name != "max_model_len"}, Model)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": COMPLETION}
    upload = {"file": ("lines.jsonl", json.dumps(line).encode())}
    file = http.post("/v1/files", files=upload, data={"purpose": "batch"}).json()
    assert_lossless(file, FileObject)
    order = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert_lossless(http.post("/v1/batches", json=order).json(), Batch)


def test_behaviour_63_embeddings(tmp_path) -> None:
    service, _ = rows_service(tmp_path)
    with running(service) as (base, _):
        for more in ({}, {"encoding_format": "float"}):
            answer = httpx.post(f"{base}/v1/embeddings", json={"input": ["one", "two"], "model": "fake"} | more)
            assert_lossless(answer.json(), CreateEmbeddingResponse)
