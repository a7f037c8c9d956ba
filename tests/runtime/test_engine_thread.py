"""The engine's own thread: other threads submit, cancel, drain and stop; nobody waits for ever."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest

from tests.runtime.fakes import BOTH_LOOPS, EOS, FakeExecutor, FakeMemory, expected_outputs, request
from xllm.runtime import EngineConfig, KVSpec, Limits, RequestRefused, TokenOutput
from xllm.runtime.engine import Engine


def make_engine(sink, **config):
    memory = FakeMemory(4096)
    executor = FakeExecutor(memory, Limits(64, 8, 256, 50), KVSpec(1000))
    settings = EngineConfig(kv_bytes=64 * 4096, page_bytes=4096, eos_ids=(EOS,), check=True, **config)
    return Engine(executor, settings, sink, memory)


@BOTH_LOOPS
def test_drain_waits_for_everything_and_refuses_new_requests(overlap):
    outputs = []
    engine = make_engine(outputs.extend, async_scheduling=overlap)
    engine.start()
    requests = [request(f"r{n}", 1 + n, max_tokens=20, seed=n) for n in range(40)]
    for req in requests:
        engine.submit(req)
    assert engine.drain(60.0)
    with pytest.raises(RequestRefused, match="shutting_down"):
        engine.submit(request("late", 3))
    assert engine.stats().free_pages == engine.stats().total_pages
    engine.stop()
    engine.stop()
    for req in requests:
        tokens = [o.token for o in outputs if o.request_id == req.id]
        assert tokens == expected_outputs(req, 20, 50)[0]


@BOTH_LOOPS
def test_many_threads_submit_and_cancel(overlap):
    outputs: list[TokenOutput] = []
    engine = make_engine(outputs.extend, async_scheduling=overlap)
    engine.start()

    def client(number: int) -> None:
        rng = random.Random(number)
        for n in range(30):
            name = f"c{number}.{n}"
            engine.submit(request(name, rng.randint(1, 60), max_tokens=rng.randint(1, 40), seed=number))
            if rng.random() < 0.4:
                engine.cancel(name if rng.random() < 0.5 else f"c{number}.{rng.randint(0, n)}")

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert engine.drain(120.0)
    ends = Counter(output.request_id for output in outputs if output.finish_reason)
    assert len(ends) == 120 and set(ends.values()) == {1}
    stats = engine.stats()
    assert stats.free_pages == stats.total_pages and stats.finished + stats.cancelled == 120
    engine.stop()


def test_stop_ends_every_request_with_an_error():
    outputs = []
    engine = make_engine(outputs.extend)
    for n in range(20):
        engine.submit(request(f"r{n}", 5, ignore_eos=True))
    engine.start()
    engine.stop()
    ends = [o for o in outputs if o.finish_reason]
    assert len(ends) == 20
    assert {o.error.split(":")[0] for o in ends if o.finish_reason == "error"} <= {"shutting_down"}


def test_stop_without_start_ends_requests_as_well():
    outputs = []
    engine = make_engine(outputs.extend)
    engine.submit(request("a", 5))
    engine.stop()
    assert [(o.request_id, o.error) for o in outputs] == [("a", "shutting_down: the engine stopped")]


def test_a_sink_that_raises_ends_the_engine_but_nobody_waits():
    calls = []

    def sink(outputs):
        calls.append(outputs)
        if len(calls) == 1:
            raise ValueError("broken sink")

    engine = make_engine(sink)
    engine.submit(request("a", 5, ignore_eos=True))
    engine.start()
    assert engine.drain(60.0)
    with pytest.raises(RequestRefused, match="engine_failed"):
        engine.submit(request("b", 5))
    assert [(o.request_id, o.finish_reason) for o in calls[-1]] == [("a", "error")]
    engine.stop()
    executor, memory = engine.executor, engine.pool.store.memory
    assert isinstance(executor, FakeExecutor) and isinstance(memory, FakeMemory)
    assert executor.closed and not memory.mapped
