"""Files and batches through the official client: what is kept, who may see it, how a batch ends, what it refuses."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai.types import Batch as ClientBatch

from tests.service.fakes import fake, fake_service, ids, rows_service, running, wait_for
from xllm.service.batches import LINES, Batches
from xllm.service.endpoint import Limits, Service
from xllm.service.files import Form
from xllm.service.gate import Keys
from xllm.service.shelf import Files

CHAT = "/v1/chat/completions"


def line(name: str, **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"say {name}"}]}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body, **changes}


def lines(*items: dict[str, Any] | str) -> bytes:
    return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in items).encode()


@contextmanager
def serving(service: Service, state: Path, keys: Keys | None = None) -> Iterator[str]:
    """The base URL of a server that keeps its files in `state`."""
    service.batches = Batches(Files(state))
    try:
        with running(service, keys) as (base, _):
            yield base
    finally:
        service.batches.files.close()


def client_of(base: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=30)


def begin(client: openai.OpenAI, data: bytes, endpoint: Any = CHAT) -> ClientBatch:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def end(client: openai.OpenAI, batch: ClientBatch) -> ClientBatch:
    ends = ("completed", "failed", "expired", "cancelled")
    wait_for(lambda: client.batches.retrieve(batch.id).status in ends)
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, name: str | None) -> dict[str, Any]:
    """The lines of a file by their custom_id, each there once."""
    assert name is not None
    found = [json.loads(data) for data in client.files.content(name).text.splitlines()]
    by_id = {item["custom_id"]: item for item in found}
    assert len(by_id) == len(found)
    return by_id


def test_files_are_kept_listed_and_deleted(tmp_path):
    service = fake_service(tmp_path)
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        data = os.urandom(300_000)
        names = [client.files.create(file=(f"../{at}.jsonl", data), purpose="batch").id for at in range(3)]
        info = client.files.retrieve(names[0])
        assert (info.filename, info.bytes, info.purpose, info.status) == ("../0.jsonl", 300_000, "batch", "processed")
        assert client.files.content(names[1]).content == data
        assert [info.id for info in client.files.list(limit=2)] == names[::-1], "the client asks for the second page"
        assert [info.id for info in client.files.list(order="asc", after=names[0])] == names[1:]
        assert client.files.delete(names[1]).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as gone:
                call(names[1])
            assert gone.value.code == "file_not_found"
    with serving(fake_service(tmp_path), tmp_path / "state") as base, client_of(base) as client:
        assert [info.id for info in client.files.list()] == [names[2], names[0]]
        assert client.files.content(names[2]).content == data
    kept = sorted(file.name for file in (tmp_path / "state" / "files" / "open").iterdir())
    assert kept == sorted(f"{name}.{kind}" for name in (names[0], names[2]) for kind in ("data", "json"))


def test_a_batch_answers_each_line_as_its_route_does(tmp_path):
    service = fake_service(tmp_path)
    wrong = line("wrong", body={"messages": [{"role": "user", "content": "x"}], "temperature": 9})
    asked = [line(f"n{at}") for at in range(40)]
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        batch = end(client, begin(client, lines(*asked, "", wrong)))
        assert batch.status == "completed" and batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (41, 40, 1)
        answers = results(client, batch.output_file_id)
        assert answers.keys() == {item["custom_id"] for item in asked}
        for item in asked:
            response = answers[item["custom_id"]]["response"]
            alone = httpx.post(f"{base}{CHAT}", json=item["body"]).json()
            assert response["status_code"] == 200 and response["body"]["choices"] == alone["choices"]
            assert response["body"]["usage"] == alone["usage"]
        [failed] = results(client, batch.error_file_id).values()
        assert failed["custom_id"] == "wrong" and failed["response"]["status_code"] == 400
        assert failed["response"]["body"]["error"]["param"] == "temperature"
        assert [held.id for held in client.batches.list(limit=1)] == [batch.id]
        assert service.front.concurrent == 0

        completion = line("c", url="/v1/completions", body={"prompt": "abc"})
        other = end(client, begin(client, lines(completion), "/v1/completions"))
        assert results(client, other.output_file_id)["c"]["response"]["body"]["choices"][0]["text"] == "abc"
        response = line("r", url="/v1/responses", body={"input": "abc"})
        other = end(client, begin(client, lines(response), "/v1/responses"))
        stored = results(client, other.output_file_id)["r"]["response"]["body"]
        assert client.responses.retrieve(stored["id"]).output_text == stored["output"][0]["content"][0]["text"]


def test_embeddings_in_batches(tmp_path):
    service, _ = rows_service(tmp_path)
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        asked = [line(f"e{at}", url="/v1/embeddings", body={"input": "a" * at}) for at in range(1, 30)]
        batch = end(client, begin(client, lines(*asked), "/v1/embeddings"))
        found = results(client, batch.output_file_id)
        for item in asked:
            [row] = found[item["custom_id"]]["response"]["body"]["data"]
            assert row["embedding"][1] == len(item["body"]["input"])
        with pytest.raises(openai.BadRequestError) as wrong:
            begin(client, lines(line("a")))
        assert wrong.value.code == "wrong_task"


BAD_LINES = {
    "invalid_json_line": ("{", None),
    "invalid_request": (json.dumps(line("x", more=1)), None),
    "duplicate_custom_id": (json.dumps(line("a")), "custom_id"),
    "mismatched_endpoint": (json.dumps(line("y", url="/v1/nothing")), "url"),
    "invalid_method": (json.dumps(line("z", method="GET")), "method"),
    "unsupported_parameter": (json.dumps(line("w", body={"stream": True})), "body.stream"),
    "line_too_large": (json.dumps(line("x" * 4000)), None),
}


def test_what_is_wrong_with_a_file_is_named_by_its_line(tmp_path):
    service = fake_service(tmp_path, Limits(max_body_bytes=2000))
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        data = lines(line("a"), "", *(text for text, _ in BAD_LINES.values()), line("b"))
        batch = end(client, begin(client, data))
        assert batch.status == "failed" and batch.errors is not None and batch.output_file_id is None
        found = [(error.code, error.line, error.param) for error in batch.errors.data or []]
        assert found == [(code, at, param) for at, (code, (_, param)) in enumerate(BAD_LINES.items(), 3)]
        assert all((error.message or "").startswith(f"line {error.line}: ") for error in batch.errors.data or [])
        assert "line 1" in str((batch.errors.data or [])[2].message)
        assert not fake(service).seen
        empty = end(client, begin(client, b"\n\n"))
        assert empty.errors is not None and [error.code for error in empty.errors.data or []] == ["empty_file"]


def test_what_is_wrong_with_a_request_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.files.MAX_FILE_BYTES", 100_000)
    service = fake_service(tmp_path)
    with serving(service, tmp_path / "state") as base, httpx.Client(base_url=base) as http:
        held = http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"}).json()["id"]

        def refused(status: int, code: str, param: str | None, path: str = "/v1/files", **request: Any) -> None:
            answer = http.request(request.pop("method", "POST"), path, **request)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (status, code, param)

        form = {"file": ("a.jsonl", b"{}")}
        refused(413, "file_too_large", "file", files={"file": b"x" * 200_000}, data={"purpose": "batch"})
        refused(413, "file_too_large", "file", files={"file": b"x" * 100_001}, data={"purpose": "batch"})
        refused(400, "invalid_request", "purpose", files=form, data={"purpose": "fine-tune"})
        refused(400, "missing_parameter", "purpose", files=form)
        refused(400, "missing_parameter", "file", files={"purpose": (None, "batch")})
        refused(400, "empty_file", "file", files={"file": b""}, data={"purpose": "batch"})
        refused(
            400, "unsupported_parameter", "expires_after[seconds]", files=form, data={"expires_after[seconds]": "1"}
        )
        refused(400, "unsupported_parameter", "file", files=[("file", b"a"), ("file", b"b")])
        refused(400, "invalid_request", "purpose", files=form, data={"purpose": "x" * 2000})
        refused(415, "unsupported_media_type", None, json={"purpose": "batch"})
        kind = {"content-type": "multipart/form-data; boundary=b"}
        refused(400, "invalid_multipart", None, headers=kind, content=b"nothing of the kind")
        cut = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nabc'
        refused(400, "invalid_multipart", None, headers=kind, content=cut)
        refused(403, "other_site", None, files=form, headers={"sec-fetch-site": "cross-site"})
        refused(400, "invalid_request", "limit", "/v1/files?limit=0", method="GET")
        refused(400, "invalid_request", "sort", "/v1/files?sort=up", method="GET")
        refused(404, "file_not_found", None, "/v1/files/lock", method="GET")
        refused(404, "unknown_route", None, "/v1/files/..%2f..%2flock", method="GET")

        good = {"input_file_id": held, "endpoint": CHAT, "completion_window": "24h"}
        for change, status, code, param in (
            ({"endpoint": "/v1/score"}, 400, "invalid_request", "endpoint"),
            ({"completion_window": "1h"}, 400, "invalid_type", "completion_window"),
            ({"input_file_id": "file-x"}, 404, "file_not_found", "input_file_id"),
            ({"metadata": {"a": "b" * 600}}, 400, "invalid_request", "metadata"),
            ({"output_expires_after": {"seconds": 1}}, 400, "unsupported_parameter", "output_expires_after"),
        ):
            refused(status, code, param, "/v1/batches", json=good | change)
        refused(404, "batch_not_found", None, "/v1/batches/batch_x/cancel")
        left = {file.suffix for file in (tmp_path / "state").rglob("file-*")}
        assert left == {".data", ".json"} and len(http.get("/v1/files").json()["data"]) == 1


def test_a_form_may_come_in_any_pieces(tmp_path):
    head = b'--cut\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
    data = b"one\r\n--cu, and no boundary\r\n--cu"
    form = head % b"purpose" + b"batch\r\n" + head % b'file"; filename="a b.jsonl' + data + b"\r\n--cut--\r\n"
    for size in (1, 2, 7, 64, len(form)):
        part = tmp_path / f"{size}.part"
        read = Form(b"cut", part)
        for begin in range(0, len(form), size):
            read.push(form[begin : begin + size])
        read.close()
        read.check()
        assert (read.purpose, read.filename, part.read_bytes()) == ("batch", "a b.jsonl", data)


def test_what_is_kept_and_open_has_limits_and_an_upload_that_ends_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.shelf.MAX_FILES", 2)
    monkeypatch.setattr("xllm.service.batches.MAX_OPEN", 1)
    service = fake_service(tmp_path)
    fake(service).paused = True
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        batch = begin(client, lines(line("a")))
        with pytest.raises(openai.RateLimitError):
            begin(client, lines(line("b")))
        with pytest.raises(openai.APIStatusError) as full:
            client.files.create(file=b"c", purpose="batch")
        assert (full.value.status_code, full.value.code) == (413, "no_room")
        fake(service).paused = False
        batch = end(client, batch)
        client.files.delete(batch.input_file_id)
        client.files.delete(str(batch.output_file_id))
        parts = urlsplit(base)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
            form = '--b\r\ncontent-disposition: form-data; name="file"\r\n\r\nhalf'
            connection.sendall(f"{head}content-length: 1000\r\n\r\n{form}".encode())
            wait_for(lambda: list((tmp_path / "state").rglob("*.part")))
        wait_for(lambda: not list((tmp_path / "state").rglob("*.part")))
        wait_for(lambda: service.front.concurrent == 0)
        assert len(client.files.list().data) == 1


def test_each_key_has_its_own(tmp_path):
    service = fake_service(tmp_path)
    with (
        serving(service, tmp_path / "state", Keys(["one", "two"])) as base,
        client_of(base, "one") as one,
        client_of(base, "two") as two,
    ):
        batch = end(one, begin(one, lines(line("a"))))
        assert {request.cache_salt for request in fake(service).seen} != {""}
        assert not two.files.list().data and not two.batches.list().data
        for call, name in (
            (two.files.content, batch.output_file_id),
            (two.files.delete, batch.input_file_id),
            (two.batches.retrieve, batch.id),
            (two.batches.cancel, batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                call(str(name))
        assert len(one.files.list().data) == 2


def test_a_cancelled_batch_keeps_what_it_has(tmp_path):
    service = fake_service(tmp_path, reply=lambda request: ids("x") if len(request.prompt) % 2 else [257], tick=0.005)
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        odd = [line(f"o{at}", body={"messages": [{"role": "user", "content": "x" * (at % 2)}]}) for at in range(100)]
        batch = begin(client, lines(*odd))
        wait_for(lambda: service.engine.stats().running == LINES)
        with pytest.raises(openai.ConflictError) as used:
            client.files.delete(batch.input_file_id)
        assert used.value.code == "file_in_use"
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = end(client, batch)
        assert batch.status == "cancelled" and batch.request_counts is not None
        assert 0 < batch.request_counts.completed == len(results(client, batch.output_file_id)) < 100
        wait_for(lambda: service.engine.stats().running == 0)
        assert client.batches.cancel(batch.id).status == "cancelled"
        done = end(client, begin(client, lines(odd[0])))
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(done.id)


def test_a_batch_that_is_not_done_in_time_says_so_of_each_line(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.batches.WINDOW_SECONDS", 1)
    service = fake_service(tmp_path, reply=lambda request: ids("x") if len(request.prompt) % 2 else [257], tick=0.005)
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        asked = [line(f"o{at}", body={"messages": [{"role": "user", "content": "x" * (at % 2)}]}) for at in range(50)]
        batch = end(client, begin(client, lines(*asked)))
        assert batch.status == "expired" and batch.request_counts is not None
        failed = results(client, batch.error_file_id)
        assert batch.request_counts.failed == len(failed) == 50 - batch.request_counts.completed > LINES
        assert {item["error"]["code"] for item in failed.values()} == {"batch_expired"}
        wait_for(lambda: service.engine.stats().running == 0)


def test_a_line_starts_only_while_no_client_waits_and_is_asked_again_when_there_is_no_room(tmp_path):
    service = fake_service(tmp_path, reply=lambda request: ids("x"), tick=0.002)
    engine, stats = fake(service), service.engine.stats
    waiting = [1]
    engine.stats = lambda: replace(stats(), waiting=waiting[0])
    with serving(service, tmp_path / "state") as base, client_of(base) as client, ThreadPoolExecutor(1) as other:
        online = other.submit(client.completions.create, model="fake", prompt="x", max_tokens=200)
        wait_for(lambda: engine.seen)
        asked = [
            line(f"n{at}", body={"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}) for at in range(9)
        ]
        batch = begin(client, lines(*asked))
        wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        before = engine.generated
        wait_for(lambda: engine.generated > before + 30)
        assert len(engine.seen) == 1
        engine._queue_limit = 0
        online.result()  # nobody waits for anything: lines are asked, and refused
        wait_for(lambda: service.front.concurrent == 0)
        waiting[0], engine._queue_limit = 0, 3
        batch = end(client, batch)
        assert batch.request_counts is not None and batch.request_counts.completed == 9


def test_a_server_without_a_folder_says_so(tmp_path):
    with running(fake_service(tmp_path)) as (base, _):
        for method, path in (("GET", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches/batch_x")):
            error = httpx.request(method, base + path).json()["error"]
            assert error["code"] == "no_state_dir" and "--state-dir" in error["hint"]["knob"]
        assert not [
            path
            for path in httpx.get(f"{base}/openapi.json").json()["paths"]
            if "/v1/batch" in path or "/v1/file" in path
        ]
