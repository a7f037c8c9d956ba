"""An artifact opened in this process: memory decided and printed before anything runs, then an engine that answers.

`open_engine` is what `xllm serve` and `LLM` share. Everything that can run out is sized here; nothing runs out later.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.artifact import Artifact, ArtifactError, Progress
from xllm.runtime.config import EngineConfig
from xllm.runtime.engine import Engine
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.targets.cpu import host_threads

# Python, libraries, tokenizer tables and the buffers of requests, measured with Qwen3-0.6B's vocabulary.
PROCESS_BYTES = 160 << 20
DEFAULT_KV_TOKENS = 32768
PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Ledger:
    """Where memory goes, in bytes. `weights` are mapped from the artifact and shared between processes."""

    weights: int
    arena: int
    kv: int
    process: int
    kv_tokens: int
    token_bytes: int

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.kv + self.process

    def table(self) -> str:
        rows = (
            ("weights (mapped, shared)", self.weights, ""),
            ("arena", self.arena, ""),
            ("KV pages", self.kv, f"{self.kv_tokens:,} tokens of {self.token_bytes:,} bytes"),
            ("process", self.process, "estimate"),
            ("total", self.total, ""),
        )
        return "\n".join(f"  {name:<26}{size / 2**20:>10,.1f} MiB  {note}".rstrip() for name, size, note in rows)


def plan_memory(artifact: Artifact, memory_bytes: int | None) -> Ledger:
    """Divides `memory_bytes` (None: room for DEFAULT_KV_TOKENS, within half of what the machine has free).

    Raises ArtifactError with the number and the knob when not even one sequence of full length fits.
    """
    plan, limits = artifact.plan, artifact.manifest["limits"]
    fixed = artifact.weight_bytes + plan.arena_bytes + PROCESS_BYTES
    group = plan.kv.group_tokens
    one = -(-limits["max_len"] // group) * plan.kv.group_bytes
    if memory_bytes is None:
        wanted = max(one, min(DEFAULT_KV_TOKENS, limits["max_len"] * limits["max_seqs"]) * plan.kv.token_bytes)
        kv = max(one, min(wanted, (_available_bytes() - fixed) // 2))
    else:
        kv = memory_bytes - fixed
    kv = kv // PAGE_BYTES * PAGE_BYTES
    free = _available_bytes()
    if kv + fixed > free + artifact.weight_bytes:
        raise ArtifactError(
            "memory-too-large",
            f"--memory asks for {_mib(kv + fixed)}, the machine has {_mib(free)} free: give a smaller --memory",
        )
    if kv < one:
        needed = fixed + -(-one // PAGE_BYTES) * PAGE_BYTES
        raise ArtifactError(
            "memory-too-small",
            f"--memory leaves {_mib(max(kv, 0))} for KV pages, one sequence of {limits['max_len']} tokens needs"
            f" {_mib(one)}: give --memory {_mib(needed)} or more, or compile with a smaller --max-len",
        )
    return Ledger(
        artifact.weight_bytes,
        plan.arena_bytes,
        kv,
        PROCESS_BYTES,
        kv // plan.kv.group_bytes * group,
        plan.kv.token_bytes,
    )


def open_engine(
    path: str | os.PathLike[str],
    sink: Callable[[list[TokenOutput]], None],
    *,
    memory_bytes: int | None = None,
    threads: int | None = None,
    async_scheduling: bool = True,
    chunk: int | None = None,
    max_seqs: int | None = None,
    progress: Progress | None = None,
) -> tuple[Artifact, Engine, Ledger]:
    """Opens, checks and sizes an artifact; the engine is started. `sink` gets each step's outputs on the engine's
    thread.

    chunk: prompt tokens of one sequence per step. Raises ArtifactError for an artifact this machine cannot run.
    """
    from xllm.targets.cpu_executor import CpuExecutor

    artifact = Artifact.open(path)
    ledger = plan_memory(artifact, memory_bytes)
    executor = CpuExecutor(artifact, threads or host_threads(), progress=progress)
    budget = artifact.plan.buckets[-1].T
    config = EngineConfig(
        kv_bytes=ledger.kv,
        eos_ids=tuple(artifact.manifest["model"]["eos_ids"]),
        max_tokens_per_step=budget,
        max_chunk=min(chunk or budget, budget),
        max_seqs=max_seqs,
        async_scheduling=async_scheduling,
    )
    engine = Engine(executor, config, sink)
    engine.start()
    return artifact, engine, ledger


@dataclass(frozen=True)
class Completion:
    """One finished generation. `logprobs` are of the chosen tokens, empty unless asked for."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] = ()


class LLM:
    """An artifact in this process. Use as a context manager, or call `close`."""

    def __init__(self, artifact: str | Path, *, memory_bytes: int | None = None, threads: int | None = None) -> None:
        from tokenizers import Tokenizer

        self._outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self.artifact, self._engine, self.ledger = open_engine(
            artifact, self._outputs.put, memory_bytes=memory_bytes, threads=threads
        )
        self.tokenizer = Tokenizer.from_file(str(self.artifact.tokenizer_path))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Completes each prompt (text, or token ids). `options` are fields of SamplingParams. Order is kept.

        Raises RequestRefused for what can never run, RuntimeError when a request fails.
        """
        chosen = params or SamplingParams(**options)
        items: Iterable[Any] = [prompts] if isinstance(prompts, str) else prompts
        requests = [
            Request(f"llm-{next(self._ids)}", tuple(self.tokenizer.encode(p).ids if isinstance(p, str) else p), chosen)
            for p in items
        ]
        for request in requests:
            self._engine.submit(request)
        gathered: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
        left = len(requests)
        while left:
            for output in self._outputs.get():
                gathered[output.request_id].append(output)
                left -= output.finish_reason is not None
        return [self._completion(gathered[request.id]) for request in requests]

    def _completion(self, outputs: list[TokenOutput]) -> Completion:
        end = outputs[-1]
        if end.finish_reason == "error":
            raise RuntimeError(end.error)
        tokens = tuple(output.token for output in outputs if output.token is not None)
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        logprobs = tuple(output.logprob for output in outputs if output.logprob is not None)
        return Completion(text, tokens, str(end.finish_reason), logprobs)

    def close(self) -> None:
        self._engine.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mib(size: int) -> str:
    return f"{-(-size // 2**20)}MiB"


def _available_bytes() -> int:
    """Memory that may be taken without swapping, within this process's control group."""
    free = 1 << 34
    with contextlib.suppress(OSError, KeyError, ValueError):
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        if limit != "max":
            free = min(free, int(limit))
    return free
