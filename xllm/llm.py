"""An artifact opened in this process: memory decided and printed before anything runs, then an engine that answers.

`open_engine` is what `xllm serve` and `LLM` share. Everything that can run out is sized here; nothing runs out later.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xllm.artifact import Artifact, ArtifactError, Progress
from xllm.runtime.config import EngineConfig
from xllm.runtime.encoding import Encoder, state_bytes
from xllm.runtime.engine import Engine
from xllm.runtime.errors import RequestRefused
from xllm.runtime.executor import KVSpec
from xllm.runtime.pages import PoolPlan, plan_pool
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.targets import host
from xllm.targets.base import StepSizes
from xllm.targets.predicted import target_of

# Python, libraries, tokenizer tables and the buffers of requests, measured with Qwen3-0.6B's vocabulary.
PROCESS_BYTES = 160 << 20
DEFAULT_KV_TOKENS = 32768
PAGE_BYTES = 2 << 20
_INSTEAD = {
    "generate": "generates text: call generate",
    "embed": "computes embeddings: call xllm.LLM(artifact).embed(texts)",
    "classify": "computes label scores: call xllm.LLM(artifact).score(texts)",
    "function": "is a function of arrays: call xllm.Session(artifact).run(inputs)",
}
# How long a step may keep the sequences that decode in it waiting, as far as the artifact's costs can tell.
STEP_SECONDS = 0.5


@dataclass(frozen=True)
class Ledger:
    """Where memory goes, in bytes. `weights` are mapped from the artifact and shared between processes; `pool` is what
    the engine makes, never more than its sequences can hold together."""

    weights: int
    arena: int
    pool: PoolPlan
    process: int
    prefix_cache: bool = True  # asked for

    @property
    def kv(self) -> int:
        return self.pool.pages * self.pool.page_bytes

    @property
    def kv_tokens(self) -> int:
        return self.pool.tokens_for(self.pool.pages)

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.kv + self.process

    def table(self) -> str:
        token_bytes = self.pool.kv.group_bytes // self.pool.kv.group_tokens
        rows = (
            ("weights (mapped, shared)", self.weights, ""),
            ("arena", self.arena, ""),
            ("KV pages", self.kv, f"{self.kv_tokens:,} tokens of {token_bytes:,} bytes"),
            ("process", self.process, "estimate"),
            ("total", self.total, ""),
        )
        lines = [f"  {name:<26}{size / 2**20:>10,.1f} MiB  {note}".rstrip() for name, size, note in rows]
        return "\n".join([*lines, f"  prefix cache: {self.prefix_note()}"])

    def prefix_note(self) -> str:
        """Whether prompts start on what others computed, or why they do not."""
        if not self.prefix_cache:
            return "off, as asked"
        kv = self.pool.kv
        if kv.fixed_bytes:
            return f"off, {kv.fixed_bytes:,} bytes of each sequence are state of its whole text: nothing to share"
        return f"on, in the KV pages that nobody uses, {kv.group_tokens} tokens at a time"


def plan_memory(
    artifact: Artifact, memory_bytes: int | None, max_seqs: int | None = None, prefix_cache: bool = True
) -> Ledger:
    """Divides `memory_bytes` (None: room for DEFAULT_KV_TOKENS, within half of what the machine has free).

    Raises ArtifactError with the number and the knob when not even one sequence of full length fits.
    """
    plan, limits = artifact.plan, artifact.manifest["limits"]
    spec = KVSpec(plan.kv.group_bytes, plan.kv.group_tokens, plan.kv.fixed_bytes)
    seqs = min(max_seqs or limits["max_seqs"], limits["max_seqs"])
    fixed = artifact.weight_bytes + plan.arena_bytes + PROCESS_BYTES
    free = _available_bytes()

    def pages(tokens: int) -> int:
        return -(-spec.bytes_for(tokens) // PAGE_BYTES) * PAGE_BYTES

    one = pages(limits["max_len"])
    if memory_bytes is None:
        wanted = pages(min(DEFAULT_KV_TOKENS, limits["max_len"] * seqs))
        kv = max(one, min(wanted, (free - fixed) // 2))
    else:
        kv = memory_bytes - fixed
    if kv < one:
        raise ArtifactError(
            "memory-too-small",
            f"--memory leaves {_mib(max(kv, 0))} for KV pages, one sequence of {limits['max_len']} tokens needs"
            f" {_mib(one)}: give --memory {_mib(fixed + one)} or more, or compile with a smaller --max-len",
        )
    pool = plan_pool(spec, limits["max_len"], seqs, kv)
    ledger = Ledger(artifact.weight_bytes, plan.arena_bytes, pool, PROCESS_BYTES, prefix_cache)
    if ledger.total > free + artifact.weight_bytes:
        knob = "give a smaller --memory" if memory_bytes else "free some, or compile with a smaller --max-len"
        raise ArtifactError(
            "memory-too-large",
            f"{_mib(ledger.total)} are needed, {_mib(ledger.kv)} of them for KV pages, and the machine has {_mib(free)}"
            f" free: {knob}",
        )
    return ledger


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
    progress: Progress | None = None,
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
        raise ArtifactError("wrong-task", f"{artifact.name} {_INSTEAD[artifact.task]}; no command or endpoint does yet")
    ledger = plan_memory(artifact, memory_bytes, max_seqs, prefix_cache)
    executor = CpuExecutor(artifact, host.threads(threads).count, progress=progress, kernel_modules=kernel_modules)
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


def open_encoder(artifact: Artifact, memory_bytes: int | None = None, threads: int | None = None) -> Encoder:
    """An artifact that gives rows, ready to run. Raises ArtifactError when machine or memory are too small."""
    from xllm.targets.cpu.executor import CpuExecutor, kv_of, limits_of

    if artifact.task == "function":
        raise ArtifactError("not-a-step", f"{artifact.name} is a function: xllm.Session runs it")

    needed = artifact.weight_bytes + artifact.plan.arena_bytes + PROCESS_BYTES
    needed += state_bytes(limits_of(artifact), kv_of(artifact.plan))
    room = _available_bytes() + artifact.weight_bytes if memory_bytes is None else memory_bytes
    if needed > room:
        raise ArtifactError(
            "memory-too-small",
            f"{_mib(needed)} are needed, {_mib(room)} are there: give more, or compile with a smaller"
            " --max-batch-tokens or --max-len",
        )
    return Encoder(CpuExecutor(artifact, host.threads(threads).count))


@dataclass(frozen=True)
class Completion:
    """One finished generation. `logprobs` are of the chosen tokens, empty unless asked for."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...] = ()


