"""A server that is looked at: the traffic it records is what the compiler takes, and answers stay as they are."""

from __future__ import annotations

import json
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import httpx
import pytest

from tests.models import FAMILIES, build
from tests.servers import serving
from tests.service.fakes import fake_service, running
from tests.watch.test_profiler import assert_nested
from xllm import cli
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.traffic import read_traffic
from xllm.watch.observers import Observers
from xllm.watch.profiler import Profiler, Timed

FLAGS = ("--memory", "256MiB", "--threads", "1", "--log-level", "error", "--no-prefix-cache")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its artifact."""
    options = CompileOptions(max_len=256, max_seqs=8, max_batch_tokens=128)
    return build(tmp_path_factory.mktemp("observed"), FAMILIES["qwen3"], options=options)


def ask(url: str, prompt: int, tokens: int) -> str:
    body = {
        "prompt": [300 + at % 50 for at in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_recorded_traffic_gives_buckets_that_fit_it(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, artifact = compiled
    file = tmp_path / "traffic.json"
    with serving(artifact, *FLAGS, "--record-traffic", str(file)) as server:
        for _ in range(3):
            ask(server.url, 37, 9)
            ask(server.url, 90, 5)
        assert not file.exists(), "it is written by the minute"
        assert "step times: predicted from the figures it was compiled with; run `xllm profile" in server.said
        steps = server.metric("num_processing_tokens_total_generated")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing is left beside it"
    seen = dict(read_traffic(file))
    assert seen.pop(1) == 3 * 8 + 3 * 4 and seen == {37: 3, 90: 3} and steps == 42
    told = json.loads(file.read_text())["seen"]
    buckets = [bucket.T for bucket in Artifact.open(artifact).plan.buckets]
    wide = [next(str(size) for size in buckets if size >= tokens) for tokens in (37, 90)]
    assert told["rows"] == {"1": 42} and (told["decodes"], told["prompts"], told["prompt_tokens"]) == (36, 6, 381)
    ones = {} if 1 in buckets else {str(buckets[0]): 36}
    assert told["bucket_misses"] == {**ones, **{size: 3 * wide.count(size) for size in wide}}
    limits = ["--max-len", "256", "--max-seqs", "8", "--max-batch-tokens", "128", "--quiet"]
    assert cli.main(["compile", str(checkpoint), "-o", str(tmp_path / "again"), "--traffic", str(file), *limits]) == 0
    again = [bucket.T for bucket in Artifact.open(tmp_path / "again").plan.buckets]
    assert again == [1, 37, 90, 128] != buckets


def test_a_file_that_can_not_be_written_is_refused_at_the_start(compiled, tmp_path: Path, capsys) -> None:
    for file, why in ((tmp_path / "none" / "t.json", "is not a folder that can be written to"), (tmp_path, "a folder")):
        assert cli.main(["serve", str(compiled[1]), "--record-traffic", str(file)]) == 2
        assert why in capsys.readouterr().err


def test_a_profile_of_a_server_changes_no_answer(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    _, artifact = compiled
    calls = len(Artifact.open(artifact).plan.calls)
    with serving(artifact, *FLAGS, "--profile-dir", str(tmp_path)) as server:

        def post(route: str, status: int = 200, **sent: Any) -> dict[str, Any]:
            answer = httpx.post(f"{server.url}{route}", **sent)
            assert answer.status_code == status, answer.text
            return answer.json()

        assert post("/stop_profile") == {"status": "stopped", "changed": False}
        plain = ask(server.url, 37, 9)
        assert post("/start_profile") == {"status": "running", "changed": True}
        assert post("/start_profile", json={}) == {"status": "running", "changed": False}
        assert ask(server.url, 37, 9) == plain
        refused = post("/stop_profile", 400, json={"path": "/tmp/elsewhere"})["error"]
        assert refused["param"] == "path" and "takes none" in refused["message"]
        assert httpx.get(f"{server.url}/start_profile").status_code == 405
        told = post("/stop_profile")
        assert told["changed"] and told["steps"] == 9 and told["cut"] is None
        assert post("/stop_profile") == {"status": "stopped", "changed": False}
        assert ask(server.url, 37, 9) == plain
        assert post("/start_profile")["changed"] and post("/stop_profile")["trace"] == "profile-01.trace.json"
    assert told["trace"] == "profile-00.trace.json" and told["flame_graph"] == "profile-00.svg"
    assert len(list(tmp_path.iterdir())) == 4
    events = json.loads((tmp_path / told["trace"]).read_text())["traceEvents"]
    assert_nested([event for event in events if event["ph"] == "X"])
    names = Counter(event["name"] for event in events if event["tid"] == 2)
    assert (names["prompt step"], names["decode step"], names["sampling"]) == (1, 8, 9)
    assert sum(names.values()) == 1 + 9 * (1 + calls + 1), "with the track's name"
    spans = {event["name"]: event for event in events if event["tid"] >= 100 and event["ph"] == "X"}
    assert len(spans) == 3 and spans["prompt"]["dur"] > 0 and spans["answer"]["dur"] > 0
    assert ElementTree.parse(tmp_path / told["flame_graph"]).getroot().tag.endswith("svg")


def test_profiles_start_and_end_under_load(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(compiled[1], *FLAGS, "--profile-dir", str(tmp_path)) as server, ThreadPoolExecutor(4) as pool:
        sizes = [(prompt, 20) for prompt in (5, 40, 90, 130)]
        alone = [ask(server.url, *size) for size in sizes]
        together = [pool.submit(ask, server.url, *size) for size in sizes * 6]
        while not all(asked.done() for asked in together):
            for route in ("start", "stop"):
                assert httpx.post(f"{server.url}/{route}_profile").json()["changed"]
        assert [asked.result() for asked in together] == alone * 6
        assert server.metric("request_status_total_unknown") == 0
    for file in tmp_path.glob("*.json"):
        assert_nested([event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"])


def test_a_server_without_a_folder_for_profiles_makes_none(tmp_path: Path) -> None:
    with running(fake_service(tmp_path)) as (base, _):
        for route in ("/start_profile", "/stop_profile"):
            answer = httpx.post(f"{base}{route}")
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "profiling_disabled"
            assert "--profile-dir" in answer.json()["error"]["hint"]["knob"]


def test_a_profile_that_can_not_be_written_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    folder.mkdir()
    observers = Observers(profiles=folder)
    profiles = observers.profiling
    assert profiles is not None
    profiles.profiler = Profiler(cast(Timed, SimpleNamespace(times=None)), [])
    service = fake_service(tmp_path)
    service.profiling = profiles
    with running(service) as (base, _):
        assert httpx.post(f"{base}/start_profile").json()["changed"]
        folder.rmdir()
        folder.write_text("in the way")
        answer = httpx.post(f"{base}/stop_profile")
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "profile_not_written"
        folder.unlink()
        assert httpx.post(f"{base}/stop_profile").json()["changed"]
        assert sorted(file.name for file in folder.iterdir()) == ["profile-00.svg", "profile-00.trace.json"]
        for turn in range(1, 20):
            httpx.post(f"{base}/start_profile")
            assert httpx.post(f"{base}/stop_profile").json()["flame_graph"] == f"profile-{turn % 16:02}.svg"
        assert len(list(folder.iterdir())) == 32
