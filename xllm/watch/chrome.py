"""A recording as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing load: one track each for the engine's
thread and the executor's, one for every slot; requests that wait for a slot are spans of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from xllm.watch.profiler import SAMPLING, Recording, Step, Way

ENGINE, EXECUTOR, SLOTS = 1, 2, 100  # tracks; slot s is track 100 + s
Event = dict[str, Any]


def trace(recording: Recording) -> bytes:
    """JSON of the trace event format; times are microseconds since the recording began."""
    body = {
        "displayTimeUnit": "ms",
        "otherData": {"steps": str(len(recording.steps)), "cut": recording.cut},
        "traceEvents": [*_names(recording), *_events(recording)],
    }
    return msgspec.json.encode(body) + b"\n"


def _names(recording: Recording) -> Iterator[Event]:
    yield _named("process_name", 0, "xllm")
    yield _named("thread_name", ENGINE, "engine")
    yield _named("thread_name", EXECUTOR, "executor")
    for slot in sorted({way.slot for way in recording.ways}):
        yield _named("thread_name", SLOTS + slot, f"slot {slot}")


def _events(recording: Recording) -> Iterator[Event]:
    begin, end = recording.began, recording.ended

    def span(name: str, track: int, start: float, stop: float, **args: object) -> Event:
        """Cut to the recording. Both ends are rounded, so that spans that touch do not overlap."""
        at, to = (round((min(max(each, begin), end) - begin) * 1e6, 3) for each in (start, stop))
        return {"ph": "X", "pid": 1, "tid": track, "name": name, "ts": at, "dur": round(to - at, 3), "args": args}

    for start, stop in recording.host:
        yield span("commit, deliver and plan", ENGINE, start, stop)
    for start, stop in recording.waits:
        yield span("wait for a step", ENGINE, start, stop)
    for step in recording.steps:
        yield span(f"{step.kind} step", EXECUTOR, step.began, step.ended, step=step.number, tokens=step.tokens,
                   sequences=step.rows)  # fmt: skip
        yield from (span(name, EXECUTOR, *times, kernel=kernel) for name, kernel, *times in _inside(recording, step))
    for number, way in enumerate(recording.ways):
        track, stop = SLOTS + way.slot, way.ended or end
        yield span(way.id, track, way.attached, stop, prompt_tokens=way.prompt, preempted_before=way.again)
        if way.first:
            yield span("prompt", track, way.attached, way.first)
            yield span("answer", track, way.first, max(way.first, stop))
        if way.arrived and way.attached >= begin and not way.again:
            yield from _queued(number, way, begin)


def _inside(recording: Recording, step: Step) -> Iterator[tuple[str, str, float, float]]:
    """Name, kernel, start and end of each call of a step and of sampling."""
    at = step.began
    if step.calls is not None:
        ends = step.began + np.cumsum(step.calls)
        for (node, kernel), stop in zip(recording.operators, ends.tolist(), strict=True):
            yield node, kernel, at, stop
            at = stop
    yield SAMPLING, "", max(at, step.ended - step.sample), step.ended


def _queued(number: int, way: Way, begin: float) -> Iterator[Event]:
    event = {"cat": "queue", "id": number, "pid": 1, "tid": ENGINE, "name": f"{way.id} waits"}
    for phase, at in (("b", way.arrived), ("e", way.attached)):
        yield {**event, "ph": phase, "ts": round(max(0.0, at - begin) * 1e6, 3)}


def _named(kind: str, track: int, name: str) -> Event:
    return {"ph": "M", "pid": 1, "tid": track, "name": kind, "args": {"name": name}}
