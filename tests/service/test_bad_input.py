"""Every bad input has its typed answer, and the server answers the next request."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import pytest

from tests.service.fakes import MAX_LEN, VOCAB, wait_for

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def completion(**fields) -> bytes:
    return json.dumps({"model": "fake", "prompt": "hi"} | fields).encode()


def chat(**fields) -> bytes:
    return json.dumps({"model": "fake", "messages": SAY} | fields).encode()


def slots(type: str = "literal", value: str = "a", **fields) -> bytes:
    return json.dumps({"prompt": "a b a", "selector": {"type": type, "value": value}} | fields).encode()


def deep(levels: int) -> bytes:
    return b'{"messages":[],"chat_template_kwargs":' + b'{"a":' * levels + b"1" + b"}" * levels + b"}"


CASES = {
    # name: (route, body, status, code, param)
    "malformed JSON": (COMPLETIONS, b'{"prompt": "hi"', 400, "invalid_json", None),
    "empty body": (COMPLETIONS, b"", 400, "invalid_json", None),
    "not an object": (COMPLETIONS, b"[1]", 400, "invalid_request", None),
    "duplicate key": (COMPLETIONS, b'{"prompt":"a","prompt":"b"}', 400, "invalid_json", "prompt"),
    "too deep": (CHAT, deep(70), 400, "invalid_json", None),
    "far too deep": (CHAT, deep(100_000), 400, "invalid_json", None),
    "invalid UTF-8": (COMPLETIONS, b'{"prompt":"\xff\xfe"}', 400, "invalid_json", None),
    "UTF-16": (COMPLETIONS, '{"prompt":"a"}'.encode("utf-16"), 400, "invalid_json", None),
    "lone surrogate": (COMPLETIONS, b'{"prompt":"\\ud800"}', 400, "invalid_json", "prompt"),
    "surrogate in a message": (CHAT, chat(messages=[{"role": "user", "content": "\udfff"}]), 400, "invalid_json", None),
    "huge integer": (COMPLETIONS, completion(max_tokens=10**30), 400, "context_length_exceeded", "max_tokens"),
    "endless integer": (COMPLETIONS, b'{"prompt":"a","n":' + b"9" * 5000 + b"}", 400, "invalid_json", None),
    "fractional integer": (COMPLETIONS, completion(max_tokens=1.5), 400, "invalid_type", "max_tokens"),
    "NaN temperature": (COMPLETIONS, completion(temperature=float("nan")), 400, "invalid_request", "temperature"),
    "infinite temperature": (CHAT, b'{"temperature":1e999}', 400, "invalid_request", "temperature"),
    "huge temperature": (CHAT, chat(temperature=10**400), 400, None, "temperature"),
    "wrong type": (COMPLETIONS, completion(temperature="hot"), 400, "invalid_type", "temperature"),
    "wrong prompt": (COMPLETIONS, completion(prompt={"a": 1}), 400, "invalid_type", "prompt"),
    "mixed prompt": (COMPLETIONS, completion(prompt=["a", 1]), 400, "invalid_type", "prompt"),
    "boolean token": (COMPLETIONS, completion(prompt=[True]), 400, "invalid_type", "prompt[0]"),
    "no prompt": (COMPLETIONS, b'{"model":"fake"}', 400, "missing_parameter", "prompt"),
    "empty prompt": (COMPLETIONS, completion(prompt=""), 400, "empty_prompt", "prompt"),
    "empty ids": (COMPLETIONS, completion(prompt=[]), 400, "empty_prompt", "prompt"),
    "one empty prompt": (COMPLETIONS, completion(prompt=["a", ""]), 400, "empty_prompt", "prompt[1]"),
    "unknown field": (COMPLETIONS, completion(temprature=1), 400, "unknown_parameter", "temprature"),
    "unknown nested field": (CHAT, chat(stream=True, stream_options={"x": 1}), 400, "unknown_parameter", None),
    "empty salt": (COMPLETIONS, completion(cache_salt=""), 400, "invalid_request", "cache_salt"),
    "long salt": (CHAT, chat(cache_salt="s" * 257), 400, "invalid_request", "cache_salt"),
    "salt of another type": (CHAT, chat(cache_salt=7), 400, "invalid_type", "cache_salt"),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), 400, "missing_parameter", "tools[0].function"),
    "response_format": (CHAT, chat(response_format={"type": "xml"}), 400, "unsupported_parameter", None),
    "guided_json": (CHAT, chat(guided_json={"type": "object"}), 400, "unsupported_parameter", "guided_json"),
    "client template": (CHAT, chat(chat_template="{{ 1 }}"), 400, "unsupported_parameter", "chat_template"),
    "tool calls": (CHAT, chat(messages=[{"role": "assistant", "tool_calls": [1]}]), 400, "invalid_type", None),
    "unknown model": (COMPLETIONS, completion(model="gpt"), 404, "model_not_found", "model"),
    "prompt too long": (COMPLETIONS, completion(prompt="x" * MAX_LEN), 400, "context_length_exceeded", "prompt"),
    "far too long": (COMPLETIONS, completion(prompt="x" * 2_000_000), 400, "context_length_exceeded", "prompt"),
    "chat too long": (CHAT, chat(messages=SAY * MAX_LEN), 400, "context_length_exceeded", "messages"),
    "max_tokens": (COMPLETIONS, completion(max_tokens=MAX_LEN), 400, "context_length_exceeded", "max_tokens"),
    "max_tokens 0": (COMPLETIONS, completion(max_tokens=0), 400, "invalid_request", "max_tokens"),
    "two lengths": (CHAT, chat(max_tokens=1, max_completion_tokens=2), 400, "invalid_request", "max_completion_tokens"),
    "token out of range": (COMPLETIONS, completion(prompt=[1, VOCAB]), 400, "token_out_of_range", "prompt[1]"),
    "negative token": (COMPLETIONS, completion(prompt=[-1]), 400, "token_out_of_range", "prompt[0]"),
    "huge token": (COMPLETIONS, completion(prompt=[10**40]), 400, "token_out_of_range", "prompt[0]"),
    "bias out of range": (COMPLETIONS, completion(logit_bias={"9999": 1}), 400, "token_out_of_range", "logit_bias"),
    "bias key": (COMPLETIONS, completion(logit_bias={"x": 1}), 400, "token_out_of_range", "logit_bias"),
    "bias too large": (COMPLETIONS, completion(logit_bias={"1": 101}), 400, "invalid_request", "logit_bias.1"),
    "stop id out of range": (COMPLETIONS, completion(stop_token_ids=[VOCAB]), 400, "invalid_request", None),
    "empty messages": (CHAT, chat(messages=[]), 400, "invalid_request", "messages"),
    "no messages": (CHAT, b'{"model":"fake"}', 400, "missing_parameter", "messages"),
    "role": (CHAT, chat(messages=[{"role": "boss", "content": "x"}]), 400, "invalid_request", "messages[0].role"),
    "no content": (CHAT, chat(messages=[{"role": "user"}]), 400, "invalid_request", "messages[0].content"),
    "image": (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, None, None),
    "part without text": (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, None, None),
    "huge n": (COMPLETIONS, completion(n=100_000), 400, "invalid_request", "n"),
    "n 0": (CHAT, chat(n=0), 400, "invalid_request", "n"),
    "prompts times n": (COMPLETIONS, completion(prompt=["a"] * 100, n=100), 400, "invalid_request", "n"),
    "best_of": (COMPLETIONS, completion(n=2, best_of=1), 400, "invalid_request", "best_of"),
    "best_of of a stream": (CHAT, chat(best_of=2, stream=True), 400, "invalid_request", "best_of"),
    "best_of times prompts": (COMPLETIONS, completion(prompt=["a"] * 65, best_of=2), 400, None, "best_of"),
    "blank bad word": (COMPLETIONS, completion(bad_words=["a", " "]), 400, "invalid_request", "bad_words[1]"),
    "no allowed id": (CHAT, chat(allowed_token_ids=[]), 400, "invalid_request", "allowed_token_ids"),
    "allowed id": (CHAT, chat(allowed_token_ids=[1, VOCAB]), 400, "invalid_request", "allowed_token_ids[1]"),
    "prompt_logprobs": (COMPLETIONS, completion(prompt_logprobs=21), 400, "invalid_request", "prompt_logprobs"),
    "a stream's prompt": (CHAT, chat(prompt_logprobs=1, stream=True), 400, None, "prompt_logprobs"),
    "logprobs_mode": (COMPLETIONS, completion(logprobs_mode="odd"), 400, "invalid_request", "logprobs_mode"),
    "five stops": (COMPLETIONS, completion(stop=list("abcde")), 400, "invalid_request", "stop"),
    "empty stop": (COMPLETIONS, completion(stop=""), 400, "invalid_request", "stop"),
    "frequency 2.1": (COMPLETIONS, completion(frequency_penalty=2.1, stream=True), 400, None, "frequency_penalty"),
    "repetition 0": (COMPLETIONS, completion(repetition_penalty=0), 400, None, "repetition_penalty"),
    "top_p": (COMPLETIONS, completion(top_p=1.5), 400, "invalid_request", "top_p"),
    "seed": (COMPLETIONS, completion(seed=2**63), 400, "invalid_request", "seed"),
    "min_tokens": (COMPLETIONS, completion(max_tokens=2, min_tokens=3), 400, "invalid_request", "min_tokens"),
    "echo and logprobs": (COMPLETIONS, completion(echo=True, logprobs=1), 400, "unsupported_parameter", "logprobs"),
    "logprobs": (COMPLETIONS, completion(logprobs=21), 400, "invalid_request", "logprobs"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=2), 400, "invalid_request", "top_logprobs"),
    "usage without a stream": (CHAT, chat(stream_options={}), 400, "invalid_request", "stream_options"),
    "template that loops": (CHAT, chat(chat_template_kwargs={"loops": 99_999}), 400, "template_error", None),
    "template without end": (CHAT, chat(chat_template_kwargs={"loops": 10**12}), 400, "template_error", None),
    "template argument": (CHAT, chat(chat_template_kwargs={"messages": []}), 400, "invalid_request", None),
    "selector type": ("/v1/sample", slots(type="regex"), 400, "invalid_request", "selector.type"),
    "selector of two tokens": ("/v1/sample", slots(value="ab"), 400, "invalid_request", "selector.value"),
    "empty selector": ("/v1/sample", slots(value=""), 400, "invalid_request", "selector.value"),
    "no selector": ("/v1/sample", b'{"prompt":"a"}', 400, "missing_parameter", "selector"),
    "logprobs of slots": ("/v1/sample", slots(logprobs=6), 400, "invalid_request", "logprobs"),
    "rows of a generator": ("/v1/embeddings", b'{"input":"a"}', 400, "wrong_task", None),
    "rerank by a generator": ("/rerank", b'{"query":"a","documents":["b"]}', 400, "wrong_task", None),
    "10 MB": (COMPLETIONS, completion(prompt="x" * 10_000_000), 413, "body_too_large", None),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_has_a_typed_answer_and_the_server_lives(http, served, case):
    route, body, status, code, param = CASES[case]
    answer = http.post(route, content=body, headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["message"]
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    assert error["request_id"] == answer.headers["x-request-id"]
    assert http.post(COMPLETIONS, content=completion(), headers=JSON).json()["choices"][0]["text"] == "hi"
    wait_for(lambda: not served[1].front.concurrent and not served[1].dispatcher.live)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"stop": list("abcde")}, "stop"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
    ],
)
def test_behaviour_52_values_no_request_can_have_are_400_with_their_field(http, fields, param, stream):
    answer = http.post(COMPLETIONS, content=completion(stream=stream, **fields), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_values_that_ask_for_nothing_are_honoured(http):
    body = chat(tools=None, tool_choice="none", response_format={"type": "text"}, temperature=None, store=False)
    assert http.post(CHAT, content=body, headers=JSON).status_code == 200


def test_both_numbers_are_in_the_message(http):
    error = http.post(COMPLETIONS, content=completion(max_tokens=5000), headers=JSON).json()["error"]
    assert "5000" in error["message"]
    assert str(MAX_LEN) in error["message"]
    assert error["hint"]["fix"]


def test_unknown_routes_methods_and_media_types(http):
    assert http.get("/nowhere").json()["error"]["code"] == "unknown_route"
    wrong = http.get(COMPLETIONS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    other = http.post("/health")
    assert (other.status_code, other.headers["allow"]) == (405, "GET, HEAD")
    assert (http.head("/health").status_code, http.head("/health").content) == (200, b"")
    assert http.get("/v1/models/").json()["error"]["code"] == "model_not_found"
    plain = http.post(COMPLETIONS, content=completion(), headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["error"]["code"]) == (415, "unsupported_media_type")
    zipped = http.post(COMPLETIONS, content=b"x", headers=JSON | {"content-encoding": "gzip"})
    assert zipped.status_code == 415


def test_a_body_without_a_length_is_bounded_too(http):
    def pieces():
        for _ in range(200):
            yield b" " * 65536

    answer = http.post(COMPLETIONS, content=pieces(), headers=JSON)
    assert answer.status_code == 413


def raw(base: str, data: bytes) -> bytes:
    parts = urlsplit(base)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def test_headers_are_bounded_and_garbage_is_refused(http, served):
    header = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"
    assert raw(served[0], header).startswith(b"HTTP/1.1 400")
    assert raw(served[0], b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert http.get("/health").status_code == 200


def test_request_ids_are_echoed_when_they_are_harmless(http):
    assert http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/health", headers={"x-request-id": 'a"b c'}).headers["x-request-id"].startswith("req-")
