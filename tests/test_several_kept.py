"""What several models of one `xllm serve` write and keep: each its own, none another's; and what is asked of one of
them leaves the others alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.encoders import write_model
from tests.models import FAMILIES, VOCAB, write_checkpoint
from tests.servers import Server, serving
from tests.service.fakes import wait_for
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.memory import plan_models

GENERATING = ("a", "b")
NAMES = (*GENERATING, "embed")
ADMIN = {"authorization": "Bearer admin"}
MAX_LEN = 4096
PROMPT = [(7 * n) % (VOCAB - 2) + 2 for n in range(1500)]
GROUPS = len(PROMPT) // 16  # of its tokens
OTHER = [(11 * n) % (VOCAB - 2) + 2 for n in range(4000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.xllm and b.xllm differ in weights alone; wide, so that keys and values are loaded rather than computed."""
    folder = tmp_path_factory.mktemp("kept")
    config = {**FAMILIES["qwen3"], "max_position_embeddings": MAX_LEN, "intermediate_size": 8192}
    for seed, name in enumerate(GENERATING):
        write_checkpoint(folder / name, config, seed=seed)
        compile_checkpoint(folder / name, folder / f"{name}.xllm", CompileOptions(max_len=MAX_LEN, max_seqs=4))
    compile_checkpoint(
        write_model(folder / "embed", "bert"), folder / "embed.xllm", CompileOptions(max_batch_tokens=96)
    )
    (folder / "admins").write_text("admin\n")
    return folder


def served(folder: Path, names: tuple[str, ...], *flags: str) -> Any:
    named = [word for name in names for word in ("--served-model-name", name)]
    admins = ("--admin-key-file", str(folder / "admins"), "--log-level", "error")
    return serving([folder / f"{name}.xllm" for name in names], *named, *admins, *flags)


def ask(server: Server, name: str, prompt: list[int], **fields: Any) -> tuple[int, Any]:
    """Cached tokens; tokens with their logprobs."""
    body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | fields, timeout=120)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    return got["usage"]["prompt_tokens_details"]["cached_tokens"], got["choices"][0]["logprobs"]


