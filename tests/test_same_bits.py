"""The same bits under any schedule: 64 prompts alone, then together in every way the engine can be made to run them;
and searches among them."""

from __future__ import annotations

import queue
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.models import EXPERTS, FAMILIES, HYBRIDS, MLA, VOCAB, WatchedExecutor, build
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.runtime.beams import BeamParams, Found
from xllm.runtime.config import EngineConfig, EngineStats, TierConfig
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Batch, StepResult
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.targets.cpu.executor import Prepared

PROMPTS, NEW_TOKENS = 64, 12
CONFIGS = {**FAMILIES, **HYBRIDS, **EXPERTS, **MLA}
# Grouped heads, a window, a state of fixed size, experts, keys on a latent, and all of windows, sinks and experts; then
# types of weights, and of keys and values where those have another, and what activations are rounded to.
MODELS = ("qwen3 float32", "mistral bfloat16", "qwen3-next float32", "qwen3-moe bfloat16", "deepseek-v3 float32",
          "gpt-oss float32", "qwen3 int8", "mistral int4", "qwen3-moe int4", "deepseek-v3 int8.row",
          "mistral bfloat16 int8", "gpt-oss float32 int8", "deepseek-v3 int8 int8",
          "mistral bfloat16 bfloat16 bfloat16", "qwen3 int8 int8 int8",
          "qwen3 int4.64 bfloat16 int8", "mistral int8.row bfloat16 int8")  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """One way to run the prompts. `kv_groups`: size of the pool, small ones force preemption; `beside`: prompt tokens
    in a step that decodes."""

    chunk: int = 512
    budget: int = 512
    max_seqs: int = 64
    overlapped: bool = True
    threads: int = 1
    kv_groups: int = 4096
    beside: int | None = None
    seed: int = 0


SCHEDULES = {
    "chunks of 16": Schedule(chunk=16, budget=48, seed=1),
    "chunks of 64": Schedule(chunk=64, budget=96, threads=2, seed=2),
    "chunks of 512, plain loop": Schedule(chunk=512, overlapped=False, seed=3),
    "two at a time": Schedule(max_seqs=2, threads=2, seed=4),
    "few prompt tokens beside decodes": Schedule(beside=24, threads=2, seed=7),
    "preempted": Schedule(chunk=32, kv_groups=28, seed=5),
    "preempted, plain loop, two threads": Schedule(chunk=64, kv_groups=28, overlapped=False, threads=2, seed=6),
}


