"""An artifact opened in this process: memory decided before anything runs, then an engine that answers. `xllm serve`
and `LLM` (offline) share it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from xllm.artifact import Artifact, ArtifactError
from xllm.control import version_of
from xllm.memory import Ledger, RowsLedger, plan_memory, plan_models
from xllm.runtime.config import EngineConfig, LoadCost, TierConfig
from xllm.runtime.cost import StepCost
from xllm.runtime.encoding import Encoder
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Executor
from xllm.runtime.pace import FEWEST
from xllm.runtime.policies import choose
from xllm.runtime.policies.state import STEP_SECONDS
from xllm.runtime.policies.trace import Trace
from xllm.runtime.pricing import Prices
from xllm.runtime.request import TokenOutput
from xllm.runtime.rows import RowEngine
from xllm.runtime.store import PageStore
from xllm.runtime.tier_speed import disk_seconds, host_seconds
from xllm.targets import host
from xllm.targets.base import USUAL_CONTEXT, StepSizes
from xllm.targets.fitted import cost_of
from xllm.targets.predicted import predicted_cost, target_of
from xllm.targets.turns import Turns

INSTEAD = {
    "generate": "generates text: call generate",
    "embed": "computes embeddings: call xllm.LLM(artifact).embed(texts)",
    "classify": "computes label scores: call xllm.LLM(artifact).score(texts)",
    "function": "is a function of arrays: call xllm.Session(artifact).run(inputs)",
}
log = logging.getLogger("xllm.llm")
DISK_CACHE_BYTES = 8 << 30
LOAD_WAIT_SECONDS = 5e-3  # before a load begins
Watch = Callable[[Executor, Artifact], Executor]  # an executor of the artifact as who looks at its steps sees it


def open_model(path: str | os.PathLike[str], require_signature: str | os.PathLike[str] | None = None) -> Artifact:
    """As `Artifact.open`, of a language model. Raises ArtifactError for a function too."""
    artifact = Artifact.open(path, require_signature)
    if artifact.plan.is_function:
        raise ArtifactError("wrong-task", f"{path} is a function of arrays: use xllm.Session(path).run(inputs)")
    return artifact


def open_engine(
    artifact: Artifact,
    sink: Callable[[list[TokenOutput]], None],
    *,
    memory_bytes: int | None = None,
    threads: int | None = None,
    async_scheduling: bool = True,
    chunk: int | None = None,
    max_seqs: int | None = None,
    prefix_cache: bool = True,
    host_cache: int = 0,
    disk_cache: str | os.PathLike[str] | None = None,
    disk_cache_size: int = DISK_CACHE_BYTES,
    kernel_modules: Sequence[str] = (),
    watch: Watch | None = None,
    scheduler: str = "chunked",
    order: str | None = None,
    trace: Trace | None = None,
    ledger: Ledger | None = None,
    pages: PageStore | None = None,
    turns: Turns | None = None,
) -> tuple[Engine, Ledger]:
    """Checks and sizes an opened artifact; the engine is started. `sink` gets each step's outputs on the engine's
    thread.

    chunk: prompt tokens of one sequence per step. prefix_cache: start on what others computed of the same text, where
    the model allows it. host_cache: bytes of memory beside that of `memory_bytes` for what has no room in the KV pages;
    disk_cache: a folder for files of it, of `disk_cache_size` bytes in all, which the next start finds again.
    kernel_modules: files whose kernels the artifact may run. watch: who looks at its steps. scheduler, order: names of
    scheduling policies (docs/scheduling.md). trace: gets every decision. ledger, pages, turns: of a process with
    several models, what memory.plan_models gave this one, the store of its pages and the turns of their steps.
    Raises ArtifactError for an artifact this machine cannot run, RuntimeFault for a disk cache that cannot be used and
    for a policy that there is not.
    """
    from xllm.targets.cpu.executor import CpuExecutor, state_identity

    choose(scheduler, order)
    if artifact.task != "generate":
        raise ArtifactError("wrong-task", f"{artifact.name} {INSTEAD[artifact.task]}, or serve it")
    ledger = ledger or plan_memory(artifact, memory_bytes, max_seqs, prefix_cache, host_cache)
    count = host.threads(threads).count
    cost, _ = cost_of(artifact, count)
    config = engine_config(artifact, ledger, chunk, async_scheduling, cost)
    config = replace(config, scheduler=scheduler, order=order, trace=trace)
    if pages is not None:
        config = replace(config, kv_bytes=pages.ledger.pages * ledger.pool.page_bytes)
    if host_cache or disk_cache is not None:
        disk = None if disk_cache is None else os.fspath(disk_cache)
        tiers = TierConfig(
            ledger.host_cache, disk, disk_cache_size, state_identity(artifact), load_cost(artifact, disk, cost)
        )
        config = replace(config, tiers=tiers)
    executor = CpuExecutor(artifact, count, kernel_modules=kernel_modules, turns=turns)
    try:
        engine = Engine(watch(executor, artifact) if watch else executor, config, sink, pages)
    except BaseException:
        executor.close()
        raise
    engine.start()
    return engine, ledger


def engine_config(
    artifact: Artifact,
    ledger: Ledger,
    chunk: int | None = None,
    async_scheduling: bool = True,
    cost: StepCost | None = None,
) -> EngineConfig:
    """The settings of an engine that serves the artifact in this memory; `cost` is what steps take on this machine,
    where that was measured."""
    budget = artifact.plan.buckets[-1].T
    return EngineConfig(
        kv_bytes=ledger.kv,
        page_bytes=ledger.pool.page_bytes,
        eos_ids=tuple(artifact.manifest["model"]["eos_ids"]),
        max_tokens_per_step=budget,
        max_beside_decodes=tokens_beside_decodes(artifact, cost),
        step_seconds=STEP_SECONDS,
        max_chunk=min(chunk or budget, budget),
        max_seqs=ledger.pool.spans,
        async_scheduling=async_scheduling,
        prefix_cache=ledger.prefix_cache,
        weights=version_of(artifact),
        cost=cost,
    )


def tokens_beside_decodes(artifact: Artifact, cost: StepCost | None = None) -> int:
    """Prompt tokens that may join a step with decodes, to begin with: as many as keep it within STEP_SECONDS beside one
    by the model that was fitted on this machine; without one, a power of two by the costs of the artifact's calls. The
    engine then follows what steps take, with all who decode."""
    if cost is not None:
        most = artifact.plan.buckets[-1].T
        return max(min(FEWEST, most), cost.tokens_within(STEP_SECONDS, most, [(USUAL_CONTEXT, 1)]))
    tokens = artifact.plan.buckets[-1].T
    while tokens > 16 and _step_seconds(artifact, tokens) > STEP_SECONDS:
        tokens //= 2
    return tokens


def load_cost(artifact: Artifact, disk: str | None, cost: StepCost | None = None) -> LoadCost:
    """When keys and values are better loaded than computed, for this artifact: seconds a token. What loading takes is
    measured, from `disk` where that is a folder; what computing takes says the model that was fitted on this machine,
    or else the costs of the artifact's calls."""
    kv, tokens = artifact.plan.kv, artifact.plan.buckets[-1].T
    whole = _step_seconds(artifact, tokens) if cost is None else cost.seconds([(0, tokens)], 1)
    found = LoadCost(
        compute=whole / tokens,
        host=kv.token_bytes * host_seconds(kv.group_bytes),
        disk=kv.token_bytes * disk_seconds(disk, kv.group_bytes) if disk is not None else 0.0,
        wait=LOAD_WAIT_SECONDS,
    )
    log.info(
        "a token is computed in %.3f ms, loaded from memory in %.3f ms, from the disk cache in %.3f ms",
        *(1e3 * each for each in (found.compute, found.host, found.disk)),
    )
    return found


