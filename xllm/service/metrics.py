"""Decides what is measured and under which names: one recorder, shown under xllm's own names and under the ones
dashboards made for vLLM expect. Recording is plain arithmetic on the event loop; prometheus-client is loaded by the
first scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xllm.runtime import EngineStats
from xllm.runtime.policies.state import CAUSES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from xllm.service.backlog import Backlog

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768, 131072)
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
RECENT = 256  # answers whose times are kept one by one
STATUS_NAMES = {
    400: "invalid_argument",
    401: "unauthenticated",
    404: "invalid_argument",
    405: "invalid_argument",
    408: "deadline_exceeded",
    409: "invalid_argument",
    413: "invalid_argument",
    415: "invalid_argument",
    429: "resource_exhausted",
    499: "cancelled",
    501: "unimplemented",
    503: "unavailable",
    504: "deadline_exceeded",
}
STATUSES = ("ok", *dict.fromkeys(STATUS_NAMES.values()), "unknown")


class Histogram:
    """Counts per bucket, upper bounds inclusive."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self, scale: float) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, and the sum; `scale` 1000 turns seconds into milliseconds."""
        total, result = 0, []
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            result.append(("+Inf" if bound is None else f"{bound * scale:g}", float(total)))
        return result, self._sum * scale


class Front:
    """What requests meet before a model: the models' names, counters of the server, whether it still takes requests."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.backlogs: list[Backlog] = []
        self.requests_in = 0
        self.concurrent = 0
        self.statuses: Counter[str] = Counter()
        self.draining = False

    def status(self, status: int) -> None:
        self.statuses["ok" if status < 400 else STATUS_NAMES.get(status, "unknown")] += 1

    def metrics(self) -> Iterator[Metric]:
        yield _plain("server_request_in_total", "requests received", self.requests_in)
        failed = sum(self.statuses.values()) - self.statuses["ok"] - self.statuses["resource_exhausted"]
        yield _plain("server_request_total_ok", "requests answered", self.statuses["ok"])
        yield _plain("server_request_total_limit", "requests refused by a limit", self.statuses["resource_exhausted"])
        yield _plain("server_request_total_fail", "requests that failed", failed)
        for name in STATUSES:
            yield _plain(f"request_status_total_{name}", f"requests that ended as {name}", self.statuses[name])
        yield _gauge("num_concurrent_requests", "requests being answered", self.concurrent)


class Recorder:
    """The measurements of one model."""

    def __init__(self, model: str) -> None:
        self._labels = {"model_name": model, "engine": "0"}
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0})
        self.handling_seconds = defaultdict(float, chat=0.0, completion=0.0)
        self.tokenization_seconds = 0.0
        self.first_token = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generated_tokens = Histogram(TOKENS)
        self.samples = Histogram(SAMPLES)
        self.recent_first = deque[float](maxlen=RECENT)  # seconds to the first token of an answer
        self.recent_rest = deque[float](maxlen=RECENT)  # seconds per token after it

    def metrics(self, engine: EngineStats, backlog: Backlog) -> Iterator[Metric]:
        """All have the model's name as a label."""
        for metric in self._all(engine, backlog):
            for at, sample in enumerate(metric.samples):
                metric.samples[at] = sample._replace(labels=sample.labels | {"model_name": self._labels["model_name"]})
            yield metric

    def _all(self, engine: EngineStats, backlog: Backlog) -> Iterator[Metric]:
        yield _gauge("num_backlog_tokens", "prompt tokens that wait for their first output", backlog.tokens)
        yield _gauge("backlog_seconds", "what a request that comes now would wait for its turn", backlog.seconds)
        yield _gauge("backlog_seconds_ratio", "seconds that one of the cost model took of late", backlog.ratio)
        share = engine.used_pages / engine.total_pages if engine.total_pages else 0.0
        yield from self._own(engine, share)
        yield from self._compatible(engine, share)

    def _own(self, engine: EngineStats, share: float) -> Iterator[Metric]:
        for kind, seconds in sorted(self.handling_seconds.items()):
            yield _plain(f"request_handling_latency_seconds_{kind}", "time spent in requests", seconds)
        yield _plain("tokenization_latency_seconds", "time from body to token ids", self.tokenization_seconds)
        yield _plain("num_processing_tokens_total_prompt", "prompt tokens computed", engine.prompt_tokens)
        yield _plain("num_processing_tokens_total_generated", "tokens generated", engine.generated_tokens)
        yield _gauge("num_running_requests", "sequences in the batch", engine.running)
        yield _gauge("num_waiting_requests", "sequences waiting for admission", engine.waiting)
        for cause in CAUSES:
            told = "preemptions, by who needed what the victim had"
            yield _plain(f"num_{cause}_requests", told, getattr(engine, cause))
        yield _gauge("num_free_blocks", "free KV pages", engine.free_pages)
        yield _gauge("num_used_blocks", "used KV pages", engine.used_pages)
        yield _gauge("num_cached_blocks", "KV pages that only the prefix cache uses", engine.cached_pages)
        yield _plain("prefix_cache_evicted_blocks_total", "pages the prefix cache gave up", engine.evictions)
        yield from self._tiers(engine)
        yield _gauge("engine_paused", "1 while nothing is computed by an order", engine.paused)
        yield _gauge("engine_asleep", "1 while it sleeps lightly, 2 deeply", ("", "light", "deep").index(engine.asleep))
        if engine.weights:
            yield _gauge("weights_info", "version of the weights", 1, {"version": engine.weights})
        yield _gauge("kv_cache_utilization_perc", "share of KV pages in use, 0 to 1", share)
        yield _histogram("time_to_first_token_latency_milliseconds", "time to first token", self.first_token, 1000)
        yield _histogram("inter_token_latency_milliseconds", "time between tokens", self.inter_token, 1000)
        yield _histogram("end_2_end_latency_milliseconds", "time of a request", self.end_to_end, 1000)
        yield _histogram("num_prompt_tokens_per_request", "prompt tokens", self.prompt_tokens, 1)
        yield _histogram("num_generated_tokens_per_request", "generated tokens", self.generated_tokens, 1)

    def _tiers(self, engine: EngineStats) -> Iterator[Metric]:
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

    def _compatible(self, engine: EngineStats, share: float) -> Iterator[Metric]:
        labels = self._labels
        yield _gauge("vllm:num_requests_running", "sequences in the batch", engine.running, labels)
        yield _gauge("vllm:num_requests_waiting", "sequences waiting for admission", engine.waiting, labels)
        yield _gauge("vllm:kv_cache_usage_perc", "share of KV pages in use, 0 to 1", share, labels)
        yield _counter("vllm:num_preemptions", "preemptions", [(labels, engine.preemptions)])
        yield _counter("vllm:prompt_tokens", "prompt tokens computed", [(labels, engine.prompt_tokens)])
        looked_up, cached = engine.looked_up_tokens, engine.cached_tokens
        yield _counter("vllm:prefix_cache_queries", "prompt tokens looked up in it", [(labels, looked_up)])
        yield _counter("vllm:prefix_cache_hits", "prompt tokens found in the prefix cache", [(labels, cached)])
        yield _counter("vllm:generation_tokens", "tokens generated", [(labels, engine.generated_tokens)])
        finished = [(labels | {"finished_reason": reason}, count) for reason, count in sorted(self.finished.items())]
        yield _counter("vllm:request_success", "finished sequences", finished)
        yield _histogram("vllm:time_to_first_token_seconds", "time to first token", self.first_token, 1, labels)
        yield _histogram("vllm:inter_token_latency_seconds", "time between tokens", self.inter_token, 1, labels)
        yield _histogram("vllm:e2e_request_latency_seconds", "time of a request", self.end_to_end, 1, labels)
        yield _histogram("vllm:request_prompt_tokens", "prompt tokens", self.prompt_tokens, 1, labels)
        yield _histogram("vllm:request_generation_tokens", "generated tokens", self.generated_tokens, 1, labels)
        yield _histogram("vllm:request_params_n", "samples asked for", self.samples, 1, labels)