class LLM:
    """An artifact in this process, a folder or a packed file. Use as a context manager, or call `close`. Threads take
    turns. require_signature: public key file of who must have signed it. prefix_cache: prompts start on what earlier
    ones have in common with them, where the model allows it; the answers are the same."""

    def __init__(
        self,
        artifact: str | Path,
        *,
        memory_bytes: int | None = None,
        threads: int | None = None,
        prefix_cache: bool = True,
        require_signature: str | Path | None = None,
        kernel_modules: Sequence[str] = (),
    ) -> None:
        from xllm.service.tokenizer import TextCodec

        self._outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self.artifact = open_model(artifact, require_signature)
        self.codec = TextCodec.from_artifact(self.artifact.tokenizer, self.artifact.path)
        self._engine: Engine | None = None
        self._encoder: Encoder | None = None
        self.ledger: Ledger | None = None
        if self.artifact.task == "generate":
            self._engine, self.ledger = open_engine(
                self.artifact,
                self._outputs.put,
                memory_bytes=memory_bytes,
                threads=threads,
                prefix_cache=prefix_cache,
                kernel_modules=kernel_modules,
            )
        else:
            self._encoder = open_encoder(self.artifact, memory_bytes, threads)
        self._turn = threading.Lock()
        self._ids = itertools.count()

    def embed(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, width]: the embedding of each text (or of its token ids), pooled and normalised as the
        checkpoint says.

        Raises RequestRefused for what can never run, and for an artifact of another task.
        """
        items: Iterable[Any] = [texts] if isinstance(texts, str) else texts
        return self._rows("embed", items)

    def score(self, texts: str | Sequence[str | tuple[str, str]] | Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, labels]: the logits of each text, pair of texts or list of token ids; `labels` names them.

        Where the model tells the texts of a pair apart by segments, token t of the second is id vocab + t. Raises
        RequestRefused for what can never run, and for an artifact of another task.
        """
        items: Iterable[Any] = [texts] if isinstance(texts, str) else texts
        return self._rows("classify", items)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns that `score` gives; empty for other tasks."""
        return tuple(self.artifact.manifest["task"].get("labels", ()))

    def _rows(self, task: str, items: Iterable[Any]) -> np.ndarray:
        if self._encoder is None or self.artifact.task != task:
            raise self._wrong_task()
        return self._encoder.rows([self._tokens(item) for item in items])

    def _tokens(self, item: Any) -> Sequence[int]:
        """The ids of a text, with the special tokens its tokenizer adds; of a pair of texts; or ids as they are."""
        if isinstance(item, str):
            return self.codec.encode(item, True)
        if isinstance(item, tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            manifest = self.artifact.manifest
            return self.codec.encode_pair(*item, manifest["model"]["vocab"] if manifest["task"]["segments"] > 1 else 0)
        return item

    def _wrong_task(self) -> RequestRefused:
        return RequestRefused("wrong_task", f"{self.artifact.name} {_INSTEAD[self.artifact.task]}")

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Completes each prompt (text, or token ids). `options` are fields of SamplingParams, beside the defaults of
        the model; or give `params` whole. Order is kept.

        Raises RequestRefused for what can never run, RuntimeError when a request fails; the other prompts then end.
        """
        if self._engine is None:
            raise self._wrong_task()
        if params is not None and options:
            raise TypeError(f"generate takes params or {', '.join(options)}, not both")
        from xllm.service.params import default_sampling

        chosen = params or SamplingParams(**default_sampling(self.artifact.generation) | options)
        items: Iterable[Any] = [prompts] if isinstance(prompts, str) else prompts
        requests = [
            Request(f"llm-{next(self._ids)}", tuple(self.codec.encode(p, True) if isinstance(p, str) else p), chosen)
            for p in items
        ]
        with self._turn:
            try:
                gathered = self._run(self._engine, requests)
            except BaseException:
                for request in requests:
                    self._engine.cancel(request.id)
                raise
        return [self._completion(gathered[request.id]) for request in requests]

    def _run(self, engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenOutput]]:
        gathered: dict[str, list[TokenOutput]] = {request.id: [] for request in requests}
        waiting, left = deque(requests), len(requests)
        while left:
            while waiting and _submitted(engine, waiting[0]):
                waiting.popleft()
            for output in self._outputs.get():
                if output.request_id in gathered:  # not of a call that was given up
                    gathered[output.request_id].append(output)
                    left -= output.finish_reason is not None
        return gathered

    def _completion(self, outputs: list[TokenOutput]) -> Completion:
        end = outputs[-1]
        if end.finish_reason == "error":
            raise RuntimeError(end.error)
        tokens = tuple(output.token for output in outputs if output.token is not None)
        logprobs = tuple(output.logprob for output in outputs if output.logprob is not None)
        return Completion(self.codec.decode(tokens), tokens, str(end.finish_reason), logprobs)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.stop()
        if self._encoder is not None:
            self._encoder.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _submitted(engine: Engine, request: Request) -> bool:
    """False when the queue is full: the outputs of those in it come first."""
    try:
        engine.submit(request)
    except RequestRefused as refusal:
        if refusal.code != "queue_full":
            raise
        return False
    return True


def _mib(size: int) -> str:
    return f"{-(-size // 2**20)}MiB"


def _available_bytes() -> int:
    """Memory that may be taken without swapping, within this process's control group."""
    free = 1 << 34
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    left = host.memory_left()
    return free if left is None else min(free, left)
