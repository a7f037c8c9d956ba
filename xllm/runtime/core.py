"""The engine without a thread or a lock: plan a step, launch it, commit its results. Whoever drives it (engine loop,
simulator, test) chooses the order: launch and commit at once, or launch step i+1 before committing step i.

A sequence's slot and pages are given up when no launched step refers to them any more, never earlier. Results of rows
whose sequence ended meanwhile are dropped.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xllm.runtime.config import EngineConfig, EngineStats
from xllm.runtime.errors import MemoryFault, StepError
from xllm.runtime.executor import Batch, Executor, Handle, StepResult
from xllm.runtime.figures import figures_of
from xllm.runtime.groups import BeamGroup
from xllm.runtime.invariants import check
from xllm.runtime.kv import KvPool
from xllm.runtime.masks import GRAMMAR_FAILED, NOTHING_ALLOWED
from xllm.runtime.pace import Pace
from xllm.runtime.policies import choose
from xllm.runtime.policies.admission import Lengths
from xllm.runtime.policies.orders import rank
from xllm.runtime.policies.state import CAUSES, STEP_SECONDS
from xllm.runtime.request import FinishReason, TokenOutput, joined
from xllm.runtime.scheduler import Budget, Decision, Grant, Queues, decide
from xllm.runtime.sequence import Sequence, State
from xllm.runtime.sharing import Sharing
from xllm.runtime.spent import Spent
from xllm.runtime.tiers import Tiers

_FAULTS = {
    -1: "numeric_error: the logits hold NaN or infinity",
    GRAMMAR_FAILED: "grammar_failed: the grammar became too costly at this token; make its schema or pattern simpler",
    NOTHING_ALLOWED: "nothing_allowed: allowed_token_ids, bad_words and the grammar left no token to draw",
}


@dataclass(frozen=True)
class Flight:
    """A launched step: its rows' sequences in row order, and whether each one is sampled; seconds it should take, where
    the policy goes by them."""

    handle: Handle
    rows: tuple[Grant, ...]
    seconds: float = 0.0


class Core:
    """Sequences, queues and counters of one engine. Not thread-safe. Outputs gather in `outputs` until taken."""

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        pool: KvPool,
        clock: Callable[[], float],
        tiers: Tiers | None = None,
    ):
        limits = executor.limits
        self.executor = executor
        self.pool = pool
        self.budget = Budget(
            tokens=min(config.max_tokens_per_step or limits.max_tokens_per_step, limits.max_tokens_per_step),
            beside_decodes=config.max_beside_decodes or limits.max_tokens_per_step,
            max_chunk=config.max_chunk,
            admit_pages=int(pool.plan.pages * config.admit_below),
            pool=pool.plan,
            step_seconds=config.step_seconds or STEP_SECONDS,
            aged_seconds=config.aged_seconds,
        )
        self._pace = Pace(config.step_seconds)
        self._lengths = Lengths()
        self._policy = choose(config.scheduler, config.order)
        self._cost = config.cost
        self._trace = config.trace
        if self._trace is not None:
            self._trace.begin(config.scheduler, config.cost)
        self._offline: set[int] = set()  # orders of those that have not ended: while there are any, queues are ranked
        self._planned = self._ahead = 0.0  # seconds the next step should take, and the launched ones still
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self.outputs: list[TokenOutput] = []
        self.why: tuple[str, ...] = ()
        self.weights = config.weights
        self.only_begun = False  # of those that wait, admit only who has begun
        self._oldest_wait = 0.0
        self._clock = clock
        self.spent = Spent(clock)
        self._check = config.check
        self._sharing = Sharing(pool, executor.kv, config, tiers)
        self._eos = frozenset(config.eos_ids)
        self._rows = self._tokens = self._taken = 0  # of all steps; slots in use
        self._steps = self._prompt_tokens = self._generated_tokens = self._recomputed_tokens = 0
        self._causes = dict.fromkeys(CAUSES, 0)
        self._preemptions = self._wasted_rows = self._failed_steps = 0
        self._ends: dict[FinishReason, int] = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)

    @property
    def idle(self) -> bool:
        """Nothing to do, not even for a launched step."""
        return not (self.running or self.waiting or self.leaving)

    @property
    def loading(self) -> bool:
        """All that there are wait for loads: that nothing ran is then no fault."""
        return bool(self.waiting) and not (self.running or self.leaving) and self._sharing.loading

    @property
    def parked(self) -> bool:
        """And none of these has ended since."""
        return self.loading and self._sharing.parked

    def add(self, sequence: Sequence) -> None:
        sequence.arrived = sequence.arrived or self._clock()
        if sequence.request.urgency.offline:
            self._offline.add(sequence.order)
        insort(self.waiting, sequence, key=_order)

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled", error: str | None = None) -> None:
        """End a sequence now; what a launched step still uses is given up when that step has ended."""
        if sequence.finish is None:
            self._end(sequence, reason, error)

    def preempt_all(self) -> None:
        """Take all slots and pages back as soon as launched steps have ended; who had them waits to be computed
        again."""
        for sequence in self.running[::-1]:
            self._preempt(sequence)

    def forget_all(self) -> None:
        """Those it had have been told that it failed."""
        for line in (self.running, self.waiting, self.leaving):
            line.clear()
        self._taken = 0

    def take_weights(self, version: str) -> None:
        """The executor has other weights; nothing may run, and of those that wait nobody may have begun."""
        self.weights = version
        self._sharing.renew(version, self.waiting)

    def plan(self) -> tuple[Batch, tuple[Grant, ...]] | None:
        """The next step, its pages mapped and its sampler state attached; None when nothing can run now."""
        slots = self.pool.plan.spans - self._taken
        waiting = [sequence for sequence in self.waiting if sequence.begun] if self.only_begun else self.waiting
        cost, now = self._pace.cost(self._cost), self._clock() + self._ahead
        self.spent.begin()
        queues = Queues(self.running, waiting, slots)
        if self._offline or not self._policy.plain:
            queues = rank(self.running, waiting, slots, self._policy.order, self.budget, cost, now)
        self.spent.on("schedule")
        found, queues = self._sharing.look_up(queues, self.budget)
        self.spent.on("match")
        decision = decide(queues, self.budget, self.pool.free_pages, now, self._policy, cost)
        if self._trace is not None:
            self._trace.add(queues, self.budget, self.pool.free_pages, now, cost, decision)
        self.why, self._oldest_wait, self._planned = decision.why, decision.oldest_wait, decision.seconds
        admitted = {sequence.order for sequence in decision.admitted}
        for sequence in found:
            if sequence.order not in admitted:
                sequence.computed = 0
        for victim, cause in zip(decision.preempted, decision.causes, strict=True):
            self._causes[cause] += 1
            self._preempt(victim)
        self.spent.on("schedule")
        self._admit(decision)
        grants = tuple([grant for grant in decision.grants if self._prepare(grant)])
        self.spent.on("allocate")
        if not grants:
            return None
        rows = [row for grant in grants for row in grant.sequence.step_rows(self.pool, grant.tokens, grant.sample)]
        return Batch(self._steps, tuple(rows)), grants

    def launch(self, planned: tuple[Batch, tuple[Grant, ...]] | None) -> Flight | None:
        """Hand the step to the executor and note what it will have computed."""
        if planned is None:
            return None
        batch, grants = planned
        sampled = 0
        for grant in grants:
            sequence = grant.sequence
            sequence.computed += grant.tokens
            sequence.flights += 1
            self._tokens += grant.tokens * sequence.rows
            if grant.sample:
                sequence.pending += 1
                sequence.pending_row = sampled
                sampled += sequence.rows
                if isinstance(sequence, BeamGroup):
                    sequence.rows = 0
        self._steps += 1
        self._rows += len(batch.rows)
        try:
            flight = Flight(self.executor.launch(batch), grants, self._planned)
            self.spent.launched(sum(len(row.tokens) for row in batch.rows))
            self._ahead += flight.seconds
            return flight
        except StepError as error:
            self._fail(grants, error)
            return None

    def commit(self, flight: Flight | None) -> None:
        """Wait for a launched step, append its tokens, end what is complete and give up what nobody uses any more."""
        if flight is None:
            return
        self._ahead -= flight.seconds
        try:
            result = flight.handle.result()
        except StepError as error:
            self._fail(flight.rows, error)
        else:
            self.spent.begin()
            self._accept(flight.rows, result)
            self.spent.taken(result.seconds, result.sampling)
            self._pace.compare(flight.seconds, result.seconds)
            self.budget = self._pace.follow(self.budget, [grant.tokens for grant in flight.rows], result.seconds)
        if self._check:
            self.check()

    def take_outputs(self) -> list[TokenOutput]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def stats(self) -> EngineStats:
        return figures_of(self)

    def check(self) -> None:
        """Assert what must hold between steps. Raises InvariantBroken."""
        check(self.pool, self.running, self.waiting, self.leaving)

    def _admit(self, decision: Decision) -> None:
        for sequence in decision.admitted:
            self.waiting.remove(sequence)
            found = sequence.computed
            if sequence.queued is None:
                sequence.queued = self._clock() - sequence.arrived
            self._sharing.start(sequence)
            sequence.state = State.RUNNING
            insort(self.running, sequence, key=_order)
            self._taken += sequence.width
            self._recomputed_tokens += max(0, sequence.recompute - found)
            try:
                if isinstance(sequence, BeamGroup):
                    sequence.begin(self.executor)
                else:
                    self.executor.attach(sequence.slot, sequence.request, sequence.generated)
            except StepError as error:
                self._end(sequence, "error", str(error))

    def _prepare(self, grant: Grant) -> bool:
        """Back a row's tokens with pages. A sequence that cannot have them fails alone."""
        sequence = grant.sequence
        if sequence.finish is not None:
            return False
        try:
            if isinstance(sequence, BeamGroup):
                sequence.spread(self.pool, self.executor)
                sequence.grow(self.pool, sequence.computed + grant.tokens, grant.pages)
            elif grant.pages > sequence.pages:
                self.pool.grow(sequence.slot, sequence.computed + grant.tokens)
        except (MemoryFault, StepError) as error:
            self._end(sequence, "error", str(error))
            return False
        if grant.pages > sequence.pages:
            sequence.pages = grant.pages
            sequence.capacity = sequence.tokens_in(self.pool.plan, grant.pages)
        return True

    def _accept(self, rows: tuple[Grant, ...], result: StepResult) -> None:
        tokens, logprobs = result.tokens.tolist(), result.logprobs.tolist()
        first = after = 0  # of its rows of the result
        for sequence, count, _, sample in rows:
            sequence.flights -= 1
            fault = 0
            if sample:
                first, after = after, after + sequence.drawn
                fault = min(0, *tokens[first:after])
                sequence.pending -= 1
            if result.prompts and (part := result.prompts.get(sequence.slot)) is not None:
                sequence.prompted.append(part)
                if sequence.finish is None and np.isnan(part.logprobs).any():
                    self._end(sequence, "error", _FAULTS[-1])
            if sequence.finish is None:
                sequence.written += count
                if sequence.written >= sequence.publish_at and not fault:
                    self.spent.on("take")
                    self._sharing.publish(sequence)
                    self.spent.on("insert")
            if sequence.finish is not None:
                self._wasted_rows += (after - first) * sample
            elif fault:
                self._end(sequence, "error", _FAULTS[fault])
            elif sample and isinstance(sequence, BeamGroup):
                self._merge(sequence, [result.best(row, sequence.search.wanted) for row in range(first, after)])
            elif sample:
                best = result.best(first, sequence.request.params.logprobs)
                self._append(sequence, tokens[first], logprobs[first], best)
            if sequence.state is State.LEAVING and not sequence.flights:
                self._give_up(sequence)

    def _append(self, sequence: Sequence, token: int, logprob: float, best: tuple[tuple[int, float], ...]) -> None:
        index = len(sequence.tokens) - sequence.prompt_tokens
        sequence.tokens.append(token)
        reason = sequence.end_reason(token, self._eos)
        wanted = sequence.request.params.logprobs is not None
        self._count(sequence, 1)
        told = logprob if wanted else None
        prompt = joined(sequence.prompted) if sequence.prompted else None
        self.outputs.append(sequence.output(token, index, reason, self.weights, None, told, best, prompt))
        sequence.prompted = []
        if reason is not None:
            self._finish(sequence, reason)

    def _merge(self, group: BeamGroup, best: list[tuple[tuple[int, float], ...]]) -> None:
        if group.take(best):
            self._count(group, len(best))
        if group.search.live:
            return
        found = tuple(group.search.results())
        reason = found[0].finish_reason
        self.outputs.append(group.output(None, group.outputs, reason, self.weights, found=found))
        self._finish(group, reason)

    def _count(self, sequence: Sequence, tokens: int) -> None:
        """So many were generated."""
        self._generated_tokens += tokens
        if sequence.first_at is None:
            sequence.first_at = self._clock()
            self._prompt_tokens += sequence.prompt_tokens
            if sequence.request.group is not None:
                sequence.request.group.begun = True

    def _fail(self, rows: tuple[Grant, ...], error: StepError) -> None:
        """A step failed: its requests end with the error, all others go on."""
        self._failed_steps += 1
        for sequence, _, _, sample in rows:
            sequence.flights -= 1
            sequence.pending -= sample
            self.cancel(sequence, "error", str(error))
            if sequence.state is State.LEAVING and not sequence.flights:
                self._give_up(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End without a further token."""
        index = len(sequence.tokens) - sequence.prompt_tokens
        self.outputs.append(sequence.output(None, index, reason, error=error))
        self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish = reason
        self._offline.discard(sequence.order)
        self._ends[reason] += 1
        if reason in ("stop", "length"):
            self.budget = self._lengths.follow(self.budget, sequence.outputs)
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            sequence.state = State.DONE
        elif sequence.state is State.RUNNING:
            self._leave(sequence)

    def _preempt(self, victim: Sequence) -> None:
        self._preemptions += 1
        self._leave(victim)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.leaving.append(sequence)
        sequence.state = State.LEAVING
        if not sequence.flights:
            self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        """Return slot and pages. A sequence that is not finished was preempted: it waits to be computed again."""
        self.leaving.remove(sequence)
        self._taken -= sequence.width
        if isinstance(sequence, BeamGroup):
            sequence.leave(self.pool, self.executor)
        else:
            self.executor.detach(sequence.slot)
        self._sharing.finish(sequence)
        sequence.recompute = sequence.computed
        sequence.slot, sequence.pages, sequence.capacity, sequence.computed = -1, 0, 0, 0
        sequence.written = 0
        if sequence.finish is None:
            if isinstance(sequence, BeamGroup):
                sequence.come_back()
            sequence.state = State.WAITING
            self.add(sequence)
        else:
            sequence.state = State.DONE


def _order(sequence: Sequence) -> int:
    return sequence.order
