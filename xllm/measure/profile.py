"""`xllm profile`: what every call of an artifact takes on this machine, and what the host adds to a step.

The executor runs steps of one shape again and again, on state that was written before, so that keys and values come
from memory as they do in service. Then the engine decodes requests of the same shape: what lies between the end of one
step and the end of the next, and is no native call, is what scheduling, launching and delivery cost.
"""

from __future__ import annotations

import mmap
import queue
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np

from xllm.artifact import Artifact
from xllm.kernels import cpu
from xllm.llm import engine_config
from xllm.measure.machine import Machine, ceilings, state_memory
from xllm.measure.record import Profile, StepProfile
from xllm.measure.shape import DECODED, Shape, usual_shapes
from xllm.memory import plan_memory
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Batch, Limits, Row
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.targets import host
from xllm.targets.cpu.bound import StepTimes
from xllm.targets.cpu.executor import CpuExecutor, limits_of

LEAST, MOST = 3, 1000  # steps of a shape
LEAST_LONG = 2  # of one that takes longer than all of its steps should
AHEAD = 128  # tokens of memory behind a sequence: as the engine maps, and kernels fetch, ahead of need
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=DECODED)


def profile(
    artifact: Artifact,
    shapes: Sequence[Shape] = (),
    *,
    threads: int | None = None,
    seconds: float = 5.0,
    kernel_modules: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measures steps of these shapes (none: `usual_shapes`) for `seconds` each, and the machine's limits beside them.

    Raises ShapeError, or ArtifactError for an artifact that this machine cannot run.
    """
    count = host.threads(threads).count
    executor = CpuExecutor(artifact, count, kernel_modules=kernel_modules)
    limits, level, task = limits_of(artifact), artifact.manifest["target"]["level"], artifact.task
    shapes = shapes or usual_shapes(limits, task)
    steps = []
    engine: Engine | None = None
    try:
        for shape in shapes:
            shape.check(limits, task)
        with cpu.Runner(count, level) as probe:
            held = [ceilings(probe)]
            for shape in shapes:
                tell(shape.name)
                steps.append(executor_steps(executor, shape, seconds, task))
                held.append(ceilings(probe))
        if any(shape.decode for shape in shapes):
            arrivals: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
            engine = Engine(executor, engine_config(artifact, plan_memory(artifact, None)), arrivals.put)
            engine.start()
            for at, shape in enumerate(shapes):
                if shape.decode:
                    tell(f"{shape.name} by the engine")
                    steps[at] = engine_steps(executor, engine, arrivals, shape, steps[at])
    finally:
        if engine is not None:
            engine.stop()  # the executor ends with it
        else:
            executor.close()
    # The greatest of several: the limit that flatters least.
    read, flops = (max(figures) for figures in zip(*held, strict=True))
    return Profile(artifact.manifest["digest"], Machine(host.cpu_model(), level, count, read, flops), tuple(steps))


def executor_steps(
    executor: CpuExecutor,
    shape: Shape,
    seconds: float,
    task: str,
    clock: Callable[[], float] = time.perf_counter,
) -> StepProfile:
    """Steps of one shape by the executor alone, at least LEAST of them. The first one touches what steps will touch,
    and does not count, except where it takes so long that this is nothing to it."""
    with _batch(executor, shape, task) as batch:
        executor.times, whole = [], []
        least, end = 1, clock() + seconds
        while len(whole) < least or (clock() < end and len(whole) < MOST):
            began = clock()
            executor.launch(batch).result()
            whole.append(clock() - began)
            if len(whole) == least == 1:
                least = LEAST_LONG
                if whole[0] < seconds:
                    executor.times, whole = [], []
                    least, end = LEAST, clock() + seconds
        times, executor.times = executor.times, None
    return summary(shape, times, whole)


def summary(shape: Shape, times: Sequence[StepTimes], whole: Sequence[float]) -> StepProfile:
    """Medians, of each call by itself. The host's part is the median of every step's own, no difference of medians."""
    host = [took - float(each.calls.sum()) - each.sample for took, each in zip(whole, times, strict=True)]
    calls = np.median([each.calls for each in times], axis=0)
    return StepProfile(
        shape.name,
        shape.sequences,
        len(times),
        tuple(map(_rounded, calls.tolist())),
        _rounded(statistics.median(each.sample for each in times)),
        _rounded(statistics.median(whole)),
        _rounded(statistics.median(host)),
    )


def engine_steps(
    executor: CpuExecutor,
    engine: Engine,
    arrivals: queue.SimpleQueue[list[TokenOutput]],
    shape: Shape,
    measured: StepProfile,
) -> StepProfile:
    """The same shape by the engine's loop, halfway through answers of DECODED tokens. The prompt is the same for all,
    since only decodes are of interest: where prefixes are cached it is computed once."""
    executor.times = []
    ids = tuple(token_ids(executor.limits, max(1, shape.context - DECODED // 2), 0))
    for index in range(shape.count):
        engine.submit(Request(f"profile-{index}", ids, GREEDY))
    left = shape.count
    while left:
        left -= sum(output.finish_reason is not None for output in arrivals.get())
    times, executor.times = executor.times, None
    return replace(measured, **between(times, shape.count))


def between(times: Sequence[StepTimes], tokens: int) -> dict[str, float]:
    """What the engine's loop takes for a step that follows another of as many tokens, and what of it is the host's."""
    found = [
        (after.ended - before.ended, float(after.calls.sum()) + after.sample)
        for before, after in pairwise(times)
        if before.tokens == after.tokens == tokens
    ]
    if not found:
        return {}
    whole, host = (statistics.median(part) for part in zip(*((took, took - run) for took, run in found), strict=True))
    return {"engine_step": _rounded(whole), "engine_host": _rounded(host)}


@contextmanager
def _batch(executor: CpuExecutor, shape: Shape, task: str) -> Iterator[Batch]:
    """A step of this shape whose sequences' state is written, their slots attached."""
    limits, spec = executor.limits, executor.kv
    size = spec.bytes_for(max(tokens + past for tokens, past in shape.sequences) + AHEAD)
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = state_memory(size * len(shape.sequences))
    rows = []
    for slot, (tokens, past) in enumerate(shape.sequences):
        ids = token_ids(limits, tokens, slot)
        rows.append(Row(slot, memory.ctypes.data + slot * size, past, ids, True))
        if task == "generate":
            executor.attach(slot, Request(f"profile-{slot}", (0,), GREEDY), ())
    try:
        yield Batch(0, tuple(rows))
    finally:
        for slot in range(len(rows)):
            executor.detach(slot)


def token_ids(limits: Limits, count: int, seed: int) -> list[int]:
    """Token ids, as random as a prompt is to a model."""
    return np.random.default_rng(seed).integers(0, limits.vocab, count).tolist()


def _rounded(seconds: float) -> float:
    """To a nanosecond."""
    return round(seconds, 9)
