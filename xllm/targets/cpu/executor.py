"""Runs the plan of an artifact on the CPU: weights mapped and checked, arena allocated, plans bound by bucket, once.

A worker thread runs launched steps in order, each by one native call that walks the plan and draws tokens. It releases
the GIL: the engine builds the next step meanwhile, and `launch` lays it out. Drawing is a call of its own where a
grammar's mask may be late, and where the plan has calls that are not native: of modules, or of torch where kernels are
missing.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from xllm.artifact import Artifact, ArtifactError, MappedWeights
from xllm.kernels import cpu
from xllm.kernels.cpu._library import library_file
from xllm.kernels.cpu.sampling import Draw, Sampler, SamplingError, Scores
from xllm.plan import Bucket, Plan
from xllm.plan import Call as PlannedCall
from xllm.runtime.errors import StepError
from xllm.runtime.executor import Batch, KVSpec, Limits, Row, StepResult
from xllm.runtime.masks import Masks
from xllm.runtime.request import Request
from xllm.targets.cpu.arena import allocate, give_back
from xllm.targets.cpu.bound import BoundPlan, Native, Piece, StepTimes, Times, fits
from xllm.targets.cpu.bounds import check_bounds
from xllm.targets.cpu.prompts import Prompts
from xllm.targets.cpu.steps import Step, flatten
from xllm.targets.modules import ModuleCall, kernels_of
from xllm.targets.turns import Turns

MAX_LOGPROBS = 512  # beams look at more than anybody is shown
_NO_ROW = np.iinfo(np.int32).max  # no token: a placeholder for a row that the step before did not have is refused
_EMPTY = np.zeros((0, 0), np.float32)
_NOTHING = StepResult(np.zeros(0, np.int32), np.zeros(0, np.float32), _EMPTY.astype(np.int32), _EMPTY)


class Prepared(NamedTuple):
    """A step laid out before it is its turn, and what is drawn when it has run."""

    step: Step
    bucket: Bucket
    draw: Draw | None


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
        self._previous = np.zeros(self.limits.max_seqs, np.int32)  # what the step before drew; the runner reads it
        self.times: Times | None = None  # where there is something to append to, every step adds what it took
        self._steps: queue.SimpleQueue[tuple[Batch, Prepared | None, Ticket] | None] = queue.SimpleQueue()
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
        try:
            prepared = None if self._prompts.asks(batch) else self._prepare(batch)
        except Exception as error:
            raise _fault(error) from error
        self._steps.put((batch, prepared, ticket))
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
            batch, prepared, ticket = item
            try:
                with self._turn:
                    result = self._run(batch, prepared)
                ticket.succeed(result)
            except Exception as error:
                # The step behind this one may refer to any row of it: its ids must be valid, its rows are dropped.
                self._previous[:] = 0
                ticket.fail(_fault(error))

    def _run(self, batch: Batch, prepared: Prepared | None) -> StepResult:
        began, prompts = time.perf_counter(), {}
        masks = self._masks.begin([row.slot for row in batch.rows if row.sample])
        if prepared is None:
            batch, prompts = self._prompts.score(batch, self._score)
            if not batch.rows:
                self._previous[:] = _NO_ROW
                return replace(_NOTHING, seconds=time.perf_counter() - began, prompts=prompts)
            prepared = self._prepare(batch)
        step, draw = prepared.step, prepared.draw
        bound, times = self._bound_for(prepared.bucket), self.times  # others may set it meanwhile
        if (whole := bound.whole) and not any(masks):  # a mask may come after the rows have
            calls = whole(step, draw) if times is None else whole.timed(step, draw)
            drawn = draw.seconds if draw else 0.0
            computed = time.perf_counter() - drawn
        else:
            step.resolve(self._previous)
            calls = bound.run(step) if times is None else bound.timed(step)
            computed = time.perf_counter()
            self._masks.wait(masks)
            if self._sampler and draw:
                self._sampler.draw(draw)
            drawn = time.perf_counter() - computed
        if times is not None and calls is not None:
            times.append(StepTimes(len(step.ids), calls, drawn, computed + drawn, batch.step))
        result = self._result(masks, draw, len(step.last))
        return replace(result, seconds=computed - began, sampling=drawn, prompts=prompts)

    def _prepare(self, batch: Batch) -> Prepared:
        step = flatten(batch, self.kv.fixed_bytes, self._previous)
        bucket = self._bucket_for(step)
        slots = np.array([row.slot for row in batch.rows if row.sample], np.int32)
        draw = self._sampler.prepare(self._rows_address(bucket), slots) if self._sampler and len(slots) else None
        return Prepared(step, bucket, draw)

    def _bucket_for(self, step: Step) -> Bucket:
        for bucket in self._plan.buckets:
            if fits(bucket, step):
                return bucket
        raise StepError("device_error", f"no bucket has {len(step.ids)} tokens and {len(step.last)} rows")

    def _bound_for(self, bucket: Bucket) -> BoundPlan:
        self._last_bucket = bucket
        return self._bound.get(bucket.T) or self._bound.setdefault(bucket.T, self._bind(bucket))

    def _rows_address(self, bucket: Bucket) -> int:
        return self.arena_address + bucket.offsets[self._plan.result]

    def _score(self, piece: Row, targets: Sequence[int], width: int) -> Scores:
        """Computes the piece with a row of logits for every token."""
        assert self._sampler is not None
        step = flatten(Batch(0, (piece,)), self.kv.fixed_bytes, every=True)
        bound = self._bound_for(self._bucket_for(step))
        bound.run(step)
        return self._sampler.score(self._rows_address(bound.bucket), np.array(targets, np.int32), width)

    def _result(self, masks: list[Any], draw: Draw | None, rows: int) -> StepResult:
        if draw is None:
            self._previous[:] = _NO_ROW
            return replace(_NOTHING, rows=self.rows(rows)) if self._sampler is None else _NOTHING
        drawn = draw.result
        tokens = self._masks.take(masks, drawn.tokens)
        self._previous[: len(tokens)], self._previous[len(tokens) :] = tokens, _NO_ROW
        return StepResult(tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs)

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


class Ticket:
    """Handle of a launched step."""

    def __init__(self) -> None:
        self._pending = threading.Lock()  # held until there is an outcome; an Event takes longer to set
        self._pending.acquire()
        self._outcome: StepResult | StepError | None = None

    def result(self) -> StepResult:
        with self._pending:
            pass
        if isinstance(self._outcome, StepError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def succeed(self, result: StepResult) -> None:
        self._outcome = result
        self._pending.release()

    def fail(self, error: StepError) -> None:
        self._outcome = error
        self._pending.release()


def _fault(error: Exception) -> StepError:
    """A fault is a value to the engine, whatever it is."""
    return error if isinstance(error, StepError) else StepError("device_error", str(error))


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
