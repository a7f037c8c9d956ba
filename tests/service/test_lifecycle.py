"""What happens around an answer: keys, limits, clients that leave or don't read, failures, the end of the server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.service.fakes import EOS, fake, fake_service, ids, running, wait_for
from xllm.service.endpoint import Limits
from xllm.service.gate import PAGE, PUBLIC, Keys

COMPLETIONS = "/v1/completions"
JSON = "content-type: application/json\r\n"
ENDLESS = {"model": "fake", "prompt": "abc", "max_tokens": 2000, "ignore_eos": True, "stream": True}


def ask(base: str, path: str = COMPLETIONS, **fields) -> httpx.Response:
    return httpx.post(base + path, json={"model": "fake", "prompt": "hi"} | fields, timeout=30)


def events(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def raw_request(base: str, body: dict, receive_buffer: int | None = None, route: str = COMPLETIONS) -> socket.socket:
    parts = urlsplit(base)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((parts.hostname, parts.port))
    data = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_behaviour_62_every_route_needs_a_key_unless_it_is_public(tmp_path):
    with running(fake_service(tmp_path), Keys(["one", "two"])) as (base, server):
        app: Any = server.config.app
        routes = [(method, path) for path, (_, methods) in app._app.table.items() for method in methods]
        assert len(routes) > 10
        with httpx.Client(base_url=base) as client:
            for method, path in [*routes, ("GET", "/nowhere"), ("POST", "/health"), ("GET", "/docs")]:
                for headers in (
                    {},
                    {"authorization": "Bearer three"},
                    {"x-api-key": "on"},
                    {"authorization": "Basic one"},
                ):
                    answer = client.request(method, path, headers=headers)
                    public = path in (*PUBLIC, *PAGE) and method in ("GET", "HEAD")
                    assert answer.status_code == (200 if public else 401), (method, path)
            for headers in ({"authorization": "Bearer one"}, {"x-api-key": "two"}, {"authorization": "bearer two"}):
                assert client.get("/v1/models", headers=headers).status_code == 200
            error = client.get("/v1/models").json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "missing_api_key")


def test_a_thousand_clients_that_leave_mid_stream(tmp_path):
    service = fake_service(tmp_path, tick=0.001)

    async def leave(base: str, gate: asyncio.Semaphore, after: int) -> None:
        parts = urlsplit(base)
        body = json.dumps(ENDLESS | {"n": 1 + after % 2}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: {len(body)}\r\n\r\n".encode()
        async with gate:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(head + body)
            await reader.readuntil(b"data: ")
            for _ in range(after % 5):
                await reader.readuntil(b"\n\n")
            writer.transport.abort()

    async def all_leave(base: str) -> None:
        gate = asyncio.Semaphore(50)
        await asyncio.gather(*(leave(base, gate, after) for after in range(1000)))

    with running(service) as (base, server):
        asyncio.run(all_leave(base))
        wait_for(lambda: service.front.concurrent == 0)
        assert service.engine.stats().running == 0
        assert service.engine.stats().free_pages == 100
        assert fake(service).cancelled == 1500
        assert service.dispatcher.live == 0
        assert service.front.statuses["cancelled"] == 1000
        wait_for(lambda: not server.server_state.tasks and not server.server_state.connections)
        assert ask(base).json()["choices"][0]["text"] == "hi"


def test_a_client_that_leaves_before_the_answer_is_whole(tmp_path):
    service = fake_service(tmp_path, tick=0.001)
    with running(service) as (base, _):
        connection = raw_request(base, ENDLESS | {"stream": False})
        wait_for(lambda: service.engine.stats().running == 1)
        connection.close()
        wait_for(lambda: service.engine.stats().running == 0)
        wait_for(lambda: service.front.statuses["cancelled"] == 1)


def test_a_client_that_does_not_read_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.dispatch.BUFFER_BYTES", 20_000)
    monkeypatch.setattr("xllm.service.answer.FAREWELL_SECONDS", 0.2)
    service = fake_service(tmp_path)
    with running(service) as (base, server):
        connection = raw_request(base, ENDLESS | {"logprobs": 20, "n": 20}, receive_buffer=2048)
        wait_for(lambda: fake(service).cancelled > 0)
        wait_for(lambda: service.front.concurrent == 0)
        assert service.engine.stats().running == 0
        assert ask(base).status_code == 200
        connection.close()
        wait_for(lambda: not server.server_state.connections)


@pytest.mark.parametrize("stream", [False, True])
def test_the_connection_of_a_client_that_does_not_read_is_closed(tmp_path, monkeypatch, stream):
    monkeypatch.setattr("xllm.service.answer.STALL_SECONDS", 0.2)
    monkeypatch.setattr("xllm.service.listener.UNREAD_SECONDS", 0.5)
    service = fake_service(tmp_path)
    with running(service) as (base, server):
        body = ENDLESS | {"logprobs": 20, "n": 20, "stream": stream}
        connection = raw_request(base, body, receive_buffer=2048)
        wait_for(lambda: service.front.statuses["cancelled"] + service.front.statuses["deadline_exceeded"] == 1)
        wait_for(lambda: service.front.concurrent == 0 and not server.server_state.connections)
        connection.close()


def test_an_answer_about_text_waits_for_its_reader_so_long_and_keeps_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.answer.STALL_SECONDS", 0.5)
    monkeypatch.setattr("xllm.service.listener.UNREAD_SECONDS", 0.5)
    service = fake_service(tmp_path)
    with running(service) as (base, server):
        body = {"prompt": "a" * (1 << 20), "return_token_strs": True}
        with raw_request(base, body, receive_buffer=2048, route="/tokenize"):
            wait_for(lambda: service.front.statuses["cancelled"] + service.front.statuses["deadline_exceeded"])
            wait_for(lambda: service.front.concurrent == 0 and not server.server_state.connections)
        assert ask(base).status_code == 200


def test_the_loop_s_own_lag_is_not_the_client_s(tmp_path):
    """Steps that gather while the event loop is busy reach a reader that waits: it must not be called slow."""
    service = fake_service(tmp_path, tick=0.001)
    with running(service) as (base, _), ThreadPoolExecutor(1) as other:
        answer = other.submit(ask, base, **ENDLESS | {"stream": False, "n": 20, "logprobs": 10, "max_tokens": 200})
        wait_for(lambda: service.engine.stats().running == 20)
        loop = service.dispatcher._loop
        assert loop is not None
        loop.call_soon_threadsafe(time.sleep, 0.5)
        assert answer.result().status_code == 200


def test_bytes_that_begin_no_request_do_not_keep_a_connection(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.server.HEADER_SECONDS", 0.2)
    with running(fake_service(tmp_path)) as (base, _):
        parts = urlsplit(base)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"\r\n")
            assert connection.recv(65536) == b""


def test_behaviour_32_a_full_server_is_429_until_one_ends(tmp_path):
    service = fake_service(tmp_path, Limits(max_concurrent_requests=2), tick=0.001)
    with running(service) as (base, _):
        busy = [raw_request(base, ENDLESS) for _ in range(2)]
        wait_for(lambda: service.engine.stats().running == 2)
        answer = ask(base)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert "--max-concurrent-requests" in answer.json()["error"]["hint"]["knob"]
        busy.pop().close()
        wait_for(lambda: service.front.concurrent == 1)
        assert ask(base).status_code == 200
        busy.pop().close()


def test_a_full_queue_of_the_engine_cancels_what_was_accepted(tmp_path):
    service = fake_service(tmp_path, queue_limit=2)
    fake(service).paused = True
    with running(service) as (base, _):
        answer = ask(base, n=3)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert service.engine.stats().running == 0
        assert fake(service).cancelled == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(tmp_path, stream):
    service = fake_service(tmp_path)
    fake(service).broken = "numeric_error: the logits of this row are not finite"
    with running(service) as (base, _):
        answer = ask(base, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "numeric_error")
        fake(service).broken = None
        assert ask(base).status_code == 200


def test_a_server_whose_engine_failed_is_not_healthy(tmp_path):
    service = fake_service(tmp_path)
    with running(service) as (base, _):
        assert {httpx.get(base + path).status_code for path in PUBLIC} == {200}
        fake(service).refusal = "engine_failed: the engine failed and must be restarted; the log says why"
        for path in PUBLIC:
            answer = httpx.get(base + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")


def test_a_failure_after_the_first_token_is_an_event(tmp_path):
    service = fake_service(tmp_path, tick=0.001)
    with running(service) as (base, _), httpx.stream("POST", base + COMPLETIONS, json=ENDLESS) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        fake(service).broken = "numeric_error: the logits of this row are not finite"
        last = events(text + "".join(pieces))[-1]
        assert last["error"]["code"] == "numeric_error"
        assert last["error"]["request_id"] == answer.headers["x-request-id"]


def test_an_idle_stream_is_kept_alive(tmp_path):
    service = fake_service(tmp_path, Limits(keep_alive_seconds=0.05))
    fake(service).paused = True
    with (
        running(service) as (base, _),
        httpx.stream("POST", base + COMPLETIONS, json={"prompt": "hi", "stream": True}) as answer,
    ):
        pieces = answer.iter_text()
        assert next(pieces) == ": keep-alive\n\n"
        fake(service).paused = False
        assert "".join(event["choices"][0]["text"] for event in events("".join(pieces))) == "hi"


def test_a_slow_upload_ends(tmp_path):
    with running(fake_service(tmp_path, Limits(body_seconds=0.1))) as (base, _):
        parts = urlsplit(base)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            connection.sendall(
                f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: 100\r\n\r\n{{".encode()
            )
            answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"slow_upload" in answer


def test_the_first_signal_drains(tmp_path):
    service = fake_service(tmp_path, tick=0.002)
    with running(service) as (base, server):
        with httpx.stream("POST", base + COMPLETIONS, json=ENDLESS | {"max_tokens": 200}) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            fake(service).paused = True  # or it might end before all of this was asked
            server.handle_exit(signal.SIGTERM, None)
            for path, status in (("/ready", 503), ("/livez", 200)):
                assert httpx.get(base + path).status_code == status
            refused = ask(base)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.headers["retry-after"]
            fake(service).paused = False
            last = events(text + "".join(pieces))[-1]
            assert last["choices"][0]["finish_reason"] == "length"
        wait_for(lambda: server.should_exit)


def test_the_second_signal_ends_streams_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("xllm.service.server.FORCED_EXIT_SECONDS", 1000)
    service = fake_service(tmp_path, tick=0.002)
    with running(service) as (base, server):
        with httpx.stream("POST", base + COMPLETIONS, json=ENDLESS) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            server.handle_exit(signal.SIGTERM, None)
            loop = service.dispatcher._loop
            assert loop is not None
            loop.call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None)
            assert events(text + "".join(pieces))[-1]["error"]["code"] == "shutting_down"
        wait_for(lambda: service.engine.stats().running == 0)


def test_the_second_signal_ends_an_answer_nobody_reads(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("xllm.service.server.FORCED_EXIT_SECONDS", 1000)
    service = fake_service(tmp_path)
    with running(service) as (base, server):
        body = ENDLESS | {"logprobs": 20, "n": 20, "stream": False}
        with raw_request(base, body, receive_buffer=2048) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
            loop = service.dispatcher._loop
            assert loop is not None
            for _ in range(2):
                loop.call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None)
            wait_for(lambda: service.front.concurrent == 0)
            assert service.front.statuses["cancelled"] == 1
    assert "CancelledError" not in caplog.text


def test_a_model_without_a_template_still_completes(tmp_path):
    with running(fake_service(tmp_path, template=None)) as (base, _):
        error = ask(base, "/v1/chat/completions", prompt=None).json()["error"]
        assert error["param"] == "prompt"
        body = {"messages": [{"role": "user", "content": "x"}]}
        answer = httpx.post(f"{base}/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        assert ask(base).status_code == 200


def test_a_template_that_loops_does_not_stop_the_others(tmp_path):
    with running(fake_service(tmp_path)) as (base, _):
        loops = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"loops": 90_000}}

        async def both() -> None:
            async with httpx.AsyncClient(base_url=base, timeout=30) as client:
                hostile = [asyncio.create_task(client.post("/v1/chat/completions", json=loops)) for _ in range(2)]
                await asyncio.sleep(0.02)
                answer = await client.get("/v1/models")
                assert answer.status_code == 200
                assert not any(task.done() for task in hostile)
                assert {(await task).status_code for task in hostile} == {400}

        asyncio.run(both())


def test_metrics_have_both_names_and_only_grow(tmp_path):
    service = fake_service(tmp_path)

    def scrape() -> tuple[dict[str, float], set[str]]:
        """Value of each sample, and names of the gauges, which may go down."""
        lines = httpx.get(f"{base}/metrics").text.splitlines()
        values = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        gauges = {line.split()[2] for line in lines if line.startswith("# TYPE ") and line.endswith(" gauge")}
        return {name: float(value) for name, _, value in values}, gauges

    with running(service) as (base, _):
        before, gauges = scrape()
        ask(base)
        ask(base, prompt="")
        after, _ = scrape()
    assert after["request_status_total_ok"] > before["request_status_total_ok"]
    assert after["request_status_total_invalid_argument"] == 1
    assert after['num_processing_tokens_total_generated{model_name="fake"}'] == 3
    labels = '{engine="0",model_name="fake"}'
    assert after[f"vllm:generation_tokens_total{labels}"] == 3
    assert after[f"vllm:time_to_first_token_seconds_count{labels}"] == 1
    assert after['time_to_first_token_latency_milliseconds_count{model_name="fake"}'] == 1
    assert after['inter_token_latency_milliseconds_count{model_name="fake"}'] == 2
    assert after['vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"}'] == 1
    assert after['num_free_blocks{model_name="fake"}'] == 100
    counted = {name for name in before if name.partition("{")[0] not in gauges}
    assert len(counted) > 50
    assert not {name for name in counted if after[name] < before[name]}


def test_prompts_are_not_logged(tmp_path, caplog):
    caplog.set_level("DEBUG")
    with running(fake_service(tmp_path)) as (base, _):
        ask(base, prompt="a secret")
        ask(base, prompt="a secret", temperature=9)
    entries = [json.loads(entry.message) for entry in caplog.records if entry.name == "xllm.request"]
    assert [entry["status"] for entry in entries] == [200, 400]
    assert entries[0]["prompt_tokens"] == 8
    assert "secret" not in caplog.text


def test_a_reply_of_half_characters_ends_with_a_replacement(tmp_path):
    service = fake_service(tmp_path, reply=lambda request: [*ids("ok 😀")[:-1], EOS])
    with running(service) as (base, _):
        assert ask(base).json()["choices"][0]["text"] == "ok \N{REPLACEMENT CHARACTER}"
