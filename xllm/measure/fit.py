"""Fits the cost model of an artifact on this machine: which steps are run, how often, and what is made of the times.

Steps of a designed mix (sizes at which curves bend, then random ones) and held-out ones, of another seed, take turns:
each runs again when the others have had as much time. What others do on the machine only adds: the least time of a step
counts, without what its threads waited for a core. Coefficients are not negative and make the relative errors of the
mix small; how far they are off is told of the held-out steps, which no coefficient has seen.
"""

from __future__ import annotations

import math
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from xllm.artifact import Artifact
from xllm.measure.machine import state_memory, thread_times, undisturbed
from xllm.measure.profile import AHEAD, GREEDY, token_ids
from xllm.measure.shape import ShapeError
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.executor import Batch, Limits, Row
from xllm.runtime.request import Request
from xllm.targets import host
from xllm.targets.base import is_meeting
from xllm.targets.cpu.executor import CpuExecutor
from xllm.targets.fitted import Fidelity, Fitted

STATE_BYTES = 1 << 30  # keys and values of one step, at most; a quarter of what memory there is
RANDOM, HELD_OUT = 32, 24  # steps, on a machine that is fast enough
LEAST = 2  # runs of a step
LONG = 2  # shares of the time


@dataclass(frozen=True)
class Step:
    """(tokens computed before, new tokens) of each sequence, and how many of them are sampled: the first ones."""

    rows: tuple[tuple[int, int], ...]
    sampled: int

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.rows)

    @property
    def context(self) -> int:
        """Tokens whose keys and values the step needs room for."""
        return sum(past + new + AHEAD for past, new in self.rows)


Run = Callable[[Step], float]


def fit_artifact(
    artifact: Artifact, threads: int | None, seconds: float, tell: Callable[[str], None], modules: Sequence[str] = ()
) -> Fitted:
    """Measures for about so many seconds (more where a single step takes many). Raises ArtifactError for an artifact
    this machine cannot run."""
    count = host.threads(threads).count
    executor = CpuExecutor(artifact, count, kernel_modules=modules)
    try:
        tell("steps of many shapes")
        with stepping(executor, count) as (run, room):
            found = fit(run, windows_of(artifact), executor.limits, room, seconds)
    finally:
        executor.close()
    largest, fidelity, cost = found
    return Fitted(artifact.manifest["digest"], host.cpu_model(), count, largest, fidelity, cost)


