"""A running server is controlled: real processes, and every answer is what an undisturbed one gives."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models import FAMILIES, build
from tests.servers import Server, serving
from xllm.compiler import CompileOptions

ADMIN = {"x-api-key": "root"}
ONE, TWO = {"x-api-key": "one"}, {"authorization": "Bearer two"}
LONG = {"model": "tiny", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    config = {**FAMILIES["qwen3"], "max_position_embeddings": 8192}
    build(folder, config, options=CompileOptions(max_len=8192, max_seqs=8))
    (folder / "keys").write_text("one\ntwo\n")
    (folder / "admins").write_text("root\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admins"))
    with serving(folder / "tiny.xllm", "--memory", "512MiB", *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=ADMIN, timeout=60) as http:
        yield http
        assert http.post("/resume").status_code == 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def ask(client: httpx.Client, prompt: str, headers: dict[str, str] = ONE, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json=LONG | {"prompt": prompt} | fields, headers=headers)


def metric(client: httpx.Client, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in client.get("/metrics").text.splitlines()
        if line.split("{")[0].split(" ")[0] == name
    )


def wait_for(client: httpx.Client, name: str, value: float) -> None:
    end = time.monotonic() + 30
    while metric(client, name) != value and time.monotonic() < end:
        time.sleep(0.02)
    assert metric(client, name) == value


def running(
    client: httpx.Client, pool: ThreadPoolExecutor, prompts: str, **fields: Any
) -> list[Future[httpx.Response]]:
    """Long answers that are all being generated."""
    asked = [pool.submit(ask, client, prompt, **fields) for prompt in prompts]
    wait_for(client, "num_running_requests", len(prompts))
    return asked


def test_pause_keep_and_resume_give_the_same_text(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    expected = [ask(client, prompt).json()["choices"] for prompt in "ab"]
    free = metric(client, "num_free_blocks")
    asked = running(client, pool, "ab")
    assert client.post("/pause", json={}).json() == {"status": "paused", "changed": True}
    assert metric(client, "num_running_requests") == 0 and metric(client, "num_waiting_requests") == 2
    assert metric(client, "num_free_blocks") == free
    assert client.post("/pause").json() == {"status": "paused", "changed": False}
    late = pool.submit(ask, client, "c", max_tokens=2)
    wait_for(client, "num_waiting_requests", 3)
    assert not any(answer.done() for answer in (*asked, late))
    assert client.post("/resume").json() == {"status": "running", "changed": True}
    assert client.post("/resume").json() == {"status": "running", "changed": False}
    assert [answer.result().json()["choices"] for answer in asked] == expected
    assert late.result().status_code == 200


def test_pause_abort_and_pause_wait(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    asked = running(client, pool, "ab", max_tokens=8000)
    assert client.post("/pause", json={"mode": "abort"}).json()["status"] == "paused"
    for answer in asked:
        assert answer.result().status_code == 499
        assert answer.result().json()["error"]["code"] == "request_aborted"
    assert metric(client, "num_waiting_requests") == 0
    client.post("/resume")
    [answer] = running(client, pool, "a")
    assert client.post("/pause", json={"mode": "wait"}).json()["status"] == "paused"
    assert answer.result().json()["usage"]["completion_tokens"] == 1500


def test_orders_that_make_no_sense_are_refused_by_the_field(client: httpx.Client) -> None:
    for body, code, param in (
        ({"mode": "nap"}, "invalid_type", "mode"),
        ({"until": 3}, "unknown_parameter", "until"),
        ({"model_id": "other"}, "model_not_found", "model"),
        ([], "invalid_request", None),
    ):
        answer = client.post("/pause", json=body)
        assert answer.status_code in (400, 404) and answer.json()["error"]["code"] == code
        assert answer.json()["error"]["param"] == param
    assert metric(client, "num_running_requests") == 0 and ask(client, "a", max_tokens=1).status_code == 200


def test_a_request_is_aborted_by_who_asked_or_an_admin(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    def named(name: str, headers: dict[str, str]) -> Future[httpx.Response]:
        return pool.submit(ask, client, name, headers | {"x-request-id": name}, max_tokens=8000)

    def abort(headers: dict[str, str], **body: Any) -> tuple[int, Any]:
        answer = client.post("/abort", json=body, headers=headers)
        return answer.status_code, answer.json().get("aborted", answer.json().get("error", {}).get("code"))

    first, second, third, fourth = named("a", ONE), named("b", ONE), named("c", TWO), named("d", TWO)
    wait_for(client, "num_running_requests", 4)
    assert abort(TWO, request_id="a") == (404, "request_not_found")
    assert abort(ONE, request_id="a") == (200, 1)
    assert first.result().status_code == 499 and first.result().json()["error"]["type"] == "cancelled"
    assert abort(ADMIN, request_id="c") == (200, 1) and third.result().status_code == 499
    assert abort(ONE, all=True) == (200, 1) and second.result().status_code == 499
    assert abort(ONE) == (400, "missing_parameter") == abort(ONE, request_id="d", all=True)
    assert not fourth.done() and abort(ADMIN, all=True) == (200, 1) and fourth.result().status_code == 499
    wait_for(client, "num_running_requests", 0)


def test_a_stream_is_aborted_by_the_id_of_its_answer(client: httpx.Client) -> None:
    with client.stream(
        "POST", "/v1/completions", json=LONG | {"prompt": "a", "stream": True, "max_tokens": 8000}
    ) as answer:
        lines = answer.iter_lines()
        name = httpx.Response(200, content=next(lines).removeprefix("data: ")).json()["id"]
        assert client.post("/abort", json={"request_id": name}).json() == {"aborted": 1}
        rest = [line for line in lines if line]
    assert '"code":"request_aborted"' in rest[-2] and rest[-1] == "data: [DONE]"
    assert client.post("/abort", json={"request_id": name}).status_code == 404


def test_who_waits_in_a_pause_is_answered_before_the_server_ends(folder: Path, pool: ThreadPoolExecutor) -> None:
    flags = ("--memory", "512MiB", "--admin-key-file", str(folder / "admins"))
    with (
        serving(folder / "tiny.xllm", *flags) as alone,
        httpx.Client(base_url=alone.url, headers=ADMIN, timeout=60) as client,
    ):
        [answer] = running(client, pool, "a")
        client.post("/pause")
        alone.process.terminate()
        assert answer.result().json()["usage"]["completion_tokens"] == 1500
        assert alone.process.wait(20) == 0
