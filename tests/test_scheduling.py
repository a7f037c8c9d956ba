"""Schedulers and classes through the public surfaces: the same answers whoever goes first, online before offline."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.models import FAMILIES, build
from tests.servers import Server, serving
from xllm import cli
from xllm.compiler import CompileOptions
from xllm.offline import LLM
from xllm.runtime import RequestRefused, RuntimeFault
from xllm.runtime.policies import MODIFIERS, PRESETS
from xllm.runtime.policies.orders import ORDERS

PROMPTS = [[index, 7, index + 2] * (1 + 9 * index) for index in range(6)]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        tmp_path_factory.mktemp("scheduling"), FAMILIES["qwen3"], options=CompileOptions(max_len=256, max_seqs=4)
    )[1]


@pytest.mark.parametrize(
    ("scheduler", "order"),
    [*((name, None) for name in PRESETS if name != "chunked"), ("chunked+latency-aware+zero-evict", "sjf")],
)
def test_every_scheduler_gives_the_same_answers(artifact: Path, scheduler: str, order: str | None) -> None:
    with LLM(artifact, threads=1) as plain:
        expected = plain.generate(PROMPTS, **GREEDY)
    with LLM(artifact, threads=1, scheduler=scheduler, order=order) as other:
        urgency = {"priority": "LOW", "offline": True, "ttft_slo_ms": 500, "tpot_slo_ms": 20.0}
        assert other.generate(PROMPTS, **GREEDY) == expected
        assert other.generate(PROMPTS, **GREEDY, **urgency) == expected
        with pytest.raises(RequestRefused, match="tpot_slo_ms is nan"):
            other.generate(PROMPTS, **GREEDY, tpot_slo_ms=float("nan"))


def test_a_policy_that_there_is_not(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeFault, match="order is 'newest', there are fcfs"):
        LLM(artifact, order="newest")
    assert cli.main(["serve", str(artifact), "--port", "0", "--scheduler", "best"]) == cli.EXIT_INPUT
    assert "scheduler is 'best', there are chunked, continuous" in capsys.readouterr().err


def test_help_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = re.sub(r"-\n\s+", "-", capsys.readouterr().out)
    told = set(re.findall(r"[a-z][a-z_-]+", text))
    assert {*PRESETS, *MODIFIERS, *ORDERS} <= told


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    flags = ("--memory", "256MiB", "--scheduler", "mix", "--order", "urgency_priority")
    with serving(artifact, *flags, "--log-level", "error") as running:
        yield running


def test_online_requests_take_the_slots_of_offline_ones(server: Server) -> None:
    """Sixty offline answers take turns in four slots, of which one is kept free; three online ones among them are
    answered at once, and all end as they do alone."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    model = client.models.list().data[0].id
    ask = {"model": model, "prompt": "offline", "max_tokens": 200, "temperature": 0}
    extra = {"ignore_eos": True, "offline": True}
    alone = client.completions.create(**ask, extra_body=extra).choices[0].text
    said, done = [""] * 60, []
    started = threading.Event()

    def offline() -> None:
        for chunk in client.completions.create(**ask, n=60, stream=True, extra_body=extra):
            said[chunk.choices[0].index] += chunk.choices[0].text
            started.set()
        done.append("offline")

    thread = threading.Thread(target=offline)
    thread.start()
    assert started.wait(60)
    urgent = {"ignore_eos": True, "priority": "HIGH", "ttft_slo_ms": 100, "tpot_slo_ms": 50}
    client.completions.create(model=model, prompt="online", n=3, max_tokens=2, extra_body=urgent)
    done.append("online")
    thread.join()
    assert done == ["online", "offline"] and said == [alone] * 60
    told = httpx.get(f"{server.url}/metrics").text
    counts = dict(re.findall(r"^num_(\w+_preempt_\w+)_requests\{[^}]*\} (\d+)", told, re.MULTILINE))
    assert int(counts["online_prefill_preempt_offline"]) >= 1


def test_decisions_of_a_server_are_written_and_taken_again(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "decisions.jsonl"
    with serving(artifact, "--threads", "1", "--scheduler", "mix", "--trace-decisions", str(file)) as server:
        body = {"prompt": [3, 7, 2], "max_tokens": 9, "ignore_eos": True, "ttft_slo_ms": 900, "tpot_slo_ms": 90}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert cli.main(["replay", str(file)]) == 0
    assert re.fullmatch(r"\d+ decisions of mix: all are the same again\n", capsys.readouterr().out)
    text = file.read_text()
    assert text.count("\n") >= 10
    file.write_text(re.sub(r'"sample":true|"grants":\[\[0,1,', '"grants":[[0,2,', text))
    assert cli.main(["replay", str(file)]) == cli.EXIT_FAULT
    assert re.search(r"differ, the first: decision \d+ at [\d.]+ s, grants: was", capsys.readouterr().out)
    assert cli.main(["replay", str(artifact / "manifest.json")]) == cli.EXIT_INPUT
    assert "not a schedule's trace" in capsys.readouterr().err
    assert cli.main(["serve", str(artifact), "--trace-decisions", str(tmp_path)]) == cli.EXIT_INPUT
    assert "--trace-decisions" in capsys.readouterr().err
