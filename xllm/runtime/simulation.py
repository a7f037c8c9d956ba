"""The engine's own core in virtual time: a device that computes nothing and takes what a cost model says. For comparing
policies on arrivals that would take hours, and for tests of what only shows under load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from xllm.runtime.arrival import new_sequence
from xllm.runtime.config import EngineConfig, EngineStats
from xllm.runtime.core import Core
from xllm.runtime.executor import Batch, KVSpec, Limits, StepResult
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import plan_pool
from xllm.runtime.policies.state import StepCost
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.runtime.store import PageStore
from xllm.runtime.urgency import ORDINARY, Urgency
from xllm.runtime.xtensor import PageTicket

NONE = np.zeros((0, 0))


@dataclass(frozen=True)
class Arrival:
    """A request to come: seconds from the start, tokens of prompt and answer (which ends there)."""

    at: float
    prompt: int
    output: int
    urgency: Urgency = ORDINARY


@dataclass(frozen=True)
class Served:
    """What became of it: when its first and its last token were there; seconds from the start."""

    arrival: Arrival
    first: float
    last: float

    @property
    def ttft(self) -> float:
        return self.first - self.arrival.at

    @property
    def tpot(self) -> float:
        """Seconds per token after the first, 0 without any."""
        return (self.last - self.first) / max(1, self.arrival.output - 1)

    @property
    def good(self) -> bool:
        """As asked for."""
        urgency = self.arrival.urgency
        return self.ttft <= urgency.ttft and self.tpot <= urgency.tpot


class Gate(Protocol):
    """Who may come in, by the clock of the simulation."""

    def admits(self, request: Request, now: float) -> bool: ...

    def heard(self, outputs: Sequence[TokenOutput], now: float) -> None: ...


@dataclass(frozen=True)
class Machine:
    """What is simulated. group_bytes: of 16 tokens' keys and values."""

    cost: StepCost
    limits: Limits
    group_bytes: int
    kv_bytes: int
    page_bytes: int


def simulate(
    arrivals: Sequence[Arrival],
    machine: Machine,
    config: EngineConfig,
    until: float = float("inf"),
    gate: Gate | None = None,
) -> tuple[list[Served], EngineStats]:
    """Serves the arrivals, which are in order of time, with the overlapped loop; what the gate does not admit and what
    is not done after `until` seconds is left out. `config` says how; sizes of memory and limits come from the machine.
    """
    config = replace(config, kv_bytes=machine.kv_bytes, page_bytes=machine.page_bytes)
    device = _Device(machine)
    kv, limits = device.kv, machine.limits
    plan = plan_pool(kv, limits.max_len, limits.max_seqs, config.kv_bytes, config.page_bytes)
    core = Core(device, config, KvPool(plan, PageStore(_NoMemory(plan.page_bytes), plan.pages)), lambda: device.now)
    firsts: dict[str, float] = {}
    served: list[Served] = []
    flight, due = None, 0
    while due < len(arrivals) or flight is not None or not core.idle:
        if flight is None and core.idle:
            device.now = max(device.now, arrivals[due].at)
        while due < len(arrivals) and arrivals[due].at <= device.now:
            sequence = _sequence(due, arrivals[due], machine, plan)
            if gate is None or gate.admits(sequence.request, device.now):
                core.add(sequence)
            due += 1
        launched = core.launch(core.plan())
        core.commit(flight)
        flight = launched
        outputs = core.take_outputs()
        for output in outputs:
            _note(output, arrivals, firsts, served, device.now)
        if gate is not None:
            gate.heard(outputs, device.now)
        if device.now > until:
            break
    return served, core.stats()


def _note(
    output: TokenOutput, arrivals: Sequence[Arrival], firsts: dict[str, float], served: list[Served], now: float
) -> None:
    first = firsts.setdefault(output.request_id, now)
    if output.finish_reason is not None:
        served.append(Served(arrivals[int(output.request_id)], first, now))


def _sequence(number: int, arrival: Arrival, machine: Machine, plan):
    params = SamplingParams(max_tokens=arrival.output, ignore_eos=True)
    request = Request(str(number), (0,) * arrival.prompt, params, arrival=arrival.at, urgency=arrival.urgency)
    sequence = new_sequence(request, plan, machine.limits)
    sequence.order = number
    return sequence


@dataclass
class _Handle:
    device: _Device
    rows: int
    seconds: float
    end: float

    def result(self) -> StepResult:
        self.device.now = max(self.device.now, self.end)
        chosen = np.ones(self.rows, np.int32)
        return StepResult(chosen, chosen.astype(np.float32), NONE, NONE, seconds=self.seconds)


@dataclass
class _Device:
    """Steps run one after another, each as long as its cost."""

    machine: Machine
    now: float = 0.0
    free_at: float = 0.0
    limits: Limits = field(init=False)
    kv: KVSpec = field(init=False)

    def __post_init__(self) -> None:
        self.limits, self.kv = self.machine.limits, KVSpec(self.machine.group_bytes)

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None: ...

    def detach(self, slot: int) -> None: ...

    def close(self) -> None: ...

    def launch(self, batch: Batch) -> _Handle:
        seconds = self.machine.cost.seconds([(row.start, len(row.tokens)) for row in batch.rows])
        self.free_at = max(self.now, self.free_at) + seconds
        return _Handle(self, sum(row.sample for row in batch.rows), seconds, self.free_at)


@dataclass
class _NoMemory:
    """Pages that are only counted."""

    page_bytes: int
    huge_pages: str = "none"
    reserved: int = 0
    pages: int = 0

    def reserve(self, size: int) -> int:
        self.reserved += size
        return self.reserved - size

    def create_pages(self, count: int) -> range:
        self.pages += count
        return range(self.pages - count, self.pages)

    def map(self, page: int, address: int, writable: bool = True) -> None: ...

    def copy(self, page: int, address: int, size: int) -> None: ...

    def copy_out(self, page: int, offset: int, into: memoryview) -> None: ...

    def copy_in(self, page: int, pieces: Iterable[tuple[int, memoryview]]) -> None: ...

    def populate(self, address: int) -> None: ...

    def unmap(self, address: int, pages: int = 1) -> None: ...

    def discard(self) -> None: ...

    def reclaim(self) -> None: ...

    def export_page(self, page: int) -> PageTicket:
        raise NotImplementedError

    def import_page(self, ticket: PageTicket) -> int:
        raise NotImplementedError

    def release(self) -> None: ...