def prices_of(artifact: Artifact, engine: Engine | RowEngine, cost: StepCost | None) -> Prices:
    """What requests to the engine take: by the model that was fitted on this machine, or else by the costs of the
    artifact's calls."""
    cost = cost or predicted_cost(artifact)
    if isinstance(engine, RowEngine):
        limits = engine.limits
        return Prices(cost, limits.max_tokens_per_step, limits.max_tokens_per_step, limits.max_seqs, answer=0)
    budget = engine.budget
    pool = budget.pool
    kv_tokens = pool.tokens_for(pool.pages)
    return Prices(cost, budget.tokens, min(budget.tokens, budget.beside_decodes), pool.spans, kv_tokens)


def _step_seconds(artifact: Artifact, tokens: int) -> float:
    """Predicted, of a prompt's tokens alone."""
    target, sizes = target_of(artifact), StepSizes.usual(tokens, 1)
    return sum(target.seconds(call.cost, sizes, call.kernel) for call in artifact.plan.calls)


def open_encoder(
    artifact: Artifact,
    memory_bytes: int | None = None,
    threads: int | None = None,
    kernel_modules: Sequence[str] = (),
    watch: Watch | None = None,
    ledger: RowsLedger | None = None,
    turns: Turns | None = None,
) -> tuple[Encoder, RowsLedger]:
    """An artifact that gives rows, ready to run. ledger, turns: as of `open_engine`. Raises ArtifactError when machine
    or memory are too small."""
    from xllm.targets.cpu.executor import CpuExecutor

    if artifact.task == "function":
        raise ArtifactError("not-a-step", f"{artifact.name} is a function: xllm.Session runs it")
    if ledger is None:
        [planned] = plan_models([artifact], memory_bytes).ledgers
        assert isinstance(planned, RowsLedger)
        ledger = planned
    count = host.threads(threads).count
    executor = CpuExecutor(artifact, count, kernel_modules=kernel_modules, turns=turns)
    return Encoder(watch(executor, artifact) if watch else executor), ledger


def open_rows(
    artifact: Artifact, sink: Callable[[list[TokenOutput]], None], **options: Any
) -> tuple[RowEngine, RowsLedger]:
    """As `open_engine`, of an artifact that gives rows; `options` are those of `open_encoder`."""
    encoder, ledger = open_encoder(artifact, **options)
    engine = RowEngine(encoder, sink)
    engine.start()
    return engine, ledger
