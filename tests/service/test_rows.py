"""Routes of rows over an executor without a model: every bad input has its typed answer, and what fails or is given up
takes nobody else with it."""

from __future__ import annotations

import json
import queue
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.service.fakes import BREAKS, FAILS, NAN, VOCAB, FakeRows, rows_service, running, wait_for
from tests.service.test_params import VALUES
from xllm.runtime import Request, RequestRefused, TokenOutput
from xllm.runtime.encoding import Encoder
from xllm.runtime.rows import RowEngine
from xllm.runtime.urgency import Urgency
from xllm.service import rows
from xllm.service.body import ClassifyBody, DetokenizeBody, EmbeddingBody, RerankBody, ScoreBody, TokenizeBody
from xllm.service.endpoint import Service
from xllm.service.errors import ApiError
from xllm.service.gate import Record
from xllm.service.relevance import MAX_PAIR_CHARS, Classify, Rerank, Score
from xllm.service.rows import Embeddings
from xllm.service.tokens import MAX_CHARS, Detokenize, Tokenize

EMBED, RERANK, SCORE, CLASSIFY = "/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify"
TOKENIZE, DETOKENIZE, CHAT = "/tokenize", "/detokenize", "/v1/chat/completions"
SAY = [{"role": "user", "content": "hi"}]
# Of an embedding model, a classifier that scores pairs, and one that can't.
LABELS: dict[str, tuple[str, ...]] = {"embed": (), "one": ("yes",), "two": ("a", "b")}
Served = tuple[httpx.Client, Service]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    service, _ = rows_service(tmp_path_factory.mktemp("rows"), LABELS[getattr(request, "param", "embed")])
    with running(service) as (base, _), httpx.Client(base_url=base, timeout=30) as client:
        yield client, service