def least(folder: Path, names: tuple[str, ...]) -> str:
    """Memory for one longest request of each of these models."""
    opened = [Artifact.open(folder / f"{name}.xllm") for name in names]
    pages = sum(-(-MAX_LEN // one.plan.kv.group_tokens * one.plan.kv.group_bytes // (2 << 20)) for one in opened)
    return str(sum(ledger.own for ledger in plan_models(opened, None).ledgers) + pages * (2 << 20))


def test_equal_prompts_of_equal_shapes_share_nothing_in_pages_nor_tiers(folder: Path, tmp_path: Path) -> None:
    """Each finds its own again: in the pages, in the host's memory, on the disk after a start in another order."""
    tiers = ("--disk-cache", str(tmp_path / "kv"), "--disk-cache-size", "256MiB")
    memory = ("--memory", least(folder, GENERATING))
    with served(folder, GENERATING, *memory, *tiers, "--host-cache", "128MiB") as server:
        first = {name: ask(server, name, PROMPT) for name in GENERATING}
        assert [cached for cached, _ in first.values()] == [0, 0], "the other one computed the same text before"
        assert first["a"][1] != first["b"][1]
        for name in GENERATING:
            wait_for(lambda name=name: server.metric("kv_tier_stored_total", name) >= 2 * GROUPS)
        for name in GENERATING:
            ask(server, name, OTHER)
        for name in GENERATING:
            cached, again = ask(server, name, PROMPT)
            assert cached > 0 and again == first[name][1]
            assert server.metric("kv_tier_loads_total", name) > 0
    with served(folder, GENERATING[::-1], *memory, *tiers) as server:
        for name in GENERATING:
            cached, again = ask(server, name, PROMPT)
            assert cached > 0 and again == first[name][1]


def test_one_artifact_under_two_names_has_two_disk_caches(folder: Path, tmp_path: Path) -> None:
    flags = ("--disk-cache", str(tmp_path / "kv"), "--disk-cache-size", "64MiB")
    paths = [folder / "a.xllm"] * 2
    with serving(
        paths, "--served-model-name", "x", "--served-model-name", "y", *flags, "--log-level", "error"
    ) as server:
        assert ask(server, "x", PROMPT)[1] == ask(server, "y", PROMPT)[1]
        for name in ("x", "y"):
            wait_for(lambda name=name: server.metric("kv_tier_stored_total", name) >= GROUPS)
    assert len([*(tmp_path / "kv").glob("kv-*/*.kv")]) == len([*(tmp_path / "kv" / "y").glob("kv-*/*.kv")]) >= GROUPS


def test_each_has_files_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Profiles, traffic and decisions."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    flags = ["--profile-dir", str(profiles), "--record-traffic", str(tmp_path / "steps.json")]
    with served(folder, NAMES, *flags, "--trace-decisions", str(tmp_path / "why.jsonl")) as server:

        def order(path: str) -> httpx.Response:
            return httpx.post(f"{server.url}{path}", headers=ADMIN, timeout=60)

        assert order("/start_profile?model=nobody").status_code == 404
        started = order("/start_profile").json()["models"]
        assert started == {name: {"status": "running", "changed": True} for name in NAMES}
        ask(server, "a", PROMPT[:30])
        ask(server, "b", PROMPT[:90], max_tokens=16)
        httpx.post(f"{server.url}/v1/embeddings", json={"model": "embed", "input": "a fox"}, timeout=60)
        only = order("/stop_profile?model=b").json()
        assert only["status"] == "stopped" and only["changed"]
        rest = order("/stop_profile").json()["models"]
        assert [rest[name]["changed"] for name in NAMES] == [True, False, True]
        steps = {name: answer["steps"] for name, answer in (rest | {"b": only}).items()}
        assert steps["a"] == 8 and steps["b"] == 16 and steps["embed"] == 1
    for name in NAMES:
        assert sorted(file.name for file in (profiles / name).iterdir()) == ["profile-00.svg", "profile-00.trace.json"]
    assert sorted(file.name for file in tmp_path.glob("steps*")) == [f"steps-{name}.json" for name in NAMES]
    assert sorted(file.name for file in tmp_path.glob("why*")) == [f"why-{name}.jsonl" for name in GENERATING]
    lengths = {name: (tmp_path / f"why-{name}.jsonl").read_text().count("\n") for name in GENERATING}
    assert 8 <= lengths["a"] < 16 <= lengths["b"]


def lines_for(counts: dict[str, int]) -> bytes:
    """Of a batch: so many for each model, by turns."""
    names = [name for at in range(max(counts.values())) for name in counts if at < counts[name]]
    found = []
    for at, name in enumerate(names):
        body = {"model": name, "prompt": [at + 2, 5, 9], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        found.append({"custom_id": f"{at}-{name}", "method": "POST", "url": "/v1/completions", "body": body})
    return "\n".join(map(json.dumps, found)).encode()


def results(server: Server, batch: dict[str, Any], which: str) -> dict[str, Any]:
    text = httpx.get(f"{server.url}/v1/files/{batch[which]}/content", timeout=60).text
    found = [json.loads(line) for line in text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found), "a line was answered twice"
    return {line["custom_id"]: line["response"] for line in found}


def test_a_batch_of_several_models_goes_on_after_the_process_was_killed(folder: Path, tmp_path: Path) -> None:
    """One line is for a model that is not here, one for a model that does not generate; the answers are each model's
    own."""
    counts = {"a": 60, "b": 60, "nobody": 1, "embed": 1}
    flags = ("--state-dir", str(tmp_path / "state"))

    def look(server: Server, batch: str) -> dict[str, Any]:
        return httpx.get(f"{server.url}/v1/batches/{batch}", timeout=60).json()

    with served(folder, NAMES, *flags) as server:
        sent = {"files": {"file": ("lines.jsonl", lines_for(counts))}, "data": {"purpose": "batch"}}
        file = httpx.post(f"{server.url}/v1/files", **sent, timeout=60).json()["id"]
        made = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = httpx.post(f"{server.url}/v1/batches", json=made, timeout=60).json()["id"]
        wait_for(lambda: look(server, batch)["request_counts"]["completed"] > 5)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(20)
    with served(folder, NAMES[::-1], *flags) as server:
        wait_for(lambda: look(server, batch)["status"] == "completed")
        ended = look(server, batch)
        assert ended["request_counts"] == {"total": 122, "completed": 120, "failed": 2}
        failed = results(server, ended, "error_file_id")
        codes = {name.partition("-")[2]: answer["body"]["error"]["code"] for name, answer in failed.items()}
        assert codes == {"nobody": "model_not_found", "embed": "wrong_task"}
        answers = results(server, ended, "output_file_id")
        for name, at in (("a", 0), ("b", 1), ("a", 4), ("b", 119)):
            body = answers[f"{at}-{name}"]["body"]
            asked = {"model": name, "prompt": [at + 2, 5, 9], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            again = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60).json()
            assert (body["model"], body["choices"]) == (name, again["choices"])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, NAMES, "--weights-dir", str(folder)) as running:
        yield running


@pytest.mark.parametrize("path", ["/pause", "/resume", "/sleep", "/wakeup", "/update_weights"])
def test_an_order_for_a_model_that_is_not_here_is_not_found(server: Server, path: str) -> None:
    body = {"model_id": "nobody"} | ({"path": "b.xllm"} if path == "/update_weights" else {})
    answer = httpx.post(f"{server.url}{path}", json=body, headers=ADMIN, timeout=60)
    assert answer.status_code == 404 and "a, b, embed" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/livez", "/ready", "/readyz", "/is_sleeping", "/ui/state"])
def test_a_look_at_a_model_that_is_not_here_is_not_found(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}?model=nobody", headers=ADMIN).status_code == 404
    assert httpx.get(f"{server.url}{path}?model=embed", headers=ADMIN).status_code == 200


def test_other_weights_of_one_leave_the_others_theirs(server: Server) -> None:
    first = {name: ask(server, name, PROMPT[:50]) for name in GENERATING}

    def update(path: str) -> dict[str, Any]:
        body = {"model_id": "b", "path": path}
        return httpx.post(f"{server.url}/update_weights", json=body, headers=ADMIN, timeout=60).json()

    assert update("a.xllm")["changed"]
    listed = {model["id"]: model.get("weights") for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert listed["a"] == listed["b"] and listed.keys() == set(NAMES)
    assert ask(server, "b", PROMPT[:50]) == (0, first["a"][1]), "equal weights by now, and pages of its own"
    assert ask(server, "a", PROMPT[:50])[1] == first["a"][1]
    assert update("b.xllm")["changed"] and ask(server, "b", PROMPT[:50])[1] == first["b"][1]


def test_one_sleeps_and_the_others_answer(server: Server) -> None:
    before = ask(server, "b", PROMPT[:70])[1]
    embedding = {"model": "embed", "input": "a fox"}
    vector = httpx.post(f"{server.url}/v1/embeddings", json=embedding, timeout=60).json()["data"]
    order = {"json": {"model_id": "a", "level": "deep"}, "headers": ADMIN, "timeout": 60}
    assert httpx.post(f"{server.url}/sleep", **order).json()["is_sleeping"]
    try:
        states = httpx.get(f"{server.url}/is_sleeping", headers=ADMIN).json()["models"]
        assert [states[name]["is_sleeping"] for name in NAMES] == [True, False, False]
        assert [server.metric("engine_asleep", name) for name in GENERATING] == [2, 0]
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert [httpx.get(f"{server.url}/ready?model={name}").status_code for name in NAMES] == [503, 200, 200]
        assert ask(server, "b", PROMPT[:70])[1] == before
        assert httpx.post(f"{server.url}/v1/embeddings", json=embedding, timeout=60).json()["data"] == vector
        assert httpx.post(f"{server.url}/v1/completions", json={"model": "a", "prompt": "x"}).status_code == 503
    finally:
        order["json"] = {"model_id": "a"}
        assert not httpx.post(f"{server.url}/wakeup", **order).json()["is_sleeping"]
    assert ask(server, "a", PROMPT[:70])[1] != before


@pytest.mark.parametrize("name", ["b", "embed"])
def test_a_model_that_can_t_be_loaded_is_named_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    broken = tmp_path / f"broken-{name}.xllm"
    for file in (folder / f"{name}.xllm").rglob("*"):
        if file.is_file():
            target = broken / file.relative_to(folder / f"{name}.xllm")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    plan = broken / "plan.json"
    plan.write_bytes(plan.read_bytes()[:-9] + b"}")
    command = [sys.executable, "-m", "xllm.cli", "serve", str(folder / "a.xllm"), str(broken), "--port", "0"]
    done = subprocess.run([*command, "--log-level", "error"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{broken}: plan.json is not what the compiler wrote" in done.stderr
