"""Behaviour 64: the names that dashboards look for are there, and counters only grow.

python -m tests.service.test_metrics > docs/metrics.md
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.fakes import fake_service, running
from xllm.runtime import EngineStats
from xllm.runtime.policies.state import CAUSES
from xllm.runtime.tiers import TierFigures
from xllm.service.backlog import Backlog
from xllm.service.exposition import families
from xllm.service.metrics import STATUSES, Front, Recorder

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
RELEASED = (
    *(f"request_status_total_{status}" for status in STATUSES),
    *(f"request_handling_latency_seconds_{kind}" for kind in ("chat", "completion")),
    *(f"{name}_latency_seconds" for name in ("tokenization", "chat_template", "scheduling", "allocate_blocks")),
    *("prepare_input_latency_seconds", "engine_latency_seconds", "worker_service_latency_seconds"),
    *(
        f"{name}_latency_seconds_{kind}"
        for name in ("detokenization", "responsing")
        for kind in ("stream", "non_stream")
    ),
    *(f"execution_latency_seconds_{name}" for name in ("model", "logits_processing", "sampling")),
    *(f"prefix_cache_latency_seconds_{name}" for name in ("insert", "match", "evict")),
    *("prefix_cache_match_length_total", "num_model_execution_total_eager"),
    *("num_processing_tokens_total_prompt", "num_processing_tokens_total_generated", "server_request_in_total"),
    *(f"server_request_total_{name}" for name in ("ok", "limit", "fail")),
    *(f"speculative_execution_latency_seconds_{name}" for name in ("draft", "target", "validation")),
    *("speculative_num_accepted_tokens_total", "speculative_num_draft_tokens_total"),
    *(f"num_{name}_requests" for name in ("pending", "running", "waiting", "preempted", *CAUSES)),
    *("num_running_sequences", "kv_cache_utilization_perc", "num_blocks_in_prefix_cache", "num_free_blocks"),
    *("num_used_blocks", "num_concurrent_requests"),
    *("xllm_cpu_num", "xllm_cpu_utilization", "xllm_gpu_num", "xllm_gpu_utilization"),
    *(f"{name}_size_in_kilobytes" for name in ("total_memory", "weight", "total_kv_cache", "total_activation")),
    *(f"prefix_cache_block_matched_{name}" for name in ("rate", "num")),
    *("num_prompt_tokens_per_request", "num_generated_tokens_per_request", "time_to_first_token_latency_milliseconds"),
    *("inter_token_latency_milliseconds", "end_2_end_latency_milliseconds"),
)
DASHBOARD = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    *("cache_config_info", "lora_requests_info", "num_preemptions", "prompt_tokens", "generation_tokens"),
    *("request_success", "prefix_cache_queries", "prefix_cache_hits"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
    *("spec_decode_num_accepted_tokens_per_pos", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("time_per_output_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *(f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode", "inference")),
    *("request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens"),
    "iteration_tokens_total",
)
SPECULATION = "nothing is speculated"
ABSENT = {
    "worker_service_latency_seconds": "engine and server are one process",
    "execution_latency_seconds_logits_processing": "part of sampling: in execution_latency_seconds_sampling",
    "prefix_cache_latency_seconds_evict": "part of getting a page: in allocate_blocks_latency_seconds",
    "xllm_gpu_utilization": "there is no accelerator",
    "vllm:lora_requests_info": "there are no adapters",
    "speculative_execution_latency_seconds_{draft,target,validation}": SPECULATION,
    "speculative_num_{accepted,draft}_tokens_total": SPECULATION,
    "vllm:spec_decode_num_{drafts,draft_tokens,accepted_tokens,accepted_tokens_per_pos}": SPECULATION,
}


def shown() -> list[Any]:
    """All families that a server of a model with tiers and weights of a version has."""
    recorder = Recorder("model")
    recorder.memory = dict.fromkeys(("total_memory", "weight", "total_kv_cache", "total_activation"), 1)
    tier = TierFigures("host", 0, 1, 1, 0, 0, 0, 0, "")
    stats = EngineStats(tiers=(tier,), weights="1", seconds={"schedule": 0.0})
    return families(Front(), [(recorder, stats, Backlog())])


def absent() -> set[str]:
    names = set[str]()
    for name in ABSENT:
        head, brace, rest = name.partition("{")
        parts, _, tail = rest.partition("}")
        names |= {head + part + tail for part in parts.split(",")} if brace else {name}
    return names


def test_every_name_is_there_or_said_to_be_absent() -> None:
    wanted = {*RELEASED, *(f"vllm:{name}" for name in DASHBOARD)}
    there = {metric.name for metric in shown()}
    assert not wanted - there - absent()
    assert not absent() & there and absent() <= wanted


def scrape(base: str) -> dict[tuple[str, str], float]:
    """Values by name and labels, and the type of each."""
    text = httpx.get(f"{base}/metrics").text
    return {
        (family.type, f"{sample.name} {sorted(sample.labels.items())}"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_behaviour_64_counters_only_grow(tmp_path: Path) -> None:
    service = fake_service(tmp_path)
    asked = [
        {"prompt": "abc", "max_tokens": 3, "temperature": 0},
        {"prompt": "abc", "max_tokens": 3, "temperature": 0, "stream": True, "n": 2},
        {"prompt": ""},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ]
    with running(service) as (base, _):
        last = scrape(base)
        for body in asked:
            route = "chat/completions" if "messages" in body else "completions"
            httpx.post(f"{base}/v1/{route}", json=body)
            found = scrape(base)
            counters = {key for key in last if key[0] in ("counter", "histogram") or "_total" in key[1]}
            assert counters <= found.keys()
            assert not {key: found[key] for key in counters if found[key] < last[key]}
            last = found
    values = {name: value for (_, name), value in last.items()}
    own, theirs = "[('model_name', 'fake')]", "[('engine', '0'), ('model_name', 'fake')]"
    # Four sequences had tokens, 3 + 2 * 3 + 2 of them; one request was refused.
    for part in ("queue", "prefill", "decode", "inference"):
        assert values[f"vllm:request_{part}_time_seconds_count {theirs}"] == 4
    parts = [values[f"vllm:request_{part}_time_seconds_sum {theirs}"] for part in ("prefill", "decode", "inference")]
    assert parts[2] == pytest.approx(parts[0] + parts[1])
    assert values[f"vllm:request_time_per_output_token_seconds_count {theirs}"] == 4
    assert values[f"vllm:inter_token_latency_seconds_count {theirs}"] == 11 - 4
    assert values[f"vllm:request_params_max_tokens_sum {theirs}"] == 3 + 3 * 1 + 2
    assert values["requests_refused_total [('reason', 'empty_prompt')]"] == 1
    for name in ("chat_template_latency_seconds", "tokenization_latency_seconds"):
        assert values[f"{name} {own}"] > 0
    for kind in ("stream", "non_stream"):
        assert values[f"detokenization_latency_seconds_{kind} {own}"] > 0
        assert values[f"responsing_latency_seconds_{kind} {own}"] > 0
    assert 0 < values["xllm_cpu_utilization []"] <= 1


def test_a_chat_that_is_refused_after_its_template_was_prepared_too(tmp_path: Path) -> None:
    """Or the time of tokenization, which is without templates, would go back."""
    service = fake_service(tmp_path)
    with running(service) as (base, _):
        body = {"messages": [{"role": "user", "content": "x" * 10_000}]}
        assert httpx.post(f"{base}/v1/chat/completions", json=body).status_code == 400
    assert service.recorder.tokenization_seconds > 0 and service.recorder.template_seconds > 0


def test_what_was_used_before_serving_is_no_part_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(user=1000.0, system=1000.0))
    [found] = [metric for metric in families(Front(), []) if metric.name == "xllm_cpu_utilization"]
    assert found.samples[0].value == 0


def test_a_request_that_ended_without_an_answer_is_not_ok() -> None:
    front = Front()
    front.status(0)
    assert (front.statuses["ok"], front.statuses["unknown"]) == (0, 1)


def written() -> str:
    """The document."""
    lines = [
        "# Metrics", "", "Made by `python -m tests.service.test_metrics > docs/metrics.md`. `GET /metrics` has them in",
        "Prometheus' text format; those of a model have its name as the label `model_name`. Names that start with",
        "`vllm:` are for dashboards made for vLLM, their label `engine` is always 0. Times are in seconds, or in what",
        "the name says. Counters start at 0 with the server.", "", "| name | type | what it is |", "|---|---|---|",
    ]  # fmt: skip
    for metric in shown():
        counts = metric.type == "counter" or (metric.type == "unknown")
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        lines.append(f"| `{name}` | {'counter' if counts else metric.type} | {metric.documentation} |")
    lines += ["", "Names of the released xLLM or of vLLM that are not there, and why:", "", "| name | |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in ABSENT.items()]
    return "\n".join(lines) + "\n"


def test_the_document_says_so() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == written()


if __name__ == "__main__":
    sys.stdout.write(written())