CASES = {
    # name: (of LABELS, route, body, code, param)
    "no input": ("embed", EMBED, {}, "missing_parameter", "input"),
    "input and messages": ("embed", EMBED, {"input": "a", "messages": SAY}, "missing_parameter", "input"),
    "empty input": ("embed", EMBED, {"input": ""}, "empty_prompt", "input"),
    "empty list": ("embed", EMBED, {"input": []}, "empty_prompt", "input"),
    "one empty": ("embed", EMBED, {"input": ["a", ""]}, "empty_prompt", "input[1]"),
    "empty ids": ("embed", EMBED, {"input": [[1], []]}, "empty_prompt", "input[1]"),
    "mixed": ("embed", EMBED, {"input": ["a", 1]}, "invalid_type", "input"),
    "too many": ("embed", EMBED, {"input": ["a"] * 2049}, "invalid_request", "input"),
    "wrong id": ("embed", EMBED, {"input": [1, VOCAB]}, "token_out_of_range", "input[1]"),
    "negative id": ("embed", EMBED, {"input": [[-1]]}, "token_out_of_range", "input[0][0]"),
    "too long": ("embed", EMBED, {"input": ["a", "b" * 65]}, "context_length_exceeded", "input[1]"),
    "far too long": ("embed", EMBED, {"input": "b" * 1_000_000}, "context_length_exceeded", "input"),
    "long ids": ("embed", EMBED, {"input": [1] * 65}, "context_length_exceeded", "input"),
    "format": ("embed", EMBED, {"input": "a", "encoding_format": "int8"}, "invalid_request", "encoding_format"),
    "dimensions 0": ("embed", EMBED, {"input": "a", "dimensions": 0}, "invalid_request", "dimensions"),
    "dimensions 5": ("embed", EMBED, {"input": "a", "dimensions": 5}, "invalid_request", "dimensions"),
    "truncate 0": ("embed", EMBED, {"input": "a", "truncate_prompt_tokens": 0}, "invalid_request", None),
    "truncate 65": ("embed", EMBED, {"input": "a", "truncate_prompt_tokens": 65}, "invalid_request", None),
    "unknown field": ("embed", EMBED, {"input": "a", "task": "query"}, "unknown_parameter", "task"),
    "template fields": ("embed", EMBED, {"input": "a", "chat_template_kwargs": {}}, "invalid_request", None),
    "no messages": ("embed", EMBED, {"messages": []}, "invalid_request", "messages"),
    "chat": ("embed one two", CHAT, {"messages": SAY, "tools": [1]}, "wrong_task", None),
    "completion": ("embed one two", "/v1/completions", {"prompt": "a"}, "wrong_task", None),
    "classify": ("embed", CLASSIFY, {"input": "a"}, "wrong_task", None),
    "embeddings": ("one two", EMBED, {"input": "a"}, "wrong_task", None),
    "no query": ("embed one", RERANK, {"documents": ["a"]}, "missing_parameter", "query"),
    "empty query": ("embed one", RERANK, {"query": "", "documents": ["a"]}, "empty_prompt", "query"),
    "no documents": ("embed one", RERANK, {"query": "a", "documents": []}, "empty_prompt", "documents"),
    "empty document": ("embed one", RERANK, {"query": "a", "documents": ["b", ""]}, "empty_prompt", "documents[1]"),
    "document": ("embed one", RERANK, {"query": "a", "documents": [{"txt": "b"}]}, "unknown_parameter", None),
    "long query": ("embed one", RERANK, {"query": "a" * 999, "documents": ["b"]}, "context_length_exceeded", "query"),
    "long pair": ("one", RERANK, {"query": "a" * 40, "documents": ["b" * 40]}, "context_length_exceeded", None),
    "top_n": ("embed one", RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, "invalid_request", "top_n"),
    "rank_fields": ("one", RERANK, {"query": "a", "documents": ["b"], "rank_fields": []}, "unknown_parameter", None),
    "many characters": ("embed one", RERANK, {"query": "a" * (MAX_PAIR_CHARS // 2000), "documents": ["b"] * 2000},
                        "invalid_request", "documents[0]"),
    "a long text to cut": ("embed", EMBED, {"input": "a" * (MAX_CHARS + 1), "truncate_prompt_tokens": 9},
                           "invalid_request", "input"),
    "query to cut": ("one", RERANK, {"query": "a" * 20, "documents": ["b"], "truncate_prompt_tokens": 9},
                     "invalid_request", "truncate_prompt_tokens"),
    "two labels": ("two", RERANK, {"query": "a", "documents": ["b"]}, "wrong_task", None),
    "uneven": ("embed one", SCORE, {"text_1": ["a", "b"], "text_2": ["c"]}, "invalid_request", "text_1"),
    "no text_2": ("embed one", SCORE, {"text_1": "a"}, "missing_parameter", "text_2"),
    "empty text_2": ("embed one", SCORE, {"text_1": "a", "text_2": []}, "empty_prompt", "text_2"),
    "nothing to tokenize": ("embed", TOKENIZE, {}, "missing_parameter", "prompt"),
    "too much to tokenize": ("embed", TOKENIZE, {"prompt": "a" * (MAX_CHARS + 1)}, "invalid_request", "prompt"),
    "no messages to open": ("embed", TOKENIZE, {"prompt": "a", "add_generation_prompt": True}, "invalid_request", None),
    "token": ("embed", DETOKENIZE, {"tokens": [0, VOCAB]}, "token_out_of_range", "tokens[1]"),
    "huge token": ("embed", DETOKENIZE, {"tokens": [10**40]}, "token_out_of_range", "tokens[0]"),
    "no tokens": ("embed", DETOKENIZE, {}, "missing_parameter", "tokens"),
    "text of tokens": ("embed", DETOKENIZE, {"tokens": "a"}, "invalid_type", "tokens"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("served", "case"),
    [(kind, case) for kind in LABELS for case, (kinds, *_) in CASES.items() if kind in kinds.split()],
    indirect=["served"],
    scope="module",
)
def test_bad_input_has_a_typed_answer_and_the_server_lives(served: Served, case: str) -> None:
    http, service = served
    _, route, body, code, param = CASES[case]
    answer = http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", code), error
    assert param is None or error["param"] == param, error
    if code == "wrong_task" and route != RERANK:
        assert f"task {service.facts.task}" in error["message"]
        assert "xllm compile --task" in error["hint"]["knob"]
    assert http.post(TOKENIZE, json={"prompt": "hi"}).json()["count"] == 2
    wait_for(lambda: not service.front.concurrent and not service.dispatcher.live)


@pytest.mark.parametrize("served", ["embed"], indirect=True, scope="module")
def test_the_tokens_of_a_request_are_counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_TOKENS", 9)
    assert served[0].post(EMBED, json={"input": ["a" * 5, "b" * 4]}).status_code == 200
    error = served[0].post(EMBED, json={"input": ["a" * 5, "b" * 5]}).json()["error"]
    assert error["param"] == "input[1]" and "more than 9 tokens together" in error["message"]


@pytest.mark.parametrize("served", LABELS, indirect=True, scope="module")
def test_any_body_is_a_job_or_a_typed_refusal(served: Served) -> None:
    draw, service = random.Random(7), served[1]
    kinds = {Embeddings: EmbeddingBody, Rerank: RerankBody, Score: ScoreBody, Classify: ClassifyBody,
             Tokenize: TokenizeBody, Detokenize: DetokenizeBody}  # fmt: skip
    done = refused = 0
    for endpoint, body in kinds.items():
        fields = [name for name in body.__struct_fields__ if name != "model"]
        needed = {
            "query": "q",
            "documents": ["a"],
            "text_1": "a",
            "text_2": "b",
            "tokens": [1],
            "prompt": "a",
            "input": "a",
        }
        for _ in range(300):
            given = {name: value for name, value in needed.items() if name in fields}
            given |= {draw.choice([*fields, "x.y\n"]): draw.choice(VALUES) for _ in range(draw.randint(0, 2))}
            try:
                endpoint(service).plan(json.dumps(given).encode(), Record("r", 0.0))
                done += 1
            except ApiError as error:
                refused += 1
                assert error.status == 400 and error.message, given
    assert min(done, refused) > 100


def test_another_model_is_not_found(served: Served) -> None:
    for route, body in ((TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": []})):
        answer = served[0].post(route, json=body | {"model": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_behaviour_59_tokenize_then_detokenize_is_exact(served: Served) -> None:
    text = "grüße 😀 <|start|>\x00\n  日本"
    found = served[0].post(TOKENIZE, json={"prompt": text, "return_token_strs": True}).json()
    assert found["max_model_len"] == 64
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert "<|start|>" in found["token_strs"]
    assert served[0].post(DETOKENIZE, json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = served[0].post(TOKENIZE, json={"messages": SAY}).json()["tokens"]
    closed = served[0].post(TOKENIZE, json={"messages": SAY, "add_generation_prompt": False}).json()["tokens"]
    shown = [served[0].post(DETOKENIZE, json={"tokens": tokens}).json()["prompt"] for tokens in (chat, closed)]
    assert shown == ["<|start|>user\nhi<|end|><|start|>assistant\n", "<|start|>user\nhi<|end|>"]


def test_messages_are_embedded_as_the_template_writes_them(tmp_path) -> None:
    service, executor = rows_service(tmp_path)
    with running(service) as (base, _), httpx.Client(base_url=base) as http:
        answer = http.post(EMBED, json={"messages": SAY, "dimensions": 1}).json()
        ids = http.post(TOKENIZE, json={"messages": SAY, "add_generation_prompt": False}).json()["tokens"]
    assert list(executor.batches[0].rows[0].tokens) == ids
    assert answer["data"][0]["embedding"] == [1.0]
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_labels_called_yes_count_and_probabilities_are_those_of_softmax(tmp_path) -> None:
    service, _ = rows_service(tmp_path, ("no", "Yes"))
    with running(service) as (base, _), httpx.Client(base_url=base) as http:
        [found] = http.post(CLASSIFY, json={"input": [1, 2]}).json()["data"]  # the row is (3, 2)
        assert found["label"] == "no"
        assert found["probs"] == pytest.approx([1 / (1 + 2.718281828459045**-1), 1 / (1 + 2.718281828459045)])
        pair = http.post(SCORE, json={"text_1": "a", "text_2": "b"}).json()["data"][0]
        assert 0 <= pair["score"] < 0.5


def test_a_poisoned_row_fails_alone_and_a_failed_step_takes_its_own(tmp_path) -> None:
    service, executor = rows_service(tmp_path)
    with running(service) as (base, _), httpx.Client(base_url=base, timeout=30) as http, ThreadPoolExecutor(3) as pool:

        def ask(ids: list[int]) -> httpx.Response:
            return http.post(EMBED, json={"input": ids})

        for bad, code in ((NAN, "numeric_error"), (FAILS, "device_error")):
            executor.open.clear()
            first = pool.submit(ask, [1, 1])  # fills a step, so that the next two share one
            wait_for(lambda: service.engine.stats().running == 1)
            poisoned, beside = pool.submit(ask, [bad]), pool.submit(ask, [2, 3])
            wait_for(lambda: service.engine.stats().waiting == 2)
            executor.open.set()
            assert first.result().json()["data"][0]["embedding"] == [2, 2, 1, 1]
            assert poisoned.result().status_code == 500
            assert poisoned.result().json()["error"]["code"] == code
            if bad == NAN:
                assert beside.result().json()["data"][0]["embedding"] == [5, 2, 3, 1]
            else:
                assert beside.result().json()["error"]["code"] == code
        assert ask([4]).json()["data"][0]["embedding"] == [4, 1, 4, 1]
        assert http.get("/health").status_code == 200
        assert ask([BREAKS]).json()["error"]["code"] == "internal_error"
        assert ask([4]).status_code == http.get("/health").status_code == 503


def test_a_full_queue_is_429_and_who_leaves_frees_it(tmp_path) -> None:
    service, executor = rows_service(tmp_path, queue_limit=3)
    with running(service) as (base, _), ThreadPoolExecutor(2) as pool:
        executor.open.clear()
        running_one = pool.submit(httpx.post, base + EMBED, json={"input": [7]}, timeout=30)
        wait_for(lambda: service.engine.stats().running == 1)
        with httpx.Client(timeout=0.3) as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(base + EMBED, json={"input": [[1], [2], [3]]})
        wait_for(lambda: service.engine.stats().waiting == 0)  # a client that leaves takes its prompts with it
        waiting = pool.submit(httpx.post, base + EMBED, json={"input": [[1], [2]]}, timeout=30)
        wait_for(lambda: service.engine.stats().waiting == 2)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.RateLimitError) as refused:
            client.embeddings.create(model="fake", input=[[1], [2]])
        assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("queue_full", "1")
        assert service.engine.stats().waiting == 2  # all or none
        executor.open.set()
        assert [pool_answer.result().status_code for pool_answer in (running_one, waiting)] == [200, 200]
        metrics = httpx.get(f"{base}/metrics").text
        assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="fake"} 3.0' in metrics
        assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"} 3.0' in metrics


def test_a_drain_finishes_what_runs_and_refuses_the_rest(tmp_path) -> None:
    service, executor = rows_service(tmp_path)
    with running(service) as (base, server), ThreadPoolExecutor(1) as pool:
        executor.open.clear()
        last = pool.submit(httpx.post, base + EMBED, json={"input": [7]}, timeout=30)
        wait_for(lambda: service.engine.stats().running == 1)
        server.handle_exit(15, None)
        refused = httpx.post(base + RERANK, json={"query": "a", "documents": ["b"]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        executor.open.set()
        assert last.result().json()["data"][0]["embedding"] == [7, 1, 7, 1]


@pytest.mark.parametrize(("late", "expected"), [(0.0, ["r1", "r3", "r0", "r2"]), (301.0, ["r0", "r1", "r3", "r2"])])
def test_online_prompts_go_before_offline_ones_until_one_has_waited_too_long(late: float, expected: list[str]) -> None:
    executor, outputs, now = FakeRows(max_len=100), queue.SimpleQueue[list[TokenOutput]](), [1000.0]
    executor.open.clear()
    engine = RowEngine(Encoder(executor), outputs.put, queue_limit=10, clock=lambda: now[0])
    engine.start()
    engine.submit(Request("runs", (1,) * 30))
    wait_for(lambda: engine.stats().running == 1)
    for at in range(4):
        engine.submit(Request(f"r{at}", (at,) * 30, arrival=1000.0 + at, urgency=Urgency(offline=at % 2 == 0)))
    for at in range(4, 9):
        engine.submit(Request(f"r{at}", (at,) * 30, arrival=1010.0, urgency=Urgency(offline=True)))
    with pytest.raises(RequestRefused, match="queue_full"):
        engine.submit(Request("more", (1,), urgency=Urgency(offline=True)))
    now[0] += late
    executor.open.set()
    found = [output.request_id for _ in range(10) for output in outputs.get(timeout=20)]
    engine.stop()
    assert found[1:5] == expected


def test_every_prompt_has_one_output_whatever_ends_it() -> None:
    executor, outputs = FakeRows(max_len=100), queue.SimpleQueue[list[TokenOutput]]()
    executor.open.clear()
    engine = RowEngine(Encoder(executor), outputs.put)
    engine.start()
    long = tuple(range(1, 81))  # three steps
    requests = [Request("long", long), *(Request(f"r{at}", (at,) * 9, arrival=time.monotonic()) for at in range(8))]
    for request in requests:
        engine.submit(request)
    for prompt, code in (((), "empty_prompt"), ((VOCAB,), "token_out_of_range"), ((1,) * 101, "context_length")):
        with pytest.raises(RequestRefused, match=code):
            engine.submit(Request("bad", prompt))
    with pytest.raises(RequestRefused, match="duplicate"):
        engine.submit(requests[0])
    wait_for(lambda: engine.stats().running > 0)
    engine.cancel("r3")
    engine.cancel("nobody")
    executor.open.set()
    found: list[TokenOutput] = []
    while len(found) < len(requests):
        found += outputs.get(timeout=20)
    ends = {output.request_id: output.finish_reason for output in found}
    assert ends == {request.id: "cancelled" if request.id == "r3" else "stop" for request in requests}
    rows = {output.request_id: output.row.tolist() for output in found if output.row is not None}
    assert rows["long"] == [sum(long), 80, 80, 1]
    assert rows["r5"] == [45, 9, 5, 1]
    assert max(len(batch.rows) for batch in executor.batches) == 3  # of 9 tokens each, in steps of 32
    wait_for(lambda: engine.stats().running == 0)
    stats = engine.stats()
    assert (stats.finished, stats.cancelled, stats.waiting, stats.prompt_tokens) == (8, 1, 0, 80 + 7 * 9)
    assert (stats.steps, stats.rows) == (len(executor.batches), sum(len(batch.rows) for batch in executor.batches))
    assert stats.tokens == sum(len(row.tokens) for batch in executor.batches for row in batch.rows)
    assert sum(stats.step_sizes) == stats.steps and sum(stats.step_sizes[:4]) == 0, "none of 8 tokens or fewer"
    assert stats.seconds["compute"] == pytest.approx(0.25 * stats.steps)
    executor.open.clear()
    for request in requests[:3]:
        engine.submit(request)
    wait_for(lambda: engine.stats().running > 0)
    engine.cancel("long")
    executor.open.set()
    engine.stop()
    left = [output for _ in range(outputs.qsize()) for output in outputs.get()]
    assert sorted(output.request_id for output in left) == ["long", "r0", "r1"]
    assert executor.closed
    with pytest.raises(RequestRefused, match="shutting_down"):
        engine.submit(requests[0])
