"""Decides under which names the measurements are shown: xllm's own, and those that dashboards made for vLLM look for.
prometheus-client is loaded by the first scrape. docs/metrics.md lists them all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xllm.runtime import EngineStats
from xllm.runtime.policies.state import CAUSES
from xllm.runtime.spent import STEP_TOKENS
from xllm.service.metrics import STATUSES, Front, Histogram, Recorder

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from xllm.service.backlog import Backlog

    Labels = Mapping[str, str]
    Samples = Sequence[tuple[str, Labels, float]]


def expose(front: Front, models: Sequence[tuple[Recorder, EngineStats, Backlog]]) -> bytes:
    """The text of GET /metrics."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(families(front, models)))  # type: ignore[arg-type]
    return generate_latest(registry)


def families(front: Front, models: Sequence[tuple[Recorder, EngineStats, Backlog]]) -> list[Metric]:
    """All that is shown; of several models each name is there once, with their samples."""
    found: dict[str, Metric] = {}
    for recorder, engine, backlog in models:
        for metric in _of_model(recorder, engine, backlog):
            if metric.name in found:
                found[metric.name].samples.extend(metric.samples)
            else:
                found[metric.name] = metric
    return [*_of_front(front), *found.values()]


class _Collector:
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def _of_front(front: Front) -> Iterator[Metric]:
    yield _plain("server_request_in_total", "requests received", front.requests_in)
    failed = sum(front.statuses.values()) - front.statuses["ok"] - front.statuses["resource_exhausted"]
    yield _plain("server_request_total_ok", "requests answered", front.statuses["ok"])
    yield _plain("server_request_total_limit", "requests refused by a limit", front.statuses["resource_exhausted"])
    yield _plain("server_request_total_fail", "requests that failed", failed)
    for name in STATUSES:
        yield _plain(f"request_status_total_{name}", f"requests that ended as {name}", front.statuses[name])
    refused = [({"reason": code}, count) for code, count in sorted(front.refusals.items())]
    yield _counter("requests_refused", "requests answered by an error, by its code", refused)
    yield _gauge("num_concurrent_requests", "requests being answered", front.concurrent)
    count = len(os.sched_getaffinity(0))
    used = front.used / count
    yield _gauge("xllm_cpu_num", "processors that this process may use", count)
    yield _gauge(
        "xllm_cpu_utilization", "share of them that it has used since it began to serve, 0 to 1", min(used, 1.0)
    )
    yield _gauge("xllm_gpu_num", "accelerators that this process uses", 0)


def _of_model(recorder: Recorder, engine: EngineStats, backlog: Backlog) -> Iterator[Metric]:
    """All have the model's name as a label."""
    shown = [_gauge("num_backlog_tokens", "prompt tokens that wait for their first output", backlog.tokens)]
    shown.append(_gauge("backlog_seconds", "what a request that comes now would wait for its turn", backlog.seconds))
    shown.append(_gauge("backlog_seconds_ratio", "seconds that one of the cost model took of late", backlog.ratio))
    for part in (_requests(recorder), _engine(engine), _time(recorder, engine), _memory(recorder, engine)):
        shown += part
    shown += [*_tiers(engine), *_compatible(recorder, engine)]
    for metric in shown:
        for at, sample in enumerate(metric.samples):
            metric.samples[at] = sample._replace(labels=dict(sample.labels) | {"model_name": recorder.model})
        yield metric


def _requests(recorder: Recorder) -> Iterator[Metric]:
    for kind, seconds in sorted(recorder.handling_seconds.items()):
        yield _plain(f"request_handling_latency_seconds_{kind}", "time spent in requests", seconds)
    yield _histogram("time_to_first_token_latency_milliseconds", "time to first token", recorder.first_token, 1000)
    yield _histogram("inter_token_latency_milliseconds", "time between tokens", recorder.inter_token, 1000)
    yield _histogram("end_2_end_latency_milliseconds", "time of a request", recorder.end_to_end, 1000)
    yield _histogram("num_prompt_tokens_per_request", "prompt tokens", recorder.prompt_tokens)
    yield _histogram("num_generated_tokens_per_request", "generated tokens", recorder.generated_tokens)
    help_ = "prompt tokens found in the prefix cache"
    yield _histogram("prefix_cache_block_matched_rate", f"share of {help_}, of a sequence", recorder.matched_share)
    yield _histogram("prefix_cache_block_matched_num", f"{help_}, of a sequence", recorder.matched_tokens)