def expose(front: Front, models: Sequence[tuple[Recorder, EngineStats, Backlog]]) -> bytes:
    """The text of GET /metrics."""
    from prometheus_client import CollectorRegistry, generate_latest

    found = list(front.metrics())
    families: dict[str, Metric] = {}
    for recorder, engine, backlog in models:
        for metric in recorder.metrics(engine, backlog):
            if metric.name in families:
                families[metric.name].samples.extend(metric.samples)
            else:
                families[metric.name] = metric
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector([*found, *families.values()]))  # type: ignore[arg-type]
    return generate_latest(registry)


class _Collector:
    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics


def _plain(name: str, help_: str, value: float) -> Metric:
    """A counter whose released name doesn't end in _total, which the library's counters insist on."""
    return _metric(name, help_, "unknown", [(name, {}, value)])


def _gauge(name: str, help_: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    return _metric(name, help_, "gauge", [(name, labels or {}, value)])


def _counter(name: str, help_: str, values: Sequence[tuple[dict[str, str], float]]) -> Metric:
    return _metric(name, help_, "counter", [(f"{name}_total", labels, value) for labels, value in values])


def _histogram(
    name: str, help_: str, histogram: Histogram, scale: float, labels: dict[str, str] | None = None
) -> Metric:
    buckets, total = histogram.buckets(scale)
    common = labels or {}
    samples: list[tuple[str, dict[str, str], float]] = [
        (f"{name}_bucket", common | {"le": bound}, count) for bound, count in buckets
    ]
    samples += [(f"{name}_sum", common, total), (f"{name}_count", common, buckets[-1][1])]
    return _metric(name, help_, "histogram", samples)


def _metric(name: str, help_: str, kind: Any, samples: list[tuple[str, dict[str, str], float]]) -> Metric:
    from prometheus_client.core import Metric

    metric = Metric(name, help_, kind)
    for sample_name, labels, value in samples:
        metric.add_sample(sample_name, labels, value)
    return metric
