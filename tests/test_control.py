"""A running server is controlled: real processes, and every answer is what an undisturbed one gives."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.checkpoints import write_checkpoint
from tests.models import FAMILIES, build
from tests.servers import Server, serving
from xllm.artifact import WEIGHTS, Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.offline import LLM
from xllm.runtime import RequestRefused

ADMIN = {"x-api-key": "root"}
ONE, TWO = {"x-api-key": "one"}, {"authorization": "Bearer two"}
LONG = {"model": "tiny", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    config = {**FAMILIES["qwen3"], "max_position_embeddings": 8192}
    options = CompileOptions(max_len=8192, max_seqs=8)
    checkpoint, _ = build(folder, config, options=options)
    for name, seed, changed in (("other", 1, {}), ("longer", 2, {"max_len": 4096})):
        write_checkpoint(folder / name, config, dtype="float32", seed=seed)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name / file).read_bytes() == (checkpoint / file).read_bytes()
        compile_checkpoint(folder / name, folder / f"{name}.xllm", replace(options, **changed))
    (folder / "keys").write_text("one\ntwo\n")
    (folder / "admins").write_text("root\n")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--api-key-file", str(folder / "keys"), "--admin-key-file", str(folder / "admins"))
    flags += ("--weights-dir", str(folder), "--max-concurrent-requests", "0")
    with serving(folder / "tiny.xllm", "--memory", "512MiB", *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=ADMIN, timeout=60) as http:
        yield http
        for path in ("/wakeup", "/resume"):
            assert http.post(path).status_code == 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def ask(client: httpx.Client, prompt: str | list[str], headers: dict[str, str] = ONE, **fields: Any) -> httpx.Response:
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


DRAWN = {"temperature": 1.0, "seed": 7, "logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": 0.1}
FORMED = {"temperature": 1.0, "seed": 8, "structured_outputs": {"regex": "([a-z]{3} ){900,999}"}, "ignore_eos": None}


def test_behaviour_11_pause_keep_and_resume_give_the_same_text(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    """Sampled with a seed, with penalties and logprobs, and in a given form: numbers and grammars go on where they
    were."""
    ways = {"a": DRAWN, "b": FORMED}
    alone = [pool.submit(ask, client, prompt, **way) for prompt, way in ways.items()]
    expected = [answer.result().json()["choices"] for answer in alone]
    wait_for(client, "num_used_blocks", 0)  # an answer is there a step before its pages are
    free = metric(client, "num_free_blocks")
    asked = [pool.submit(ask, client, prompt, **way) for prompt, way in ways.items()]
    wait_for(client, "num_running_requests", 2)
    time.sleep(0.1)  # some tokens on
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


def test_behaviour_12_pause_abort_and_pause_wait(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    asked = running(client, pool, "ab", max_tokens=8000)
    assert client.post("/pause", json={"mode": "abort"}).json()["status"] == "paused"
    for answer in asked:
        assert answer.result().status_code == 499
        assert answer.result().json()["error"]["code"] == "request_aborted"
    assert metric(client, "num_waiting_requests") == 0
    client.post("/resume")
    [answer] = running(client, pool, "a")
    assert client.post("/pause", json={"mode": "wait"}).json()["status"] == "paused"
    assert answer.result().json()["usage"]["completion_tokens"] == 4000


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
        assert answer.result().json()["usage"]["completion_tokens"] == 4000
        assert alone.process.wait(20) == 0


def test_behaviour_55_sleep_and_wake(client: httpx.Client, pool: ThreadPoolExecutor) -> None:
    expected = ask(client, "abc", max_tokens=20).json()["choices"]
    [answer] = running(client, pool, "a")
    busy = client.post("/sleep", json={})
    assert busy.status_code == 409 and busy.json()["error"]["code"] == "engine_busy"
    asleep = {"is_sleeping": True, "level": "light"}
    assert client.post("/sleep", json={"mode": "wait", "level": 1}).json() == asleep | {"changed": True}
    assert answer.result().json()["usage"]["completion_tokens"] == 4000
    assert client.post("/sleep", json={}).json() == asleep | {"changed": False}
    assert client.get("/is_sleeping").json() == asleep and metric(client, "engine_asleep") == 1
    refused = ask(client, "a")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "asleep"
    assert int(refused.headers["retry-after"]) > 0
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    assert client.post("/sleep", json={"level": "deep"}).json() == {
        "is_sleeping": True,
        "level": "deep",
        "changed": True,
    }
    assert client.post("/wake_up").json() == {"is_sleeping": False, "level": None, "changed": True}
    assert client.post("/wakeup").json()["changed"] is False
    assert ask(client, "abc", max_tokens=20).json()["choices"] == expected
    [answer] = running(client, pool, "a", max_tokens=8000)
    assert client.post("/sleep", json={"mode": "abort"}).json()["changed"] and answer.result().status_code == 499


def resident(name: str) -> int:
    """Bytes of this process that are mapped from files of this name."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = name in line
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def flip(file: Path) -> None:
    """Changes one bit, in place; and back."""
    with file.open("r+b") as opened:
        opened.seek(-100, 2)
        byte = opened.read(1)
        opened.seek(-100, 2)
        opened.write(bytes([byte[0] ^ 1]))