def fit(
    run: Run,
    windows: tuple[int, ...],
    limits: Limits,
    room: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[int, Fidelity, StepCost]:
    """Tokens of the largest step, the errors and the model. room: tokens that the state of one step may have."""
    few, some = (min(run(Step(((0, tokens),), 1)) for _ in range(LEAST)) for tokens in (1, min(64, limits.max_len)))
    largest = limits.max_tokens_per_step
    while largest > 64 and some * largest / 64 > seconds / 12:
        largest //= 2
    shapes = Shapes(limits, room, largest)
    share = min(1.0, seconds / 8 / HELD_OUT / max(few, 1e-9))  # of the steps: a slow machine runs fewer
    mix = [*shapes.designed(), *shapes.drawn(random.Random(1), max(8, int(RANDOM * share)), largest // 4 or 1)]
    mix = list(dict.fromkeys(mix))
    held = [step for step in shapes.drawn(random.Random(2), max(8, int(HELD_OUT * share)), largest) if step not in mix]
    if not held:
        raise ShapeError("the steps of this artifact are too small to tell sizes apart")
    times = measure(run, [*mix, *held], seconds, clock)
    least = [min(each) for each in times]
    basis = Basis(doubling(largest), doubling(min(limits.max_seqs, largest)), windows)
    cost = fitted(basis, mix, least[: len(mix)])
    spread = statistics.median(statistics.median(each) / min(each) - 1 for each in times)
    off = errors(cost, held, least[len(mix) :])
    median, p90 = statistics.median(off), float(np.percentile(off, 90))
    return largest, Fidelity(len(held), len(mix), *(round(share, 4) for share in (median, p90, spread))), cost


def measure(run: Run, steps: Sequence[Step], seconds: float, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every run of every step: LEAST times each, in turns, then whichever has had least time so far. What
    takes several times its share runs once: it is long enough to be no accident, and many more fit into its time."""
    times: list[list[float]] = [[] for _ in steps]
    end = clock() + seconds
    order = list(range(len(steps)))
    for turn in range(LEAST):
        random.Random(turn).shuffle(order)
        for at in order:
            if sum(times[at]) <= LONG * seconds / len(steps):
                times[at].append(run(steps[at]))
    spent = [sum(each) for each in times]
    while clock() < end:
        at = spent.index(min(spent))
        times[at].append(run(steps[at]))
        spent[at] += times[at][-1]
    return times


def fitted(basis: Basis, steps: Sequence[Step], seconds: Sequence[float]) -> StepCost:
    """The coefficients that make relative errors small: of squares first, then weighted so that large ones, which
    mostly are disturbances, count in proportion only."""
    measured = np.array(seconds)
    parts = np.array([basis.parts(step.rows, step.sampled) for step in steps]) / measured[:, None]
    found, weights = np.zeros(basis.size), np.ones(len(steps))
    for _ in range(10):
        found = non_negative(parts * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(parts @ found - 1), 0.01))
    return StepCost(basis, tuple(float(f"{each:.6g}") for each in found))


def errors(cost: StepCost, steps: Sequence[Step], seconds: Sequence[float]) -> list[float]:
    """|predicted - measured| / measured of each step."""
    return [abs(cost.seconds(step.rows, step.sampled) / took - 1) for step, took in zip(steps, seconds, strict=True)]


def non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 for which |matrix x - target| is least (Lawson and Hanson, Solving Least Squares Problems, 1974)."""
    scale = np.sqrt((matrix**2).sum(axis=0))
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    found, held = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], bool)
    for _ in range(3 * len(found)):
        gain = np.where(held, -np.inf, matrix.T @ (target - matrix @ found))
        if gain.max() <= 1e-10 * len(target):
            break
        held[gain.argmax()] = True
        while held.any():
            free = np.zeros(len(found))
            free[held] = np.linalg.lstsq(matrix[:, held], target, rcond=None)[0]
            bad = held & (free <= 0)
            if not bad.any():
                found = free
                break
            part = (found[bad] / np.maximum(found[bad] - free[bad], 1e-300)).min()
            found = found + part * (free - found)
            held &= found > 1e-12
            found[~held] = 0.0
    return found / scale


def windows_of(artifact: Artifact) -> tuple[int, ...]:
    """The windows of its attention layers, 0 for none, as the costs of its calls name them."""
    terms = [name for call in artifact.plan.calls for cost in (call.cost.flops, call.cost.bytes) for name in cost.terms]
    return tuple(sorted({int(name[1:] or 0) for name in terms if is_meeting(name) and name[0] in "KP"}))


def doubling(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`."""
    return tuple(1 << bit for bit in range(most.bit_length()))


@dataclass(frozen=True)
class Shapes:
    """The steps that are run: none has more than `largest` tokens, or needs state for more than `room` tokens."""

    limits: Limits
    room: int
    largest: int

    def designed(self) -> Iterator[Step]:
        """Each curve and each part by itself: prompts of every size, sampled and not, at the start and behind others;
        decodes of every number at short and long contexts; as many short prompts."""
        sizes = (*doubling(self.largest), self.largest)
        for tokens in sizes:
            yield from self._if_fits([(0, tokens)], 1)
            if tokens <= 64:
                yield from self._if_fits([(0, tokens)], 0)
                yield from self._if_fits([(self._most(1) - tokens, tokens)], 1)
        for count in (*doubling(self.limits.max_seqs), self.limits.max_seqs):
            yield from self._if_fits([(15, 1)] * count, count)
            yield from self._if_fits([(self._most(count) - 1, 1)] * count, count)
            yield from self._if_fits([(0, 4)] * count, count)

    def drawn(self, chance: random.Random, count: int, most: int) -> Iterator[Step]:
        """Random ones, of `most` tokens at most: decodes, prompts, and both together, as serving has them."""
        for _ in range(100 * count):
            if not count:
                return
            kind = chance.choice(("decodes", "prompts", "both"))
            rows: list[tuple[int, int]] = []
            if kind != "prompts":
                decodes = _log_uniform(chance, 1, min(self.limits.max_seqs, most))
                rows += [(_log_uniform(chance, 1, self._most(decodes)) - 1, 1) for _ in range(decodes)]
            decodes, sampled = len(rows), len(rows)
            left = most - decodes
            for _ in range(0 if kind == "decodes" else chance.choice((1, 1, 2, 3))):
                if left >= 2 and len(rows) < self.limits.max_seqs:
                    new = _log_uniform(chance, 2, left)
                    past = _log_uniform(chance, 1, max(1, self._most(4) - new)) if chance.random() < 0.5 else 0
                    rows.append((past, new))
                    left -= new
            sampled += chance.randint(0, len(rows) - decodes)
            for step in self._if_fits(rows, sampled):
                count -= 1
                yield step

    def _most(self, count: int) -> int:
        """The longest context of so many sequences alike."""
        return max(1, min(self.limits.max_len, self.room // count - AHEAD))

    def _if_fits(self, rows: Sequence[tuple[int, int]], sampled: int) -> Iterator[Step]:
        step = Step(tuple(rows), sampled)
        long = any(past < 0 or past + new > self.limits.max_len for past, new in rows)
        if rows and not long and step.tokens <= self.largest and step.context <= self.room:
            yield step


def _log_uniform(chance: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(chance.uniform(math.log(low), math.log(high + 1)))))


@contextmanager
def stepping(executor: CpuExecutor, threads: int) -> Iterator[tuple[Run, int]]:
    """Runs a step and gives its seconds, without those that all threads waited for others to leave the cores; and the
    tokens of state that one may have. State is written before."""
    limits, spec = executor.limits, executor.kv
    per_token = -(-spec.group_bytes // spec.group_tokens)
    apart = limits.max_seqs * (spec.fixed_bytes + spec.group_bytes + mmap.PAGESIZE)  # what sequences take beside that
    left, whole = host.memory_left(), apart + limits.max_seqs * (limits.max_len + AHEAD) * per_token
    granted = min(whole, STATE_BYTES, left // 4 if left is not None else STATE_BYTES)
    memory = state_memory(max(granted, apart + 2 * AHEAD * per_token))
    room = (len(memory) - apart) // max(per_token, 1)
    prompt = token_ids(limits, limits.max_tokens_per_step, 0)
    for slot in range(limits.max_seqs):
        executor.attach(slot, Request(f"fit-{slot}", (0,), GREEDY), ())

    def run(step: Step) -> float:
        rows, at, first = [], 0, 0
        for slot, (past, new) in enumerate(step.rows):
            tokens = prompt[first : first + new]
            rows.append(Row(slot, memory.ctypes.data + at, past, tokens, slot < step.sampled))
            at += -(-spec.bytes_for(past + new + AHEAD) // mmap.PAGESIZE) * mmap.PAGESIZE
            first += new
        assert at <= len(memory)
        batch = Batch(0, tuple(rows))
        before, began = thread_times(), time.perf_counter()
        executor.launch(batch).result()
        took = time.perf_counter() - began
        return undisturbed(took, before, thread_times(), threads)

    try:
        yield run, room
    finally:
        for slot in range(limits.max_seqs):
            executor.detach(slot)
