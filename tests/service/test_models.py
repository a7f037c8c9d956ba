"""Several models behind one server: who gets a request, and what is said of all of them."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.fakes import EOS, fake, fake_service, ids, rows_service, running, wait_for
from xllm.service import endpoint
from xllm.service.batches import LINES, Batches
from xllm.service.endpoint import Limits
from xllm.service.gate import Keys
from xllm.service.metrics import Front
from xllm.service.shelf import Files

NAMES = ["one", "two", "rows"]
ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base URL, services): two models that say their name, and one that embeds."""
    folder, front = tmp_path_factory.mktemp("models"), Front()
    limits = Limits(max_concurrent_requests=3)
    one, two = (
        fake_service(folder, limits, name=name, front=front, reply=lambda _, name=name: [*ids(name), EOS])
        for name in ("one", "two")
    )
    one.batches = Batches(Files(folder / "state"))
    services = [one, two, rows_service(folder, name="rows", front=front)[0]]
    with running(one, admin=Keys(["admin"]), others=services[1:]) as (base, _):
        yield base, services


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served[0], timeout=30) as client:
        yield client


def complete(http: httpx.Client, **fields) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "hi"} | fields)


def test_all_are_listed_and_each_can_be_asked_for(http):
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == NAMES
    for name in NAMES:
        assert http.get(f"/v1/models/{name}").json()["id"] == name
    missing = http.get("/v1/models/three")
    assert missing.status_code == 404 and "one, two, rows" in missing.json()["error"]["message"]


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_named_model_answers_on_every_route(http, name):
    assert complete(http, model=name).json()["choices"][0]["text"] == name
    chat = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (name, name)
    streamed = http.post("/v1/chat/completions", json=chat | {"stream": True}).text
    assert f'"model":"{name}"' in streamed
    message = http.post("/v1/messages", json=chat | {"max_tokens": 9}).json()
    assert (message["model"], message["content"][0]["text"]) == (name, name)
    assert http.post("/tokenize", json={"model": name, "prompt": "hi"}).json()["count"] == 2


def test_without_a_name_the_first_that_can_answers(http):
    assert complete(http).json()["model"] == "one"
    assert http.post("/v1/embeddings", json={"input": "hi"}).json()["model"] == "rows"
    assert http.post("/tokenize", json={"prompt": "hi"}).json()["max_model_len"] == 2048


@pytest.mark.parametrize("body", [{"model": "three"}, {"model": ""}, {"model": "\x00"}])
def test_another_name_is_not_found(http, body):
    answer = complete(http, **body)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["message"].endswith("it serves one, two, rows")


def test_a_model_of_another_task_says_so(http):
    answer = complete(http, model="rows")
    assert answer.status_code == 400 and "rows computes embeddings" in answer.json()["error"]["message"]
    assert http.post("/v1/embeddings", json={"model": "two", "input": "hi"}).json()["error"]["code"] == "wrong_task"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"model": 5}', b"\xff", b"[" * 100_000])
def test_what_names_nothing_is_refused_as_ever(http, data):
    answer = http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] in (
        "invalid_json",
        "invalid_request",
        "invalid_type",
    )


def test_a_chain_of_responses_may_change_its_model(http):
    first = http.post("/v1/responses", json={"model": "one", "input": "hi"}).json()
    body = {"model": "two", "input": "and", "previous_response_id": first["id"]}
    second = http.post("/v1/responses", json=body).json()
    assert second["model"] == "two" and second["output"][0]["content"][0]["text"] == "two"
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


def test_each_line_of_a_batch_goes_to_its_model(http):
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "hi"}}
        for name in ("one", "two", "rows", "three")
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = http.post("/v1/files", files={"file": ("lines.jsonl", data)}, data={"purpose": "batch"}).json()["id"]
    made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = http.post("/v1/batches", json=made).json()["id"]
    wait_for(lambda: http.get(f"/v1/batches/{batch}").json()["status"] == "completed")
    ended = http.get(f"/v1/batches/{batch}").json()

    def answers(file: str) -> dict[str, dict]:
        held = http.get(f"/v1/files/{file}/content").text.splitlines()
        return {line["custom_id"]: line["response"]["body"] for line in map(json.loads, held)}

    assert {key: body["choices"][0]["text"] for key, body in answers(ended["output_file_id"]).items()} == {
        "one": "one",
        "two": "two",
    }
    codes = {key: body["error"]["code"] for key, body in answers(ended["error_file_id"]).items()}
    assert codes == {"rows": "wrong_task", "three": "model_not_found"}


