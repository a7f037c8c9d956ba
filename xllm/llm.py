"""An artifact opened in this process: memory decided before anything runs, then an engine that answers. `xllm serve`
and `LLM` (offline) share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from xllm.artifact import Artifact, ArtifactError
from xllm.memory import Ledger, RowsLedger, plan_memory, plan_rows_memory
from xllm.runtime.config import EngineConfig
from xllm.runtime.encoding import Encoder
from xllm.runtime.engine import Engine
from xllm.runtime.request import TokenOutput
from xllm.runtime.rows import RowEngine
from xllm.targets import host
from xllm.targets.base import StepSizes
from xllm.targets.predicted import target_of

INSTEAD = {
    "generate": "generates text: call generate",
    "embed": "computes embeddings: call xllm.LLM(artifact).embed(texts)",
    "classify": "computes label scores: call xllm.LLM(artifact).score(texts)",
    "function": "is a function of arrays: call xllm.Session(artifact).run(inputs)",
}
# How long prompts may keep those waiting that decode in their step: by the artifact's costs, then by what steps take.
STEP_SECONDS = 0.25


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
    kernel_modules: Sequence[str] = (),
) -> tuple[Engine, Ledger]:
    """Checks and sizes an opened artifact; the engine is started. `sink` gets each step's outputs on the engine's
    thread.

    chunk: prompt tokens of one sequence per step. prefix_cache: start on what others computed of the same text, where
    the model allows it. kernel_modules: files whose kernels the artifact may run.
    Raises ArtifactError for an artifact this machine cannot run.
    """
    from xllm.targets.cpu.executor import CpuExecutor

    if artifact.task != "generate":
        raise ArtifactError("wrong-task", f"{artifact.name} {INSTEAD[artifact.task]}, or serve it")
    ledger = plan_memory(artifact, memory_bytes, max_seqs, prefix_cache)
    executor = CpuExecutor(artifact, host.threads(threads).count, kernel_modules=kernel_modules)
    engine = Engine(executor, engine_config(artifact, ledger, chunk, async_scheduling), sink)
    engine.start()
    return engine, ledger


def engine_config(
    artifact: Artifact, ledger: Ledger, chunk: int | None = None, async_scheduling: bool = True
) -> EngineConfig:
    """The settings of an engine that serves the artifact in this memory."""
    budget = artifact.plan.buckets[-1].T
    return EngineConfig(
        kv_bytes=ledger.kv,
        page_bytes=ledger.pool.page_bytes,
        eos_ids=tuple(artifact.manifest["model"]["eos_ids"]),
        max_tokens_per_step=budget,
        max_beside_decodes=tokens_beside_decodes(artifact),
        step_seconds=STEP_SECONDS,
        max_chunk=min(chunk or budget, budget),
        max_seqs=ledger.pool.spans,
        async_scheduling=async_scheduling,
        prefix_cache=ledger.prefix_cache,
    )


def tokens_beside_decodes(artifact: Artifact) -> int:
    """Prompt tokens that may join a step with decodes: a power of two whose predicted time is within STEP_SECONDS."""
    target = target_of(artifact)

    def seconds(tokens: int) -> float:
        sizes = StepSizes.usual(tokens, 1)
        return sum(target.seconds(call.cost, sizes, call.kernel) for call in artifact.plan.calls)

    tokens = artifact.plan.buckets[-1].T
    while tokens > 16 and seconds(tokens) > STEP_SECONDS:
        tokens //= 2
    return tokens


def open_encoder(
    artifact: Artifact,
    memory_bytes: int | None = None,
    threads: int | None = None,
    kernel_modules: Sequence[str] = (),
) -> tuple[Encoder, RowsLedger]:
    """An artifact that gives rows, ready to run. Raises ArtifactError when machine or memory are too small."""
    from xllm.targets.cpu.executor import CpuExecutor, kv_of, limits_of

    if artifact.task == "function":
        raise ArtifactError("not-a-step", f"{artifact.name} is a function: xllm.Session runs it")
    ledger = plan_rows_memory(artifact, limits_of(artifact), kv_of(artifact.plan), memory_bytes)
    count = host.threads(threads).count
    return Encoder(CpuExecutor(artifact, count, kernel_modules=kernel_modules)), ledger


def open_rows(
    artifact: Artifact, sink: Callable[[list[TokenOutput]], None], **options: Any
) -> tuple[RowEngine, RowsLedger]:
    """As `open_engine`, of an artifact that gives rows; `options` are those of `open_encoder`."""
    encoder, ledger = open_encoder(artifact, **options)
    engine = RowEngine(encoder, sink)
    engine.start()
    return engine, ledger
