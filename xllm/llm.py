"""An artifact opened in this process: memory decided before anything runs, then an engine that answers.

`open_engine` and `open_rows` are what `xllm serve` and `LLM` share.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm.artifact import Artifact, ArtifactError
from xllm.memory import Ledger, RowsLedger, plan_memory, plan_rows_memory
from xllm.runtime.config import EngineConfig
from xllm.runtime.encoding import Encoder
from xllm.runtime.engine import Engine
from xllm.runtime.errors import RequestRefused
from xllm.runtime.policies import choose
from xllm.runtime.request import Grammar, Request, SamplingParams, TokenOutput
from xllm.runtime.rows import RowEngine
from xllm.runtime.urgency import take_urgency
from xllm.targets import host
from xllm.targets.base import StepSizes
from xllm.targets.predicted import target_of

if TYPE_CHECKING:
    from xllm.service.grammar import Grammars

_INSTEAD = {
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
    scheduler: str = "chunked",
    order: str | None = None,
) -> tuple[Engine, Ledger]:
    """Checks and sizes an opened artifact; the engine is started. `sink` gets each step's outputs on the engine's
    thread.

    chunk: prompt tokens of one sequence per step. prefix_cache: start on what others computed of the same text, where
    the model allows it. kernel_modules: files whose kernels the artifact may run. scheduler, order: names of
    scheduling policies (docs/scheduling.md).
    Raises ArtifactError for an artifact this machine cannot run, RuntimeFault for a policy that there is not.
    """
    from xllm.targets.cpu.executor import CpuExecutor

    choose(scheduler, order)
    if artifact.task != "generate":
        raise ArtifactError("wrong-task", f"{artifact.name} {_INSTEAD[artifact.task]}, or serve it")
    ledger = plan_memory(artifact, memory_bytes, max_seqs, prefix_cache)
    executor = CpuExecutor(artifact, host.threads(threads).count, kernel_modules=kernel_modules)
    config = replace(engine_config(artifact, ledger, chunk, async_scheduling), scheduler=scheduler, order=order)
    engine = Engine(executor, config, sink)
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
    ones have in common with them, where the model allows it; the answers are the same. scheduler, order: names of
    scheduling policies (docs/scheduling.md)."""

    def __init__(
        self,
        artifact: str | Path,
        *,
        memory_bytes: int | None = None,
        threads: int | None = None,
        prefix_cache: bool = True,
        require_signature: str | Path | None = None,
        kernel_modules: Sequence[str] = (),
        scheduler: str = "chunked",
        order: str | None = None,
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
                scheduler=scheduler,
                order=order,
            )
        else:
            self._encoder, _ = open_encoder(self.artifact, memory_bytes, threads, kernel_modules)
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
        *,
        structured_outputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Completes each prompt (text, or token ids). `options` are fields of SamplingParams, beside the defaults of
        the model; or give `params` whole. With either go fields of Urgency: priority, offline, ttft_slo_ms,
        tpot_slo_ms. Order is kept. structured_outputs: the form each answer must have, one of
        {"json": schema}, {"json_object": True}, {"regex": text}, {"choice": [text, ...]} and {"grammar": Lark's
        notation}.

        Raises RequestRefused for what can never run, RuntimeError when a request fails; the other prompts then end.
        """
        if self._engine is None:
            raise self._wrong_task()
        urgency = take_urgency(options)
        if params is not None and options:
            raise TypeError(f"generate takes params or {', '.join(options)}, not both")
        from xllm.service.params import default_sampling

        chosen = params or SamplingParams(**default_sampling(self.artifact.generation) | options)
        if structured_outputs is not None:
            chosen = replace(chosen, grammar=self._grammar(structured_outputs))
        items: Iterable[Any] = [prompts] if isinstance(prompts, str) else prompts
        requests = [
            Request(f"llm-{next(self._ids)}", tuple(ids), chosen, urgency=urgency)
            for ids in (self.codec.encode(p, True) if isinstance(p, str) else p for p in items)
        ]
        with self._turn:
            try:
                gathered = self._run(self._engine, requests)
            except BaseException:
                for request in requests:
                    self._engine.cancel(request.id)
                raise
        return [self._completion(gathered[request.id]) for request in requests]

    def _grammar(self, outputs: Mapping[str, Any]) -> Grammar:
        from xllm.service.errors import ApiError

        try:
            return self._grammars.of(outputs)
        except ApiError as error:
            raise RequestRefused(error.code, error.message) from None

    @cached_property
    def _grammars(self) -> Grammars:
        from xllm.service.grammar import Grammars

        model = self.artifact.manifest["model"]
        return Grammars(self.codec, model["vocab"], model["eos_ids"])

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