def test_a_model_that_rests_holds_up_its_own_lines_only(served, http):
    """More of them than a batch asks at a time come first; the others' are answered meanwhile."""
    names = ["two"] * (2 * LINES) + ["one"] * 20
    asked = [
        {"custom_id": f"{at}", "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "hi"}}
        for at, name in enumerate(names)
    ]
    data = "\n".join(map(json.dumps, asked)).encode()
    engine = fake(served[1][1])
    engine.paused = True
    try:
        file = http.post("/v1/files", files={"file": ("lines.jsonl", data)}, data={"purpose": "batch"}).json()["id"]
        made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = http.post("/v1/batches", json=made).json()["id"]
        wait_for(lambda: http.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"] == 20)
        assert engine.stats().running == LINES
    finally:
        engine.paused = False
    wait_for(lambda: http.get(f"/v1/batches/{batch}").json()["status"] == "completed")
    assert http.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"] == len(names)


def test_a_large_body_is_looked_through_beside_the_others(http, monkeypatch):
    """While its name is looked for, somebody else is answered."""
    begun, answered, read = threading.Event(), threading.Event(), endpoint.named

    def slow(data: bytes) -> str | None:
        if len(data) > 1 << 20:
            begun.set()
            assert answered.wait(20), "nobody was answered meanwhile"
        return read(data)

    monkeypatch.setattr(endpoint, "named", slow)
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(complete, http, model="two", prompt=["hi", "x" * (2 << 20)])
        assert begun.wait(20) and complete(http, model="one").status_code == 200
        answered.set()
        assert large.result().json()["error"]["code"] == "context_length_exceeded"


def test_requests_for_one_model_leave_slots_to_the_others(tmp_path):
    front, limits = Front(), Limits(max_concurrent_requests=8)
    one, two = (fake_service(tmp_path, limits, name=name, front=front) for name in ("one", "two"))
    with running(one, others=[two]) as (base, _), httpx.Client(base_url=base, timeout=30) as http:
        fake(one).paused = True
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(complete, http, model="one") for _ in range(6)]
            wait_for(lambda: front.concurrent == 6)
            refused = complete(http, model="one")
            assert refused.status_code == 429 and "one answers 6 requests" in refused.json()["error"]["message"]
            assert complete(http, model="two").status_code == 200
            fake(one).paused = False
            assert [each.result().status_code for each in asked] == [200] * 6
        assert (one.answering, two.answering, front.concurrent) == (0, 0, 0)


def test_metrics_say_of_whom_they_are(http):
    complete(http, model="two")
    text = http.get("/metrics").text
    assert all(f'num_running_requests{{model_name="{name}"}}' in text for name in NAMES)
    assert text.count("# TYPE num_running_requests ") == 1
    assert "\nserver_request_in_total " in text


def test_the_limit_of_requests_is_for_all_together(served, http):
    one, two = fake(served[1][0]), fake(served[1][1])
    one.paused = two.paused = True
    try:
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(complete, http, model=model) for model in ("one", "two", "two")]
            wait_for(lambda: served[1][0].front.concurrent == 3)
            assert complete(http, model="one").status_code == 429
            one.paused = two.paused = False
            assert [one.result().status_code for one in asked] == [200] * 3
    finally:
        one.paused = two.paused = False


def test_state_health_and_orders_take_the_name(http):
    for query, names in (("", NAMES), ("?model=two", ["two"])):
        assert [model["model"] for model in http.get(f"/ui/state{query}").json()["models"]] == names
    assert http.get("/ready?model=rows").json()["status"] == "ready"
    assert http.get("/health?model=three").status_code == 404
    asleep = http.get("/is_sleeping", headers=ADMIN).json()["models"]
    assert asleep.keys() == set(NAMES) and not any(each["is_sleeping"] for each in asleep.values())
    assert http.get("/is_sleeping?model=one", headers=ADMIN).json() == {"is_sleeping": False, "level": None}
    unknown = http.post("/pause", json={"model_id": "three"}, headers=ADMIN)
    assert unknown.status_code == 404 and "one, two, rows" in unknown.text
    assert http.post("/pause", json={"model_id": "rows"}, headers=ADMIN).json()["error"]["code"] == "wrong_task"
    update = http.post("/update_weights", json={"path": "x"}, headers=ADMIN)
    assert update.status_code == 400 and update.json()["error"]["param"] == "model_id"


def test_whoever_ails_makes_the_server_ail(served, http):
    fake(served[1][1]).refusal = "engine_failed: it failed"
    try:
        assert http.get("/health").status_code == 503 and http.get("/health?model=one").status_code == 200
    finally:
        fake(served[1][1]).refusal = None


def test_a_request_is_aborted_wherever_it_runs(served, http):
    engine = fake(served[1][1])
    engine.paused = True
    try:
        with ThreadPoolExecutor(1) as pool:
            headers = {"x-request-id": "it"}
            asked = pool.submit(http.post, "/v1/completions", json={"model": "two", "prompt": "hi"}, headers=headers)
            wait_for(lambda: engine.stats().running == 1)
            assert http.post("/abort", json={"request_id": "it", "model": "one"}).status_code == 404
            assert http.post("/abort", json={"request_id": "it"}).json() == {"aborted": 1}
            assert asked.result().status_code == 499
    finally:
        engine.paused = False