def _engine(engine: EngineStats) -> Iterator[Metric]:
    yield _plain("num_processing_tokens_total_prompt", "prompt tokens computed", engine.prompt_tokens)
    yield _plain("num_processing_tokens_total_generated", "tokens generated", engine.generated_tokens)
    yield _plain("num_model_execution_total_eager", "steps computed without a device's graph", engine.steps)
    yield _gauge("num_running_requests", "requests in the batch", engine.running)
    yield _gauge("num_running_sequences", "sequences in the batch, each beam of a search", engine.sequences)
    yield _gauge("num_waiting_requests", "requests waiting for admission", engine.waiting)
    yield _gauge("num_preempted_requests", "of those that wait, the ones that had begun", engine.preempted)
    yield _gauge("num_pending_requests", "requests that the engine has not looked at yet", engine.pending)
    for cause in CAUSES:
        told = "preemptions, by who needed what the victim had"
        yield _plain(f"num_{cause}_requests", told, getattr(engine, cause))
    yield _plain("prefix_cache_match_length_total", "prompt tokens found in the prefix cache", engine.cached_tokens)
    yield _plain("prefix_cache_evicted_blocks_total", "pages the prefix cache gave up", engine.evictions)
    yield _gauge("engine_paused", "1 while nothing is computed by an order", engine.paused)
    yield _gauge("engine_asleep", "1 while it sleeps lightly, 2 deeply", ("", "light", "deep").index(engine.asleep))
    if engine.weights:
        yield _gauge("weights_info", "version of the weights", 1, {"version": engine.weights})


def _time(recorder: Recorder, engine: EngineStats) -> Iterator[Metric]:
    """Seconds since the start, all together. Phases of one step run beside the computing of the one before."""
    yield _plain("chat_template_latency_seconds", "time in chat templates", recorder.template_seconds)
    tokenizing = recorder.tokenization_seconds
    yield _plain("tokenization_latency_seconds", "time from bodies to token ids, without templates", tokenizing)
    for kind in ("stream", "non_stream"):
        detokenizing, responding = recorder.detokenization_seconds[kind], recorder.responding_seconds[kind]
        yield _plain(f"detokenization_latency_seconds_{kind}", "time from tokens to what is answered", detokenizing)
        yield _plain(f"responsing_latency_seconds_{kind}", "time in making bodies of answers", responding)
    spent = engine.seconds
    for name, help_, phases in (
        ("scheduling_latency_seconds", "time in decisions of the scheduler", ("schedule",)),
        ("allocate_blocks_latency_seconds", "time in getting slots and pages", ("allocate",)),
        ("prepare_input_latency_seconds", "time in handing steps over", ("prepare",)),
        ("prefix_cache_latency_seconds_match", "time in looking prompts up", ("match",)),
        ("prefix_cache_latency_seconds_insert", "time in offering pages to other prompts", ("insert",)),
        ("execution_latency_seconds_model", "time that steps computed", ("compute",)),
        ("execution_latency_seconds_sampling", "time of sampling, logits processed in it", ("sample",)),
        ("engine_latency_seconds", "time that the engine worked, its steps' computing included", tuple(spent)),
    ):
        yield _plain(name, help_, sum(spent.get(phase, 0.0) for phase in phases))


def _memory(recorder: Recorder, engine: EngineStats) -> Iterator[Metric]:
    for name, size in recorder.memory.items():
        yield _gauge(f"{name}_size_in_kilobytes", f"memory planned for it: {name.replace('_', ' ')}", size / 1024)
    yield _gauge("kv_cache_utilization_perc", "share of KV pages in use, 0 to 1", _share(engine))
    yield _gauge("num_free_blocks", "free KV pages", engine.free_pages)
    yield _gauge("num_used_blocks", "used KV pages", engine.used_pages)
    yield _gauge("num_cached_blocks", "KV pages that only the prefix cache uses", engine.cached_pages)
    yield _gauge("num_blocks_in_prefix_cache", "KV pages in the prefix cache, used or not", engine.prefix_pages)
    pages = (("sequences", engine.mapped_pages), ("prefix_cache", engine.cached_pages), ("idle", engine.reusable_pages))
    yield _metric(
        "kv_page_owners",
        "mapped KV pages, by who has them: running sequences, the prefix cache alone, nobody",
        "gauge",
        [("kv_page_owners", {"owner": owner}, count) for owner, count in pages],
    )


def _tiers(engine: EngineStats) -> Iterator[Metric]:
    if not engine.tiers:
        return
    yield _plain("kv_tier_loads_total", "times that a request waited for keys and values of a tier", engine.loads)
    yield _plain("kv_tier_not_stored_total", "groups of tokens gone before they were copied", engine.not_stored)
    for name, help_, value in (
        ("kv_tier_bytes", "bytes that a tier holds", lambda tier: tier.held_bytes),
        ("kv_tier_limit_bytes", "bytes that it may hold", lambda tier: tier.limit_bytes),
        ("kv_tier_hits_total", "groups of tokens loaded from it", lambda tier: tier.loaded),
        ("kv_tier_hit_bytes_total", "bytes loaded from it", lambda tier: tier.loaded * tier.group_bytes),
        ("kv_tier_stored_total", "groups of tokens copied to it", lambda tier: tier.stored),
        ("kv_tier_evictions_total", "groups of tokens it gave up", lambda tier: tier.evictions),
        ("kv_tier_corrupt_total", "groups that were corrupt, short or gone", lambda tier: tier.corrupt),
    ):
        kind = "unknown" if name.endswith("_total") else "gauge"
        yield _metric(name, help_, kind, [(name, {"tier": tier.name}, value(tier)) for tier in engine.tiers])
    name, help_ = "kv_tier_off", "1 for a tier that is not used any more, and why"
    yield _metric(
        name, help_, "gauge", [(name, {"tier": t.name, "reason": t.off}, float(bool(t.off))) for t in engine.tiers]
    )


