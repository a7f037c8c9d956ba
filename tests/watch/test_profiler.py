"""What a profile holds: spans that nest, bounds that hold, texts that are escaped; and what the flame graph adds up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from xllm.runtime import Batch, Request, StepResult
from xllm.runtime.executor import Row
from xllm.watch import profiler as profiling
from xllm.watch.chrome import trace
from xllm.watch.executor import WatchedExecutor
from xllm.watch.flame import flame_graph, frames
from xllm.watch.profiler import Operator, Profiler, Recording

OPERATORS = [Operator("layers_0_<mlp>", "linear.i8"), Operator("layers_1_<mlp>", "linear.i8"), Operator("head", "&\"'")]
NOTHING = StepResult(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0)))


@dataclass
class Took:
    tokens: int
    calls: np.ndarray
    sample: float
    ended: float
    step: int


class Device:
    """Runs a step when its result is asked for, and tells whoever wants to know what it took."""

    times: Any = None
    limits = kv = SimpleNamespace()

    def __init__(self) -> None:
        self.failing: set[int] = set()

    def attach(self, slot, request, generated) -> None: ...
    def detach(self, slot) -> None: ...
    def close(self) -> None: ...
    def other(self) -> str:
        return "mine"

    def launch(self, batch: Batch):
        def result() -> StepResult:
            if batch.step in self.failing:
                raise RuntimeError("it broke")
            if self.times is not None:
                calls = np.array([1e-6, 2e-6, 3e-6]) * len(batch.rows)
                tokens = sum(len(row.tokens) for row in batch.rows)
                time.sleep(2e-5)  # as long at least as it says
                self.times.append(Took(tokens, calls, 1e-6, time.perf_counter(), batch.step))
            return NOTHING

        return SimpleNamespace(result=result)


class Loop:
    """An engine's loop over one slot after the other: a prompt, then two decodes."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.device = Device()
        self.profiler = Profiler(self.device, OPERATORS, seconds)
        self.executor: Any = WatchedExecutor(self.device, [1, 8], None, self.profiler)  # type: ignore[arg-type]
        self.step = 0

    def request(self, name: str = "a", slot: int = 0) -> None:
        self.executor.attach(slot, Request(name, (1, 2, 3), arrival=time.monotonic() - 1e-4), ())
        for start, tokens in ((0, (1, 2, 3)), (3, (4,)), (4, (5,))):
            self.run(Row(slot, 0, start, tokens, True))
        self.executor.detach(slot)

    def run(self, *rows: Row) -> None:
        handle = self.executor.launch(Batch(self.step, rows))
        self.step += 1
        handle.result()


def recorded(loop: Loop) -> Recording:
    found = loop.profiler.stop()
    assert found is not None
    return found


def spans(recording: Recording) -> Iterator[dict[str, Any]]:
    body = json.loads(trace(recording))
    assert body["displayTimeUnit"] == "ms"
    for event in body["traceEvents"]:
        assert event["ph"] in "MXbe" and event["pid"] == 1
        assert event["ph"] == "M" or event["ts"] >= 0
        if event["ph"] == "X":
            yield event


def assert_nested(events: list[dict[str, Any]]) -> None:
    """On every track a span lies in the one it begins in, or behind it."""
    for track in {event["tid"] for event in events}:
        open_: list[float] = []
        mine = [event for event in events if event["tid"] == track]
        for event in sorted(mine, key=lambda one: (one["ts"], -one["dur"])):
            end = event["ts"] + event["dur"]
            while open_ and open_[-1] <= event["ts"] + 5e-4:
                open_.pop()
            assert not open_ or end <= open_[-1] + 5e-4, (event, open_)
            open_.append(end)


def test_a_trace_has_every_step_its_calls_and_requests_and_they_nest() -> None:
    loop = Loop()
    loop.request("before")
    assert loop.profiler.start() and not loop.profiler.start()
    loop.request("one", slot=0)
    loop.run(Row(2, 0, 0, (1, 2), False), Row(3, 0, 5, (1,), True))
    loop.request("two", slot=1)
    recording = recorded(loop)
    assert loop.profiler.stop() is None and loop.device.times is None
    loop.request("after")
    events = list(spans(recording))
    assert_nested(events)
    steps = [event for event in events if event["name"].endswith(" step") and event["tid"] == 2]
    names = ["prompt step", "decode step", "decode step"]
    assert [event["name"] for event in steps] == [*names, "mixed step", *names]
    assert [event["args"]["step"] for event in steps] == list(range(3, 10))
    assert steps[3]["args"] == {"step": 6, "tokens": 3, "sequences": 2}
    calls = [event for event in events if event["tid"] == 2 and event not in steps]
    assert [event["name"] for event in calls] == [*(one.node for one in OPERATORS), "sampling"] * 7
    assert calls[0]["args"] == {"kernel": "linear.i8"} and calls[0]["ts"] == steps[0]["ts"]
    requests = {event["name"]: event for event in events if "prompt_tokens" in event["args"]}
    assert requests.keys() == {"one", "two"} and requests["two"]["tid"] == 101
    assert {event["name"] for event in events if event["tid"] == 101} == {"two", "prompt", "answer"}
    assert {event["name"] for event in events if event["tid"] == 1} == {"commit, deliver and plan", "wait for a step"}
    waits = [event for event in json.loads(trace(recording))["traceEvents"] if event["ph"] in "be"]
    assert [(event["ph"], event["name"]) for event in waits[:2]] == [("b", "one waits"), ("e", "one waits")]
    assert waits[1]["ts"] - waits[0]["ts"] <= 1e6


