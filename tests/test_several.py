"""Several models in one `xllm serve`: each answers as it does alone, to the bit, whatever the others take of pages."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.encoders import write_model
from tests.models import FAMILIES, VOCAB, build
from tests.servers import Server, serving
from tests.service.fakes import wait_for
from xllm import cli
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.memory import plan_models
from xllm.serving import _file_part

NAMES = ("chat", "long", "embed")
ADMIN = {"authorization": "Bearer admin"}
PAGE = 2 << 20
# One longest request of the story model is a page, one of the other model 4.
PAGES = 7


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("several")
    made = {name: root / f"{name}.xllm" for name in NAMES}
    compile_checkpoint(checkpoint_path(), made["chat"], CompileOptions(max_seqs=8))
    config = {**FAMILIES["qwen3"], "max_position_embeddings": 8192}
    made["long"] = build(root / "long", config, options=CompileOptions(max_len=8192, max_seqs=4))[1]
    compile_checkpoint(write_model(root / "embed", "bert"), made["embed"], CompileOptions(max_batch_tokens=96))
    return made


def memory_for(artifacts: Mapping[str, Path], pages: int) -> str:
    opened = [Artifact.open(path) for path in artifacts.values()]
    return str(sum(ledger.own for ledger in plan_models(opened, None).ledgers) + pages * PAGE)


@pytest.fixture(scope="module")
def server(artifacts: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "admins.txt"
    keys.write_text("admin\n")
    names = [word for name in NAMES for word in ("--served-model-name", name)]
    flags = (*names, "--memory", memory_for(artifacts, PAGES), "--admin-key-file", str(keys), "--log-level", "error")
    with serving(list(artifacts.values()), *flags) as running:
        yield running


def requests() -> list[tuple[str, dict[str, Any]]]:
    """By model. Those of the long one need more pages together than there are (who gives way: tests/runtime)."""
    found: list[tuple[str, dict[str, Any]]] = []
    for n in range(8):
        prompt = f"<|im_start|>user\nTell me a story about {('a fox', 'an owl', 'a lamp')[n % 3]}.<|im_end|>\n"
        asked = {"prompt": f"{prompt}<|im_start|>assistant\n", "max_tokens": 60, "temperature": n % 2, "seed": n}
        found.append(("chat", asked | {"logprobs": 2}))
    prompt = [(7 * at) % (VOCAB - 2) + 2 for at in range(3936)]  # the first computes it, then all decode together
    for n in range(4):
        asked = {"prompt": prompt, "max_tokens": 240, "temperature": 1, "seed": n, "ignore_eos": True}
        found.append(("long", asked | {"logprobs": 2}))
    return found + [("embed", {"input": ["a fox", "the lantern" * n]}) for n in (1, 2, 3)]


def ask(url: str, name: str, body: dict[str, Any]) -> Any:
    """What the model gave: text, tokens and logprobs, or embeddings."""
    path = "embeddings" if name == "embed" else "completions"
    answer = httpx.post(f"{url}/v1/{path}", json=body | {"model": name}, timeout=300)
    assert answer.status_code == 200, answer.text
    got = answer.json()
    return [item["embedding"] for item in got["data"]] if name == "embed" else got["choices"]


@pytest.fixture(scope="module")
def alone(artifacts: Mapping[str, Path]) -> list[Any]:
    """The answers of servers that have one model each."""
    answers: dict[str, list[Any]] = {}
    for name in NAMES:
        with serving(artifacts[name], "--served-model-name", name, "--log-level", "error") as one:
            answers[name] = [ask(one.url, name, body) for whose, body in requests() if whose == name]
    return [answer for name in NAMES for answer in answers[name]]


def test_all_at_once_in_little_memory_answer_as_alone(server: Server, alone: list[Any]) -> None:
    httpx.post(f"{server.url}/pause", headers=ADMIN, timeout=60)  # so that all begin at once
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, server.url, name, body) for name, body in requests()]
        wait_for(lambda: server.metric("num_waiting_requests") == 8 + 4)
        httpx.post(f"{server.url}/resume", headers=ADMIN, timeout=60)
        assert [one.result() for one in asked] == alone
    assert server.metric("num_running_requests") == server.metric("num_used_blocks") == 0


def test_the_official_client_chooses_by_name(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        assert [model.id for model in client.models.list()] == list(NAMES)
        messages: Any = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.create(model="chat", messages=messages, temperature=0, max_tokens=60)
        assert answer.model == "chat" and answer.choices[0].message.content
        vectors = client.embeddings.create(model="embed", input=["a", "b"]).data
        assert len(vectors) == 2
        with pytest.raises(openai.NotFoundError, match="chat, long, embed"):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError, match="embed computes embeddings"):
            client.chat.completions.create(model="embed", messages=messages)


def test_who_sleeps_leaves_its_pages_to_the_others(server: Server) -> None:
    name, body = requests()[0]
    before = ask(server.url, name, body)
    assert server.metric("num_free_blocks", "long") == PAGES - 1
    asleep = httpx.post(f"{server.url}/sleep", json={"model_id": "chat"}, headers=ADMIN)
    assert asleep.json() == {"is_sleeping": True, "level": "light", "changed": True}
    assert server.metric("num_free_blocks", "long") == PAGES
    refused = httpx.post(f"{server.url}/v1/completions", json=body | {"model": "chat"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "asleep"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/ready?model=long").status_code == 200
    long = [(whose, asked) for whose, asked in requests() if whose == "long"]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, server.url, *one) for one in long]
        woken = httpx.post(f"{server.url}/wakeup", json={"model_id": "chat"}, headers=ADMIN, timeout=300)
        assert woken.json()["changed"]
        assert ask(server.url, name, body) == before
        for one in running:
            one.result()
    assert server.metric("num_free_blocks", "long") == PAGES - 1


def test_an_order_without_a_name_is_for_all_that_generate(server: Server) -> None:
    held = httpx.post(f"{server.url}/pause", headers=ADMIN, timeout=60).json()["models"]
    assert held == {name: {"status": "paused", "changed": True} for name in ("chat", "long")}
    assert server.metric("engine_paused", "chat") == server.metric("engine_paused", "long") == 1
    went_on = httpx.post(f"{server.url}/resume", headers=ADMIN, timeout=60).json()["models"]
    assert went_on == {name: {"status": "running", "changed": True} for name in ("chat", "long")}


def test_what_is_printed_names_all_and_memory_is_for_all(server: Server) -> None:
    assert "memory of chat, long, embed" in server.said
    assert re.search(rf"KV pages +{PAGES * 2}\.0 MiB", server.said)


def test_an_interrupt_ends_all_of_them(artifacts: Mapping[str, Path]) -> None:
    names = [word for name in NAMES for word in ("--served-model-name", name)]
    with serving(list(artifacts.values()), *names, "--log-level", "error") as running:
        ask(running.url, *requests()[0])
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0


def test_too_little_memory_for_all_is_refused_with_what_it_takes(artifacts: Mapping[str, Path]) -> None:
    opened = [Artifact.open(path) for path in artifacts.values()]
    with pytest.raises(ArtifactError, match="one sequence of 1024 tokens and one sequence of 8192 tokens need 10MiB"):
        plan_models(opened, int(memory_for(artifacts, 4)))
    plan = plan_models(opened, int(memory_for(artifacts, 5)))
    assert (plan.pages, plan.page_bytes) == (5, PAGE)


def test_names_are_one_for_each_model(artifacts: Mapping[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(artifacts["embed"])
    assert cli.main(["serve", path, path, "--port", "0"]) == 2
    assert "two models are called" in capsys.readouterr().err
    assert cli.main(["serve", path, path, "--served-model-name", "a", "--port", "0"]) == 2
    assert "once for each model" in capsys.readouterr().err


def test_names_become_parts_of_files_in_one_folder() -> None:
    names = {"a/b": "a_b", "..": "_", "../c": "_c", "Qwen3-0.6B": "Qwen3-0.6B"}
    assert {name: _file_part(name) for name in names} == names