def _compatible(recorder: Recorder, engine: EngineStats) -> Iterator[Metric]:
    """Names of vLLM: `engine` is the number of one of its engines, here there is one."""
    labels = {"model_name": recorder.model, "engine": "0"}
    yield _gauge("vllm:num_requests_running", "requests in the batch", engine.running, labels)
    yield _gauge("vllm:num_requests_waiting", "requests waiting for admission", engine.waiting, labels)
    for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
        yield _gauge(name, "share of KV pages in use, 0 to 1", _share(engine), labels)
    known = {"block_size": engine.block_tokens, "num_gpu_blocks": engine.total_pages}
    info = labels | {name: str(value) for name, value in known.items()}
    yield _gauge("vllm:cache_config_info", "tokens of a unit of the prefix cache, and KV pages", 1, info)
    for name, help_, value in (
        ("num_preemptions", "preemptions", engine.preemptions),
        ("prompt_tokens", "prompt tokens computed", engine.prompt_tokens),
        ("generation_tokens", "tokens generated", engine.generated_tokens),
        ("prefix_cache_queries", "prompt tokens looked up in it", engine.looked_up_tokens),
        ("prefix_cache_hits", "prompt tokens found in the prefix cache", engine.cached_tokens),
    ):
        yield _counter(f"vllm:{name}", help_, [(labels, value)])
    finished = [(labels | {"finished_reason": reason}, count) for reason, count in sorted(recorder.finished.items())]
    yield _counter("vllm:request_success", "finished sequences", finished)
    steps = Histogram(STEP_TOKENS, engine.step_sizes, engine.tokens)
    for name, help_, histogram in (
        ("time_to_first_token_seconds", "time to first token", recorder.first_token),
        ("inter_token_latency_seconds", "time between tokens", recorder.inter_token),
        ("time_per_output_token_seconds", "time between tokens", recorder.inter_token),
        ("request_time_per_output_token_seconds", "time a token after the first, of a sequence", recorder.per_token),
        ("e2e_request_latency_seconds", "time of a request", recorder.end_to_end),
        ("request_queue_time_seconds", "time until a sequence was admitted", recorder.queue),
        ("request_prefill_time_seconds", "time from there to its first token", recorder.prefill),
        ("request_decode_time_seconds", "time from its first to its last token", recorder.decode),
        ("request_inference_time_seconds", "time from its admission to its last token", recorder.inference),
        ("request_prompt_tokens", "prompt tokens", recorder.prompt_tokens),
        ("request_generation_tokens", "generated tokens", recorder.generated_tokens),
        ("request_params_n", "samples asked for", recorder.samples),
        ("request_params_max_tokens", "tokens that a sequence may have", recorder.max_tokens),
        ("iteration_tokens_total", "tokens of a step", steps),
    ):
        yield _histogram(f"vllm:{name}", help_, histogram, 1, labels)


def _share(engine: EngineStats) -> float:
    return engine.used_pages / engine.total_pages if engine.total_pages else 0.0


def _plain(name: str, help_: str, value: float) -> Metric:
    """A counter whose released name doesn't end in _total, which the library's counters insist on."""
    return _metric(name, help_, "unknown", [(name, {}, value)])


def _gauge(name: str, help_: str, value: float, labels: Labels | None = None) -> Metric:
    return _metric(name, help_, "gauge", [(name, labels or {}, value)])


def _counter(name: str, help_: str, values: Sequence[tuple[Labels, float]]) -> Metric:
    return _metric(name, help_, "counter", [(f"{name}_total", labels, value) for labels, value in values])


def _histogram(name: str, help_: str, histogram: Histogram, scale: float = 1.0, labels: Labels | None = None) -> Metric:
    buckets, total = histogram.buckets(scale)
    common = dict(labels or {})
    samples = [(f"{name}_bucket", common | {"le": bound}, count) for bound, count in buckets]
    samples += [(f"{name}_sum", common, total), (f"{name}_count", common, buckets[-1][1])]
    return _metric(name, help_, "histogram", samples)


def _metric(name: str, help_: str, kind: Any, samples: Samples) -> Metric:
    from prometheus_client.core import Metric

    metric = Metric(name, help_, kind)
    for sample in samples:
        metric.add_sample(sample[0], dict(sample[1]), sample[2])
    return metric