def test_who_sleeps_holds_neither_weights_nor_pages(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tiny.xllm", tmp_path / "sleeper.xllm")
    weights = tmp_path / "sleeper.xllm" / WEIGHTS
    with LLM(tmp_path / "sleeper.xllm", threads=1, memory_bytes=512 << 20) as llm:
        expected = llm.generate("abc", max_tokens=8)
        assert llm.ledger is not None
        assert resident("sleeper.xllm") >= weights.stat().st_size and resident("memfd:xllm-kv") > 0
        assert llm.sleep("deep") and llm.is_sleeping
        assert resident("sleeper.xllm") <= os.sysconf("SC_PAGESIZE")
        assert resident("memfd:xllm-kv") <= llm.ledger.pool.page_bytes, "one may be on its way to be mapped ahead"
        with pytest.raises(RequestRefused, match="asleep"):
            llm.generate("abc", max_tokens=8)
        flip(weights)
        with pytest.raises(RequestRefused, match=r"weights_changed.*not what the compiler wrote"):
            llm.wake_up()
        assert llm.is_sleeping
        flip(weights)
        assert llm.wake_up() and not llm.wake_up()
        assert llm.generate("abc", max_tokens=8) == expected


def test_other_weights_take_the_place_of_those_that_are_served(folder: Path, tmp_path: Path) -> None:
    ask: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    prompts = [[*range(40)], [*range(30, 90)]]
    answers = {}
    for name in ("tiny", "other"):
        with LLM(folder / f"{name}.xllm", threads=1, memory_bytes=512 << 20) as llm:
            answers[name] = llm.generate(prompts, **ask)
    shutil.copytree(folder / "other.xllm", tmp_path / "broken.xllm")
    flip(tmp_path / "broken.xllm" / WEIGHTS)
    digest = Artifact.open(folder / "other.xllm").manifest["digest"]
    with LLM(folder / "tiny.xllm", threads=1, memory_bytes=512 << 20) as llm:
        first = llm.weights
        assert llm.generate(prompts, **ask) == answers["tiny"]
        for path, checksum, code in (
            (folder / "longer.xllm", None, "weights_incompatible.*limits in manifest.json"),
            (folder / "other.xllm", "0" * 64, "checksum_mismatch"),
            (folder / "nowhere.xllm", None, "weights_unusable"),
            (tmp_path / "broken.xllm", None, "weights_unusable.*not what the compiler wrote"),
        ):
            with pytest.raises(RequestRefused, match=code):
                llm.update_weights(path, checksum)
        assert llm.generate(prompts, **ask) == answers["tiny"] and llm.weights == first
        assert llm.update_weights(folder / "other.xllm", digest) and llm.weights == digest[:16] != first
        assert llm.generate(prompts, **ask) == answers["other"] != answers["tiny"]
        assert not llm.update_weights(folder / "other.xllm")
        assert llm.sleep() and llm.wake_up(), "the weights that are there now are checked"
        assert llm.generate(prompts, **ask) == answers["other"]
        assert llm.update_weights(folder / "tiny.xllm") and llm.generate(prompts, **ask) == answers["tiny"]


def test_behaviour_56_no_answer_mixes_weights_that_are_updated_under_load(
    client: httpx.Client, pool: ThreadPoolExecutor
) -> None:
    """Each answer, with all its choices, is to the token that of the version it names. There are more
    sequences than slots, so that an answer's own wait for each other."""
    prompts, expected = ["abcdefgh" * 8 + end for end in "xyz"], {}

    def both(prompt: str) -> httpx.Response:
        return ask(client, [prompt, prompt[::-1]], max_tokens=100)

    for name in ("other", "tiny"):
        version = client.post("/update_weights", json={"path": f"{name}.xllm"}).json()["weights"]
        assert client.get("/v1/models").json()["data"][0]["weights"] == version
        for prompt in prompts:
            expected[version, prompt] = both(prompt).json()["choices"]
    assert len(expected) == 6 and len({choices[0]["text"] for choices in expected.values()}) == 6
    enough = threading.Event()

    def keep_asking(prompt: str) -> list[str]:
        seen = []
        while not enough.is_set():
            answer = both(prompt)
            version = answer.headers["x-weights-version"]
            assert answer.json()["system_fingerprint"] == version
            assert answer.json()["choices"] == expected[version, prompt]
            seen.append(version)
        return seen

    clients = [pool.submit(keep_asking, prompt) for prompt in prompts * 2]
    try:
        for name in ("other", "tiny") * 4:
            assert client.post("/update_weights", json={"path": f"{name}.xllm"}).json()["changed"]
    finally:
        enough.set()
    seen = [version for asked in clients for version in asked.result()]
    assert set(seen) == {version for version, _ in expected}
    assert re.search(r'^weights_info\{[^}]*version="', client.get("/metrics").text, re.MULTILINE)


def test_weights_come_from_the_folder_that_was_named_and_no_other(client: httpx.Client, folder: Path) -> None:
    (folder / "link").symlink_to("/etc")
    for path, status, code in (
        ("/etc/passwd", 403, "path_refused"),
        ("../outside", 403, "path_refused"),
        ("link/passwd", 403, "path_refused"),
        (".", 403, "path_refused"),
        ("a\0b", 400, "weights_unusable"),
        ("keys", 400, "weights_unusable"),
        ("longer.xllm", 409, "weights_incompatible"),
    ):
        answer = client.post("/update_weights", json={"path": path})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
        assert str(folder) not in answer.text


def test_a_call_in_this_process_goes_on_after_a_pause(folder: Path, pool: ThreadPoolExecutor) -> None:
    ask: dict[str, Any] = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
    with LLM(folder / "tiny.xllm", threads=1, memory_bytes=512 << 20) as llm:
        expected = llm.generate("abc", **ask)
        answer = pool.submit(llm.generate, "abc", **ask)
        assert llm._engine is not None
        while not (llm._engine.stats().running or answer.done()):
            time.sleep(0.001)
        assert llm.pause() and llm._engine.stats().waiting == 1
        with pytest.raises(RequestRefused, match="engine_busy"):
            llm.sleep()
        with pytest.raises(RequestRefused, match="engine_busy"):
            llm.update_weights(folder / "other.xllm")
        assert not llm.pause() and llm.resume() and answer.result() == expected
