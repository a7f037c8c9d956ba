"""A device made of Python: page memory that knows what is mapped where, and an executor whose next token depends on
every token before it, read back through the mappings. Whatever breaks the rows' contract fails an assertion here.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from tests.runtime.memory import FakeMemory, RealMemory
from xllm.runtime import (
    Batch,
    EngineConfig,
    KVSpec,
    Limits,
    Request,
    SamplingParams,
    StepError,
    StepResult,
    TokenOutput,
)
from xllm.runtime.beams import BeamParams, BeamSearch, Found
from xllm.runtime.config import TierConfig
from xllm.runtime.engine import Engine
from xllm.runtime.store import PageStore
from xllm.runtime.urgency import ORDINARY, Urgency

EOS = 0


def next_token(tokens: list[int], seed: int | None, vocab: int) -> int:
    return zlib.crc32(np.array([seed or 0, *tokens], np.int32).tobytes()) % vocab


def seed_of(request: Request, weights: int) -> int:
    return (request.params.seed or 0) + 1000 * weights


def state_of(tokens: list[int]) -> int:
    return zlib.crc32(np.array(tokens, np.int32).tobytes()) >> 1


def candidates(tokens: list[int], vocab: int, count: int) -> tuple[tuple[int, float], ...]:
    """What may come next, best first, of a request with beams. Sums of these logprobs are exact: ties are ties."""
    mark = zlib.crc32(np.array(tokens, np.int32).tobytes()) | 1
    logprobs = (np.arange(1, vocab + 1, dtype=np.uint64) * mark * 2654435761 % 2**32 >> 26) / -16.0
    best = np.argsort(-logprobs, kind="stable")[:count]
    return tuple((int(token), float(logprobs[token])) for token in best)


def expected_found(request: Request, max_outputs: int, vocab: int) -> tuple[Found, ...]:
    """What a search finds: the oracle."""
    assert request.beams is not None
    search = BeamSearch(request.params, request.beams, (EOS,), max_outputs)
    while search.live:
        texts = [[*request.prompt, *beam.tokens] for beam in search.live]
        search.advance([candidates(text, vocab, search.wanted) for text in texts])
    return tuple(search.results())


def expected_outputs(
    request: Request, max_outputs: int, vocab: int, eos: int = EOS, weights: int = 0
) -> tuple[list[int], str]:
    """What a request generates when nothing else runs, and how it ends: the oracle."""
    tokens, params = [], request.params
    while len(tokens) < max_outputs:
        tokens.append(next_token([*request.prompt, *tokens], seed_of(request, weights), vocab))
        stops = tokens[-1] in params.stop_token_ids or (tokens[-1] == eos and not params.ignore_eos)
        if stops and len(tokens) >= params.min_tokens:
            return tokens, "stop"
    return tokens, "length"


@dataclass
class _Handle:
    executor: FakeExecutor
    batch: Batch

    def result(self) -> StepResult:
        return self.executor.run_until(self.batch)


class FakeExecutor:
    """Runs a step only when its result is asked for, that is as late as possible: a slot or page given up too early is
    then certain to be missed."""

    def __init__(self, memory: FakeMemory | RealMemory, limits: Limits, kv: KVSpec, budget: int | None = None):
        self.memory: FakeMemory | RealMemory = memory
        self.limits, self.kv = limits, kv
        self.budget = budget or limits.max_tokens_per_step
        self.sequences: dict[int, _Slot] = {}
        self.queue: list[Batch] = []
        self.sampled_slots: list[int] = []  # of the step launched last
        self.sampled: list[int] = []  # of the step run last
        self.best: dict[int, tuple[tuple[int, float], ...]] = {}  # of the step that runs, by slot
        self.fail_steps: set[int] = set()
        self.refuse_steps: set[int] = set()
        self.refuse_attach: set[str] = set()
        self.numeric_errors: set[tuple[str, int]] = set()  # (request, output index)
        self.batches: list[Batch] = []
        self.largest_step = 0
        self.closed = False
        self.weights = 0  # other ones, other tokens

    def attach(self, slot, request, generated) -> None:
        assert slot not in self.sequences
        assert not any(row.slot == slot for batch in self.queue for row in batch.rows)
        if request.id in self.refuse_attach:
            self.sequences[slot] = _Slot(request, 0)
            raise StepError("device_error", "no sampler state left")
        self.sequences[slot] = _Slot(request, len(request.prompt) + len(generated), list(generated))

    def detach(self, slot) -> None:
        assert not any(row.slot == slot for batch in self.queue for row in batch.rows)
        del self.sequences[slot]

    def close(self) -> None:
        self.closed = True

    def launch(self, batch: Batch) -> _Handle:
        assert batch.rows and len({row.slot for row in batch.rows}) == len(batch.rows) <= self.limits.max_seqs
        total = sum(len(row.tokens) for row in batch.rows)
        assert 1 <= total <= self.budget
        self.largest_step = max(self.largest_step, total)
        for row in batch.rows:
            sequence = self.sequences[row.slot]
            if sequence.launched < 0:
                sequence.launched = row.start  # what is before it was cached
            assert row.start == sequence.launched, "positions are not contiguous"
            assert row.start + len(row.tokens) <= self.limits.max_len
            assert len(row.tokens) >= 1
            sequence.launched += len(row.tokens)
            assert row.sample == (sequence.launched == sequence.length), "only the last token is sampled"
            sequence.length += row.sample
            for token in row.tokens:
                if token < 0:
                    assert self.queue, "a placeholder into a step that was committed"
                    assert self.sampled_slots[-1 - token] == row.slot
        if batch.step in self.refuse_steps:
            raise StepError("device_error", "cannot launch")
        self.sampled_slots = [row.slot for row in batch.rows if row.sample]
        self.queue.append(batch)
        self.batches.append(batch)
        assert len(self.queue) <= 2
        return _Handle(self, batch)

    def run_until(self, batch: Batch) -> StepResult:
        assert self.queue[0] is batch, "steps are committed in order"
        self.queue.pop(0)
        tokens = [self._run_row(row) for row in batch.rows]
        self.sampled = [token for token in tokens if token is not None]
        if batch.step in self.fail_steps:
            self.sampled = [1 for _ in self.sampled]
            raise StepError("device_error", "step failed")
        chosen = np.array(self.sampled, np.int32)
        best = np.full((len(chosen), max([2, *map(len, self.best.values())])), -1, np.int32)
        best[:, :2] = np.stack([chosen, chosen + 1], axis=1)
        logprobs = -best.astype(np.float32)
        for at, slot in enumerate([row.slot for row in batch.rows if row.sample]):
            if found := self.best.pop(slot, None):
                best[at, : len(found)] = [token for token, _ in found]
                logprobs[at, : len(found)] = [logprob for _, logprob in found]
        return StepResult(chosen, -chosen.astype(np.float32), best, logprobs)

    def _run_row(self, row) -> int | None:
        sequence = self.sequences[row.slot]
        mark = 1000 * self.weights  # what others have computed means nothing
        history = [self.memory.read(self._address(row, position)) - mark for position in range(row.start)]
        tokens = [token if token >= 0 else max(0, self.sampled[-1 - token]) for token in row.tokens]
        if self.kv.fixed_bytes:  # state of all the text before
            assert row.start == 0 or self.memory.read(row.kv_base) == state_of(history), "state of another text"
            self.memory.write(row.kv_base, state_of(history + tokens))
        for position, token in enumerate(tokens, row.start):
            self.memory.write(self._address(row, position), token + mark)
        if not row.sample:
            return None
        known = history + tokens
        made = known[len(sequence.request.prompt) :]
        assert len(made) == len(sequence.generated), "a draw at another place"
        assert made == sequence.generated or not sequence.request.params.looks_back, "a draw after another text"
        if (sequence.request.id, len(known) - len(sequence.request.prompt)) in self.numeric_errors:
            sequence.generated.append(0)  # as a step launched meanwhile reads it
            return -1
        if sequence.request.beams is not None:
            assert sequence.request.params.logprobs is not None
            self.best[row.slot] = candidates(known, self.limits.vocab, sequence.request.params.logprobs)
            token = self.best[row.slot][0][0]
        else:
            token = next_token(known, seed_of(sequence.request, self.weights), self.limits.vocab)
        sequence.generated.append(token)
        return token

    def _address(self, row, position: int) -> int:
        group, lane = divmod(position, self.kv.group_tokens)
        return (
            row.kv_base
            + self.kv.fixed_bytes
            + group * self.kv.group_bytes
            + lane * self.kv.group_bytes // self.kv.group_tokens
        )


@dataclass
class _Slot:
    request: Request
    length: int  # tokens known or sampled in flight
    generated: list[int] = field(default_factory=list)  # as its sampler has seen them
    launched: int = -1


@dataclass
class Rig:
    """An engine on fakes, driven step by step in the test's own thread; `now` counts turns."""

    max_tokens_per_step: int = 64
    max_chunk: int = 16
    max_seqs: int = 8
    max_len: int = 256
    vocab: int = 50
    pages: int = 64
    page_bytes: int = 4096
    group_bytes: int = 1000
    async_scheduling: bool = True
    admit_below: float = 0.95
    queue_limit: int = 1000
    group_tokens: int = 16
    fixed_bytes: int = 0
    real_memory: bool = False
    premap: bool = False
    prefix_cache: bool = True
    tiers: TierConfig | None = None
    policy: dict[str, Any] = field(default_factory=dict)  # scheduler, order, cost, aged_seconds, trace
    store: PageStore | None = None  # shared with other rigs, on fake memory
    outputs: list[TokenOutput] = field(default_factory=list)
    now: int = 0

    def __post_init__(self) -> None:
        self.memory: Any = RealMemory(self.page_bytes) if self.real_memory else FakeMemory(self.page_bytes)
        if self.store is not None:
            self.memory = self.store.memory
        limits = Limits(self.max_tokens_per_step, self.max_seqs, self.max_len, self.vocab)
        self.executor = FakeExecutor(self.memory, limits, KVSpec(self.group_bytes, self.group_tokens, self.fixed_bytes))
        config = EngineConfig(
            kv_bytes=self.pages * self.page_bytes,
            page_bytes=self.page_bytes,
            eos_ids=(EOS,),
            max_chunk=self.max_chunk,
            queue_limit=self.queue_limit,
            admit_below=self.admit_below,
            async_scheduling=self.async_scheduling,
            premap=self.premap,
            prefix_cache=self.prefix_cache,
            tiers=self.tiers,
            check=True,
            **self.policy,
        )
        pages = self.store or self.memory
        self.engine = Engine(self.executor, config, self.outputs.extend, pages, lambda: float(self.now))
        self.flight = None

    @property
    def busy(self) -> bool:
        engine = self.engine
        rests = engine._orders.resting or engine._starved
        return bool(self.flight or engine._told or engine._core.parked or not rests)

    def turn(self) -> None:
        """One turn of the engine's loop, if it would not sleep."""
        self.now += 1
        while self.engine._core.parked and not self.engine._cancelled:
            assert self.engine._tiers is not None
            assert self.engine._tiers.work(), "it waits for a load that nobody makes"
        if self.busy:
            self.engine._take_requests(self.flight)
            self.flight = self.engine._turn(self.flight)

    def finish(self, turns: int = 100_000) -> None:
        for _ in range(turns):
            if not self.busy:
                return
            self.turn()
        raise AssertionError(f"still busy after {turns} turns: {self.engine.why}")

    def tokens(self, request_id: str) -> list[int]:
        return [o.token for o in self.outputs if o.request_id == request_id and o.token is not None]

    def end(self, request_id: str) -> TokenOutput:
        ends = [output for output in self.outputs if output.request_id == request_id and output.finish_reason]
        assert len(ends) == 1, f"{request_id} ended {len(ends)} times"
        assert [o for o in self.outputs if o.request_id == request_id][-1] is ends[0], "output after the end"
        return ends[0]

    def assert_baseline(self) -> None:
        """Nothing is held any more."""
        assert self.engine.pool.promises.total == 0
        assert not self.executor.sequences and not self.executor.queue and not self.engine._live


