"""Who may control a server, and who may abort which request, whatever form its answer has."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.service.fakes import fake_service, ids, rows_service, running, wait_for
from xllm.service.control import ORDERS
from xllm.service.gate import CONTROL, Keys


def test_control_needs_an_admins_key_and_is_off_without_one(tmp_path):
    orders = [("GET" if path == "/is_sleeping" else "POST", path) for path in CONTROL]
    assert {*ORDERS} == {path for method, path in orders if method == "POST"}

    def answers(base: str, **headers: str) -> set[tuple[int, str | None]]:
        found = [httpx.request(method, base + path, headers=headers) for method, path in orders]
        return {(one.status_code, one.json().get("error", {}).get("code")) for one in found}

    ran = {(200, None), (400, "missing_parameter"), (501, "unimplemented")}  # a fake engine takes no orders
    for keys, admin, asked in (
        (None, None, {"": (403, "control_refused"), "one": (403, "control_refused")}),
        (Keys(["one"]), None, {"": (401, "missing_api_key"), "one": (403, "control_refused")}),
        (None, Keys(["root"]), {"": (401, "missing_api_key"), "one": (401, "invalid_api_key"), "root": ran}),
        (
            Keys(["one"]),
            Keys(["root"]),
            {"one": (403, "control_refused"), "two": (401, "invalid_api_key"), "root": ran},
        ),
    ):
        with running(fake_service(tmp_path), keys, admin) as (base, _):
            for key, expected in asked.items():
                found = answers(base, **({"x-api-key": key} if key else {}))
                assert found == (expected if isinstance(expected, set) else {expected}), (key, expected)
                assert httpx.get(f"{base}/v1/models", headers={"x-api-key": "root"}).status_code == (
                    200 if keys is None or admin else 401
                )


SAY = [{"role": "user", "content": "abc"}]
STREAMS = {
    "/v1/completions": ({"prompt": "abc"}, lambda event: event["id"]),
    "/v1/chat/completions": ({"messages": SAY}, lambda event: event["id"]),
    "/v1/responses": ({"input": "abc"}, lambda event: event["response"]["id"]),
    "/v1/messages": ({"messages": SAY, "max_tokens": 9}, lambda event: event["message"]["id"]),
}


@pytest.mark.parametrize("route", STREAMS)
def test_a_stream_is_aborted_by_the_id_of_its_answer(tmp_path, route):
    body, id_of = STREAMS[route]
    service = fake_service(tmp_path, reply=lambda _: ids("a" * 2000), tick=0.01)
    with running(service) as (base, _), httpx.Client(base_url=base) as client:
        with client.stream("POST", route, json=body | {"model": "fake", "stream": True}) as answer:
            lines = answer.iter_lines()
            first = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
            assert client.post("/abort", json={"request_id": id_of(first)}).json() == {"aborted": 1}
            assert "the request was aborted" in "".join(lines)
        assert client.post("/abort", json={"request_id": id_of(first)}).status_code == 404
        wait_for(lambda: service.engine.stats().running == 0 and service.front.concurrent == 0)
        assert service.front.statuses["cancelled"] == 1


def test_rows_are_aborted_by_the_id_of_their_request(tmp_path):
    service, executor = rows_service(tmp_path)
    executor.open.clear()
    with running(service) as (base, _), ThreadPoolExecutor(1) as pool:
        sent: dict[str, Any] = {"json": {"input": "hi"}, "headers": {"x-request-id": "mine"}, "timeout": 30}
        answer = pool.submit(httpx.post, f"{base}/v1/embeddings", **sent)
        wait_for(lambda: service.engine.stats().running == 1)
        assert httpx.post(f"{base}/abort", json={"request_id": "mine"}).json() == {"aborted": 1}
        assert answer.result().status_code == 499 and answer.result().json()["error"]["code"] == "request_aborted"
        executor.open.set()
