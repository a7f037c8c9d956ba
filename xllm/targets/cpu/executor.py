"""Runs the plan of an artifact on the CPU: weights mapped and checked, arena allocated, plans bound by bucket, once.

A worker thread runs launched steps in order: one native call walks the plan, one samples. The native calls release
the GIL, so that the engine builds the next step meanwhile. No torch, unless the plan names operators that have no
native kernel.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from xllm.artifact import Artifact, ArtifactError, MappedWeights
from xllm.kernels import cpu
from xllm.kernels.cpu._library import library_file
from xllm.kernels.cpu.sampling import Sampler, SamplingError, Scores
from xllm.plan import Bucket, Plan
from xllm.plan import Call as PlannedCall
from xllm.runtime.errors import StepError
from xllm.runtime.executor import Batch, KVSpec, Limits, Row, StepResult
from xllm.runtime.masks import Masks
from xllm.runtime.request import Request
from xllm.targets.cpu.arena import allocate, give_back
from xllm.targets.cpu.bounds import check_bounds
from xllm.targets.cpu.prompts import Prompts
from xllm.targets.cpu.steps import Step, flatten
from xllm.targets.modules import ModuleCall, kernels_of
from xllm.targets.turns import Turns

MAX_LOGPROBS = 512  # beams look at more than anybody is shown
Piece = Callable[["Step"], None]


class CpuExecutor:
    """The executor of `xllm.runtime` for one artifact. turns: of executors that run on the same cores. Raises
    ArtifactError when this machine cannot run it."""

    def __init__(
        self,
        artifact: Artifact,
        threads: int,
        *,
        verify: bool = True,
        kernel_modules: Sequence[str] = (),
        turns: Turns | None = None,
    ) -> None:
        manifest, plan = artifact.manifest, artifact.plan
        if plan.is_function:
            raise ArtifactError("not-a-step", "the artifact is a function, not a language model: xllm.Session runs it")
        samples = manifest["task"]["kind"] == "generate"
        level = usable_level(manifest["target"])
        self._artifact, self._plan = artifact, plan
        self._modules = kernels_of(artifact, kernel_modules)
        self.weights = artifact.map_weights(verify, start_threads=threads)
        self.limits = limits_of(artifact)
        try:
            check_bounds(plan, self.limits.width, self.limits.max_len)
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}; compile again") from error
        self.kv = kv_of(plan)
        self._runner = cpu.Runner(threads, level)
        self._turn = (turns or Turns()).join()
        self._sampler = None
        if samples:
            self._sampler = Sampler(self._runner, self.limits.vocab, self.limits.max_seqs, MAX_LOGPROBS)
        self._masks = Masks(self.limits.vocab)
        self._eos = tuple(manifest["model"]["eos_ids"])
        self._prompts = Prompts(min(plan.buckets[-1].S, plan.buckets[-1].T))
        self._key = os.urandom(16)
        self._arena, self.arena_address = allocate(plan.arena_bytes)
        self._last_bucket = plan.buckets[-1]
        # The largest bucket shows that every call can be bound; the others differ by addresses, and wait for their
        # first step.
        self._bound = {self._last_bucket.T: self._bind(self._last_bucket)}
        self._previous = np.zeros(self.limits.max_seqs, np.int32)
        self.times: Times | None = None  # where there is something to append to, every step adds what it took
        self._steps: queue.SimpleQueue[tuple[Batch, Ticket] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="xllm-executor", daemon=True)
        self._worker.start()

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None:
        if self._sampler is None:
            raise StepError("wrong_task", "the artifact gives rows, not tokens: nothing can be sampled")
        params = request.params
        stops = () if params.ignore_eos else self._eos
        try:
            if params.seed is None:
                params = replace(params, seed=self._seed_for(request.id))
            self._prompts.attach(slot, request, generated)
            mask = self._masks.attach(slot, params.grammar, generated)
            self._sampler.attach(
                slot, params, request.prompt, generated, request.sample_index, (*stops, *params.stop_token_ids), mask
            )
        except SamplingError as error:
            raise StepError("invalid_parameter", str(error)) from error

    def detach(self, slot: int) -> None:
        if self._sampler is not None:
            self._sampler.detach(slot)
            self._masks.detach(slot)
            self._prompts.detach(slot)

    def launch(self, batch: Batch) -> Ticket:
        ticket = Ticket()
        self._steps.put((batch, ticket))
        return ticket

    def close(self) -> None:
        self._steps.put(None)
        self._worker.join()
        self._masks.close()
        if self._sampler is not None:
            self._sampler.close()
        self._runner.close()

    @property
    def threads(self) -> int:
        return self._runner.threads

    def rest(self, deep: bool) -> None:
        """Gives the memory of weights and values back, until `rouse`; no step may be launched. deep: the system's cache
        of the weight file goes too."""
        self.weights.rest(everywhere=deep)
        give_back(self._arena)

    def rouse(self) -> None:
        """Reads the weights again. Raises ArtifactError when they are not what they were."""
        self._artifact.check_weights(self.weights, start_threads=self.threads)

    def load(self, artifact: Artifact, weights: MappedWeights) -> None:
        """Computes with these weights of an artifact that differs in nothing else; no step may be launched."""
        self.weights.become(weights)
        self._artifact = artifact

    def rows(self, count: int) -> np.ndarray:
        """Copy of the latest step's rows (logits, embeddings, scores), float32 [count, width], after its result."""
        start = self._last_bucket.offsets[self._plan.result]
        raw = self._arena[start : start + count * self.limits.width * 4]
        return raw.view(np.float32).reshape(count, self.limits.width).copy()

    # --- the worker ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._steps.get()) is not None:
            batch, ticket = item
            try:
                with self._turn:
                    result = self._run(batch)
                ticket.succeed(result)
            except Exception as error:  # the boundary to the engine: a fault is a value
                # The step behind this one may refer to any row of it: its ids must be valid, its rows are dropped.
                self._previous = np.zeros(self.limits.max_seqs, np.int32)
                ticket.fail(error if isinstance(error, StepError) else StepError("device_error", str(error)))

    def _run(self, batch: Batch) -> StepResult:
        slots = [row.slot for row in batch.rows if row.sample]
        masks = self._masks.begin(slots)
        started = time.perf_counter()
        batch, prompts = self._prompts.score(batch, self._score)
        if not batch.rows:
            result = self._result([], [], self._last_bucket)
            return replace(result, seconds=time.perf_counter() - started, prompts=prompts)
        step = flatten(batch, self._previous, self.kv.fixed_bytes)
        bound = self._bound_for(step)
        times = self.times  # others may set it meanwhile
        calls = bound.run(step) if times is None else bound.timed(step)
        began = time.perf_counter()
        result = self._result(slots, masks, bound.bucket)
        ended = time.perf_counter()
        if times is not None and calls is not None:
            times.append(StepTimes(len(step.ids), calls, ended - began, ended, batch.step))
        return replace(result, seconds=began - started, sampling=ended - began, prompts=prompts)

    def _bound_for(self, step: Step) -> BoundPlan:
        self._last_bucket = next(bucket for bucket in self._plan.buckets if fits(bucket, step))
        return self._bound.get(self._last_bucket.T) or self._bound.setdefault(
            self._last_bucket.T, self._bind(self._last_bucket)
        )

    def _score(self, piece: Row, targets: Sequence[int], width: int) -> Scores:
        """Computes the piece with a row of logits for every token."""
        assert self._sampler is not None
        step = flatten(Batch(0, (piece,)), self._previous, self.kv.fixed_bytes, every=True)
        bound = self._bound_for(step)
        bound.run(step)
        address = self.arena_address + bound.bucket.offsets[self._plan.result]
        return self._sampler.score(address, np.array(targets, np.int32), width)

    def _result(self, slots: list[int], masks: list[Any], bucket: Bucket) -> StepResult:
        if self._sampler is None or not slots:
            empty = np.zeros((0, 0), np.float32)
            rows = self.rows(len(slots)) if self._sampler is None else None
            return StepResult(np.zeros(0, np.int32), np.zeros(0, np.float32), empty.astype(np.int32), empty, rows)
        address = self.arena_address + bucket.offsets[self._plan.result]
        self._masks.wait(masks)
        sampled = self._sampler.sample(address, np.array(slots, np.int32))
        tokens = self._masks.take(masks, sampled.tokens)
        # A poisoned row gives -1; the step behind it must still read a valid id (its row is dropped by the engine).
        self._previous = np.maximum(tokens, 0)
        return StepResult(tokens, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)

    # --- binding ------------------------------------------------------------------------------------------------------

    def _bind(self, bucket: Bucket) -> BoundPlan:
        """One bucket's calls with addresses in place of names, cut where an operator needs the torch fallback."""

        def address(reference: str) -> int | str | None:
            kind, name = reference[:1], reference[1:]
            if kind == "%":
                return self.arena_address + bucket.offsets[name]
            if kind == "@":
                return self.weights.address + self._plan.weights[name].offset
            return name if kind == "$" else None

        pieces: list[Piece] = []
        native: list[cpu.Call] = []

        def flush() -> None:
            if native:
                try:
                    plan = self._runner.add_plan(native)
                except cpu.KernelError as error:
                    raise ArtifactError("artifact-malformed", f"plan.json: {error}; compile again") from error
                pieces.append(Native(self._runner, plan, len(native)))
                native.clear()

        for call in self._plan.calls:
            if call.kernel == "torch":
                flush()
                pieces.append(self._fallback(call, bucket))
                continue
            if ":" in call.kernel:
                flush()
                run = self._modules[call.kernel]
                pieces.append(ModuleCall(call, self._plan, bucket, self._arena, self.weights, run).run)
                continue
            args = {name: address(reference) for name, reference in call.args.items()}
            native.append(cpu.Call(call.kernel, args, call.ints_at(bucket.sizes), call.floats, rows_of(call)))
        flush()
        return BoundPlan(bucket, tuple(pieces))

    def _fallback(self, call: PlannedCall, bucket: Bucket) -> Piece:
        from xllm.targets.fallback import TorchCall

        return TorchCall(call, self._plan, bucket, self._arena, self.weights).run

    def _seed_for(self, request_id: str) -> int:
        """A seed the client did not choose: unpredictable, and the same again when a preempted request comes back."""
        return int.from_bytes(hashlib.blake2b(request_id.encode(), key=self._key, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class StepTimes:
    """What one step took, in seconds: each call of the plan (float64 [calls]), then choosing tokens or copying rows.
    ended: when that was, as time.perf_counter tells it. step: the number of its batch."""

    tokens: int
    calls: np.ndarray
    sample: float
    ended: float
    step: int = 0


class Times(Protocol):
    def append(self, took: StepTimes, /) -> None: ...


@dataclass(frozen=True)
class Native:
    """`count` calls in a row, one native call."""

    runner: cpu.Runner
    plan: int
    count: int

    def __call__(self, step: Step) -> None:
        self.runner.run(self.plan, step.native)

    def timed(self, step: Step) -> np.ndarray:
        return self.runner.timed(self.plan, step.native, 0, self.count)


@dataclass(frozen=True)
class BoundPlan:
    """A bucket ready to run: native pieces, and fallback calls between them where kernels are missing."""

    bucket: Bucket
    pieces: tuple[Piece, ...]

    def run(self, step: Step) -> None:
        for piece in self.pieces:
            piece(step)

    def timed(self, step: Step) -> np.ndarray:
        """As `run`; seconds of every call of the plan."""
        return np.concatenate([_timed(piece, step) for piece in self.pieces])


def _timed(piece: Piece, step: Step) -> np.ndarray:
    if isinstance(piece, Native):
        return piece.timed(step)
    began = time.perf_counter()
    piece(step)
    return np.array([time.perf_counter() - began])


def fits(bucket: Bucket, step: Step) -> bool:
    return len(step.ids) <= bucket.T and len(step.last) <= bucket.S


class Ticket:
    """Handle of a launched step."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._outcome: StepResult | StepError | None = None

    def result(self) -> StepResult:
        self._done.wait()
        if isinstance(self._outcome, StepError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def succeed(self, result: StepResult) -> None:
        self._outcome = result
        self._done.set()

    def fail(self, error: StepError) -> None:
        self._outcome = error
        self._done.set()


def rows_of(call: PlannedCall) -> tuple[int, int, int]:
    """The rows of a call as its runner takes them: per token, per logit row, and a constant."""
    terms = call.rows.terms
    return terms.get("T", 0), terms.get("S", 0), terms.get("", 0)


def limits_of(artifact: Artifact) -> Limits:
    """What a step of the artifact may have, as its manifest and plan say."""
    manifest = artifact.manifest
    return Limits(
        max_tokens_per_step=artifact.plan.buckets[-1].T,
        max_seqs=manifest["limits"]["max_seqs"],
        max_len=manifest["limits"]["max_len"],
        vocab=manifest["model"]["vocab"] * manifest["task"].get("segments", 1),  # token t of segment s is s * vocab + t
        width=manifest["model"]["vocab"] if artifact.task == "generate" else manifest["task"]["width"],
    )


def kv_of(plan: Plan) -> KVSpec:
    return KVSpec(plan.kv.group_bytes, plan.kv.group_tokens, plan.kv.fixed_bytes)


def state_identity(artifact: Artifact) -> str:
    """Hex digest of all that decides the bytes of a sequence's state: weights, plan and layout; kernels as built, and
    their level here."""
    level = usable_level(artifact.manifest["target"])
    parts = f"{artifact.manifest['digest']} {level} ".encode() + library_file().read_bytes()
    return hashlib.blake2b(parts, digest_size=16).hexdigest()


def usable_level(target: dict[str, str]) -> str:
    """The level the artifact was compiled for, if this machine has it. Raises ArtifactError naming both."""
    if target["name"] != "cpu":
        raise ArtifactError("wrong-target", f"the artifact is for target {target['name']}, this runtime is cpu")
    if target["level"] not in cpu.levels():
        raise ArtifactError(
            "wrong-target",
            f"the artifact is for CPU level {target['level']}, this machine has {', '.join(cpu.levels())};"
            " compile the checkpoint again on this machine",
        )
    return target["level"]