def test_what_runs_when_a_profile_begins_or_ends_is_cut_to_it() -> None:
    loop = Loop()
    loop.executor.attach(0, Request("long", (1, 2)), ())
    loop.run(Row(0, 0, 0, (1, 2), True))
    loop.profiler.start()
    loop.run(Row(0, 0, 2, (1,), True))
    recording = recorded(loop)
    loop.run(Row(0, 0, 3, (1,), True))
    (way,) = [event for event in spans(recording) if event["name"] == "long"]
    assert way["ts"] == 0 and way["dur"] == pytest.approx((recording.ended - recording.began) * 1e6, abs=0.01)
    assert not recording.ways[0].first, "its first token came before"
    assert len(recording.steps) == 1


def test_a_profile_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MAX_STEPS", 7)
    monkeypatch.setattr(profiling, "MAX_CALLS", 10)
    monkeypatch.setattr(profiling, "MAX_REQUESTS", 2)
    loop = Loop()
    loop.profiler.start()
    for _ in range(10):
        loop.request()
    assert loop.device.times is None, "nothing is timed any more"
    recording = recorded(loop)
    assert len(recording.steps) == 7 and len(recording.ways) == 3, "two that ended, and one that ran"
    assert [step.calls is not None for step in recording.steps] == [True] * 3 + [False] * 4
    assert recording.cut == "it ended after 7 steps; only the first 10 calls are told apart"
    assert len(recording.waits) <= 8 and len(recording.host) <= 8
    assert sum(totals.sum() for totals in recording.totals.values()) == pytest.approx(7 * 7e-6)
    assert_nested(list(spans(recording)))
    brief = Loop(seconds=0.0)
    brief.profiler.start()
    brief.request()
    assert recorded(brief).cut == "it ended after 0 seconds"


def test_steps_that_fail_leave_the_others_theirs() -> None:
    loop = Loop()
    loop.device.failing = {1}
    loop.profiler.start()
    for step in range(3):
        try:
            loop.run(Row(0, 0, 5 * (step == 2), (1,), True))
        except RuntimeError:
            assert step == 1
    recording = recorded(loop)
    assert [(step.number, step.kind) for step in recording.steps] == [(0, "prompt"), (2, "decode")]


def test_the_flame_graph_adds_up_and_is_escaped() -> None:
    loop = Loop()
    loop.profiler.start()
    loop.request()
    recording = recorded(loop)
    root = frames(recording)
    assert root.inner.keys() == {"prompt steps", "decode steps", "engine's thread: commit, deliver and plan"}
    decode = root.inner["decode steps"]
    assert decode.seconds == pytest.approx(2 * 7e-6) and decode.inner.keys() == {"layers_*_<mlp>", "head", "sampling"}
    assert decode.inner["layers_*_<mlp>"].seconds == pytest.approx(2 * 3e-6), "equal operators are one frame"
    assert root.seconds == pytest.approx(sum(frame.seconds for frame in root.inner.values()))
    drawing = flame_graph(recording)
    tree = ElementTree.fromstring(drawing)
    titles = [found.text or "" for found in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0].startswith("3 steps in ") and any(text.startswith("layers_*_<mlp>: ") for text in titles)
    assert any(text.startswith("&\"': ") for text in titles)
    assert b"<mlp>" not in drawing and b"<script" not in drawing and b"http" not in drawing.replace(
        b"http://www.w3.org/2000/svg", b""
    )  # fmt: skip
    for box in tree.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= 1200.1


def test_an_empty_profile_is_drawn_too() -> None:
    loop = Loop()
    loop.profiler.start()
    recording = recorded(loop)
    assert list(spans(recording)) == []
    ElementTree.fromstring(flame_graph(recording))


def test_what_else_an_executor_can_do_passes() -> None:
    assert Loop().executor.other() == "mine"
    with pytest.raises(AttributeError):
        _ = Loop().executor.nothing