def request(
    name: str, prompt: int | tuple[int, ...], max_tokens: int | None = None, urgency: Urgency = ORDINARY, **params
) -> Request:
    if isinstance(prompt, int):
        prompt = tuple(zlib.crc32(f"{name}/{i}".encode()) % 40 for i in range(prompt))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), urgency=urgency)


def search(
    name: str, prompt: int | tuple[int, ...], max_tokens: int, width: int, urgency: Urgency = ORDINARY, **params
) -> Request:
    return replace(request(name, prompt, max_tokens, urgency, **params), beams=BeamParams(width))


def limit_of(rig: Rig, req: Request) -> int:
    """Most tokens the engine lets a request generate."""
    capacity = min(rig.max_len, rig.engine.pool.plan.tokens_for(rig.engine.pool.plan.pages) + 1)
    return req.params.max_tokens or capacity - len(req.prompt)


def assert_as_alone(rig: Rig, req: Request) -> None:
    if req.beams is not None:
        end = rig.end(req.id)
        assert end.found == expected_found(req, limit_of(rig, req), rig.vocab), end.error
        assert rig.tokens(req.id) == [] and end.finish_reason == end.found[0].finish_reason
        return
    expected, reason = expected_outputs(req, limit_of(rig, req), rig.vocab)
    assert rig.tokens(req.id) == expected
    assert rig.end(req.id).finish_reason == reason
    assert [o.index for o in rig.outputs if o.request_id == req.id] == list(range(len(expected)))


BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