@pytest.fixture(scope="module", params=MODELS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    name, weights, *more = request.param.split()
    dtype = "bfloat16" if weights.startswith("int") else weights
    kv, activations = (*more, *(dtype, None)[len(more) :])
    options = CompileOptions(weights=weights, activations=activations, kv=kv, max_len=256)
    return Artifact.open(build(tmp_path_factory.mktemp("bits"), CONFIGS[name], dtype=dtype, options=options)[1])


@pytest.fixture(scope="module")
def alone(artifact: Artifact) -> dict[str, list[bytes]]:
    return run(artifact, Schedule(overlapped=False), one_by_one=True, prefix_cache=False)[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_tokens_and_logit_bits(name: str, artifact: Artifact, alone: dict[str, list[bytes]]) -> None:
    together, stats = run(artifact, SCHEDULES[name])
    assert together == alone
    assert (stats.preemptions > 0) == name.startswith("preempted")


@pytest.fixture(scope="module")
def computed(artifact: Artifact) -> dict[str, list[bytes]]:
    """Of prompts with few beginnings, all of them computed."""
    return run(artifact, Schedule(), asked=requests(shared=True), prefix_cache=False)[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_bits_with_shared_prefixes(name: str, artifact: Artifact, computed: dict[str, list[bytes]]) -> None:
    """Few beginnings, cut anywhere, twice each: all of them computed, or started on what others computed."""
    started, stats = run(artifact, SCHEDULES[name], asked=requests(shared=True))
    assert started == computed
    fixed = artifact.plan.kv.fixed_bytes
    assert (stats.cached_tokens == 0) if fixed else (stats.cached_tokens > stats.looked_up_tokens // 8)


TIERS = (("preempted", "host"), ("preempted, plain loop, two threads", "both"))


@pytest.mark.parametrize(("name", "tiers"), TIERS, ids=[tiers for _, tiers in TIERS])
def test_same_bits_from_memory_and_disk(
    name: str, tiers: str, artifact: Artifact, computed: dict[str, list[bytes]], tmp_path: Path
) -> None:
    """The same beginnings, in a pool that holds one text or two: evicted, and loaded from where they went."""
    config = TierConfig(1 << 20)
    if tiers == "both":
        config = TierConfig(16 * artifact.plan.kv.group_bytes, str(tmp_path), 1 << 24, "ab")
    schedule = replace(SCHEDULES[name], kv_groups=14)
    loaded, stats = run(artifact, schedule, asked=requests(shared=True), tiers=config)
    assert loaded == computed
    if artifact.plan.kv.fixed_bytes:
        assert stats.tiers == ()
        return
    assert stats.evictions > 0 and stats.loads > 0
    assert sum(tier.loaded for tier in stats.tiers) > 0
    assert not any(tier.corrupt or tier.off for tier in stats.tiers)


@pytest.fixture(scope="module")
def searched(artifact: Artifact) -> dict[str, list[bytes]]:
    return run(artifact, Schedule(overlapped=False), one_by_one=True, asked=searches(), prefix_cache=False)[0]


@pytest.mark.parametrize("name", ["chunks of 16", "preempted", "preempted, plain loop, two threads"])
def test_same_searches(name: str, artifact: Artifact, searched: dict[str, list[bytes]]) -> None:
    """Alone, or among others and in each other's way: what is found, to the bit."""
    schedule = SCHEDULES[name]
    if name.startswith("preempted"):
        schedule = replace(schedule, kv_groups=60)  # the widest needs 41
    found, stats = run(artifact, schedule, asked=searches() + requests()[::2])
    assert {one.id: found[one.id] for one in searches()} == searched
    assert not name.startswith("preempted") or stats.preemptions > 0


def searches() -> list[Request]:
    """Of 2 to 4 beams, half of them with penalties."""
    plain = SamplingParams(max_tokens=NEW_TOKENS)
    shaped = replace(plain, repetition_penalty=1.2, frequency_penalty=0.2)
    return [
        replace(one, id=f"s{at}", params=shaped if at % 2 else plain, beams=BeamParams(2 + (at // 2 % 2) * 2))
        for at, one in enumerate(requests()[1::4])
    ]


def requests(shared: bool = False) -> list[Request]:
    """Prompts of 1 to 120 tokens; half of them sampled with every feature on. `shared`: cut from three texts that have
    their first 40 tokens in common, with up to two tokens of their own behind."""
    rng = np.random.default_rng(11)
    made = []
    texts = rng.integers(0, VOCAB, (3, 120))
    texts[:, :40] = texts[0, :40]
    for index in range(PROMPTS):
        prompt = tuple(rng.integers(0, VOCAB, int(rng.integers(1, 120))).tolist())
        if shared:
            prompt = (*texts[index % 3, : len(prompt)].tolist(), *prompt[: index % 3])
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        if index % 2:
            params = SamplingParams(
                temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=index, presence_penalty=0.4,
                frequency_penalty=0.3, repetition_penalty=1.1, logit_bias={5: 1.5}, max_tokens=NEW_TOKENS,
                ignore_eos=True,
            )  # fmt: skip
        made.append(Request(f"r{index}", prompt, params))
    return made


class BitsExecutor(WatchedExecutor):
    """Keeps, per request, token and logit bits of every sampled row, by position, so that recomputation shows too."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self.bits: dict[str, dict[int, bytes]] = {}
        self._owner: dict[int, str] = {}
        super().__init__(artifact, threads)

    def attach(self, slot: int, request: Request, generated) -> None:  # pyright: ignore
        self._owner[slot] = request.id
        super().attach(slot, request, generated)

    def _run(self, batch: Batch, prepared: Prepared | None) -> StepResult:
        owners = {row.slot: self._owner[row.slot] for row in batch.rows}
        result = super()._run(batch, prepared)
        sampled = [row for row in batch.rows if row.sample]
        for row, token in zip(sampled, result.tokens, strict=True):
            if owners[row.slot].startswith("s"):  # beams, of which several have a row of the same place
                continue
            position = row.start + len(row.tokens) - 1
            bits = self.seen[row.slot, position].tobytes() + token.tobytes()
            held = self.bits.setdefault(owners[row.slot], {}).setdefault(position, bits)
            assert held == bits, "one position gave two different rows"
        return result


def run(
    artifact: Artifact,
    schedule: Schedule,
    one_by_one: bool = False,
    asked: list[Request] | None = None,
    prefix_cache: bool = True,
    tiers: TierConfig | None = None,
) -> tuple[dict[str, list[bytes]], EngineStats]:
    """Every request's rows (logit bits and token) in order, and the engine's figures."""
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    executor = BitsExecutor(artifact, schedule.threads)
    config = EngineConfig(
        kv_bytes=schedule.kv_groups * executor.kv.group_bytes + 4 * executor.kv.fixed_bytes,
        page_bytes=4096,
        # With much state that does not grow, the usual reserve would spare every sequence.
        admit_below=1.0 if executor.kv.fixed_bytes else EngineConfig.admit_below,
        max_tokens_per_step=schedule.budget,
        max_beside_decodes=schedule.beside,
        max_chunk=schedule.chunk,
        max_seqs=schedule.max_seqs,
        async_scheduling=schedule.overlapped,
        prefix_cache=prefix_cache,
        tiers=tiers,
        check=True,
    )
    engine = Engine(executor, config, outputs.put)
    engine.start()
    order = list(asked or requests())
    rng = random.Random(schedule.seed)
    rng.shuffle(order)
    waiting, live = list(order), 0
    tokens: dict[str, list[int]] = {request.id: [] for request in order}
    results: dict[str, tuple[Found, ...]] = {}
    try:
        while waiting or live:
            burst = 1 if one_by_one else rng.randint(1, 16)
            while waiting and burst and not (one_by_one and live):
                engine.submit(waiting.pop())
                live, burst = live + 1, burst - 1
            for output in outputs.get():
                assert output.error is None
                if output.token is not None:
                    tokens[output.request_id].append(output.token)
                results[output.request_id] = output.found
                live -= output.finish_reason is not None
        stats = engine.stats()
    finally:
        engine.stop()
    prompts = {request.id: len(request.prompt) for request in order if request.beams is None}
    assert all(len(tokens[name]) == NEW_TOKENS for name in prompts)
    rows = {
        name: [executor.bits[name][prompts[name] - 1 + index] for index in range(NEW_TOKENS)]
        for name in sorted(prompts)
    }
    return rows | {name: [repr(found).encode()] for name, found in results.items() if found}, stats
