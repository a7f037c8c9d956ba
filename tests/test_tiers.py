"""Tiers below the KV pool through `xllm serve`: what it evicted, or an earlier server computed, is loaded."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models import FAMILIES, VOCAB, build
from tests.servers import Server, serving
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions
from xllm.llm import LOAD_WAIT_SECONDS, load_cost
from xllm.memory import PROCESS_BYTES, plan_memory
from xllm.runtime.config import LoadCost
from xllm.runtime.cost import Basis, StepCost

PROMPT = [(7 * n) % (VOCAB - 2) + 2 for n in range(5000)]
KEYS = ("one", "two")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide: on any disk its keys and values are loaded faster than computed.
    config = {**FAMILIES["qwen3"], "max_position_embeddings": 8192, "intermediate_size": 8192}
    return build(tmp_path_factory.mktemp("tiers"), config, options=CompileOptions(max_len=8192, max_seqs=4))[1]


@pytest.fixture(scope="module")
def least(artifact: Path) -> tuple[str, str]:
    """As little memory as one sequence of full length needs: the next text drives out the one before."""
    opened = Artifact.open(artifact)
    one = -(-8192 // opened.plan.kv.group_tokens * opened.plan.kv.group_bytes // (2 << 20)) * (2 << 20)
    return "--memory", str(opened.weight_bytes + opened.plan.arena_bytes + PROCESS_BYTES + one)


def ask(server: Server, prompt: list[int], key: str = "", **fields: Any) -> tuple[int, Any]:
    """Cached tokens, and tokens with their logprobs."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2, "ignore_eos": True, **fields}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    return got["usage"]["prompt_tokens_details"]["cached_tokens"], got["choices"][0]["logprobs"]


def evict(server: Server) -> None:
    ask(server, [(11 * n) % (VOCAB - 2) + 2 for n in range(8100)])


def stored(server: Server, groups: int) -> None:
    """Wait until the background has copied so many groups to every tier."""
    end = time.monotonic() + 60
    while server.metric("kv_tier_stored_total") < groups and time.monotonic() < end:
        time.sleep(0.02)
    assert server.metric("kv_tier_stored_total") >= groups


def test_behaviour_61_with_the_pool_s_cache_emptied_the_host_tier_has_it(
    artifact: Path, least: tuple[str, str]
) -> None:
    with serving(artifact, *least, "--host-cache", "64MiB") as server:
        assert "host cache" in server.said and "beside --memory" in server.said
        nothing, computed = ask(server, PROMPT)
        stored(server, 312)
        evict(server)
        assert server.metric("prefix_cache_evicted_blocks_total") > 0
        cached, loaded = ask(server, PROMPT)
        assert (nothing, cached) == (0, 4992)
        assert loaded == computed
        assert server.metric("kv_tier_hits_total") > 0 and server.metric("kv_tier_loads_total") == 1


def refused(artifact: Path, *flags: str) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-m", "xllm.cli", "serve", str(artifact), "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_new_server_finds_what_a_killed_one_computed(artifact: Path, least: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    flags = (*least, "--disk-cache", str(folder), "--disk-cache-size", "64MiB")
    with serving(artifact, *flags) as server:
        _, computed = ask(server, PROMPT)
        stored(server, 312)
        assert "another server uses it" in refused(artifact, *flags)
        server.process.send_signal(signal.SIGKILL)
    with serving(artifact, *flags) as server:
        assert ask(server, PROMPT) == (4992, computed)
        evict(server)
        files = sorted(folder.glob("kv-*/*.kv"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[::40]:
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        cached, loaded = ask(server, PROMPT)
        assert cached < 4992 and loaded == computed
        assert server.metric("kv_tier_corrupt_total") > 0
        assert server.metric("kv_tier_off") == 0
        evict(server)
        shutil.rmtree(folder)
        assert ask(server, [*PROMPT[1:], 3])[0] == 0
        assert ask(server, PROMPT)[1] == computed
        lines = httpx.get(f"{server.url}/metrics").text
        assert re.search(r'^kv_tier_off\{[^}]*reason="ENOENT",tier="disk"\} 1.0$', lines, re.MULTILINE)


def test_keys_and_salts_share_nothing(artifact: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    prompt = PROMPT[:100]
    with serving(artifact, "--memory", "256MiB", "--host-cache", "16MiB", "--api-key-file", str(keys)) as server:
        tenants = [(key, fields) for key in KEYS for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"})]
        first = [ask(server, prompt, key, **fields) for key, fields in tenants]
        again = [ask(server, prompt, key, **fields) for key, fields in tenants]
        assert [cached for cached, _ in first] == [0] * 6
        assert [cached for cached, _ in again] == [96] * 6
        assert len({str(answer) for _, answer in first + again}) == 1
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "a" * 100}], "max_tokens": 2}
        for salt, hit in (("a", False), ("b", False), ("a", True)):
            body = {**chat, "cache_salt": salt}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
            assert (answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == hit


def test_what_can_not_be_is_refused(artifact: Path) -> None:
    assert "give --disk-cache DIR too" in refused(artifact, "--disk-cache-size", "1GiB")
    assert "leave --no-prefix-cache out" in refused(artifact, "--host-cache", "1GiB", "--no-prefix-cache")
    opened = Artifact.open(artifact)
    with pytest.raises(ArtifactError, match="holds no 16 tokens"):
        plan_memory(opened, 256 << 20, host_cache=100)
    with pytest.raises(ArtifactError, match="give a smaller --host-cache"):
        plan_memory(opened, 256 << 20, host_cache=1 << 40)
    ledger = plan_memory(opened, 256 << 20, host_cache=64 << 20)
    assert ledger.host_cache == 64 << 20 and ledger.total <= (256 + 64) << 20


def test_loading_is_compared_by_what_it_takes_here(artifact: Path, tmp_path: Path, monkeypatch) -> None:
    held = Artifact.open(artifact)
    kv, tokens = held.plan.kv, held.plan.buckets[-1].T
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("xllm.llm.host_seconds", lambda *given: asked.append(given) or 1e-9)
    monkeypatch.setattr("xllm.llm.disk_seconds", lambda *given: asked.append(given) or 5e-9)
    fitted = StepCost(Basis((1,), (1,), (0,)), (0.0, 0.0, 2e-3, 0.0, 0.0, 0.0))
    found = load_cost(held, str(tmp_path), fitted)
    assert found.compute == pytest.approx(2e-3)
    assert found == LoadCost(found.compute, kv.token_bytes * 1e-9, kv.token_bytes * 5e-9, LOAD_WAIT_SECONDS)
    assert asked == [(kv.group_bytes,), (str(tmp_path), kv.group_bytes)] and tokens > 1
    assert load_cost(held, None).disk == 0 < load_cost(held, None).compute != found.compute
