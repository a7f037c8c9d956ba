"""The engine on a fake device: every request gets what it would get alone, ends once, and leaves nothing behind."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import EOS, FakeExecutor, FakeMemory, Rig, expected_outputs, request
from xllm.runtime import EngineConfig, KVSpec, Limits, Request, RequestRefused, SamplingParams, TokenOutput
from xllm.runtime.engine import Engine

BOTH_LOOPS = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


def limit_of(rig: Rig, req: Request) -> int:
    capacity = min(rig.max_len, rig.engine.pool.plan.tokens_for(rig.engine.pool.plan.pages) + 1)
    return req.params.max_tokens or capacity - len(req.prompt)


def assert_as_alone(rig: Rig, req: Request) -> None:
    expected, reason = expected_outputs(req, limit_of(rig, req), rig.vocab)
    assert rig.tokens(req.id) == expected
    assert rig.end(req.id).finish_reason == reason
    assert [o.index for o in rig.outputs if o.request_id == req.id] == list(range(len(expected)))


@BOTH_LOOPS
def test_one_request_is_generated_to_its_length(overlap):
    rig = Rig(async_scheduling=overlap)
    req = request("a", 40, max_tokens=10, ignore_eos=True)
    rig.engine.submit(req)
    rig.finish()
    assert_as_alone(rig, req)
    assert rig.end("a").finish_reason == "length"
    assert rig.end("a").prompt_tokens == 40
    stats = rig.engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished, stats.wasted_rows) == (40, 10, 1, 0)
    rig.assert_baseline()


@BOTH_LOOPS
def test_eos_ends_with_stop_and_costs_at_most_one_row(overlap):
    rig = Rig(async_scheduling=overlap, vocab=8)
    req = request("a", (1, 2, 3), max_tokens=200)
    rig.engine.submit(req)
    rig.finish()
    assert rig.tokens("a")[-1] == EOS and rig.end("a").finish_reason == "stop"
    assert rig.engine.stats().wasted_rows == (1 if overlap else 0)
    rig.assert_baseline()


@BOTH_LOOPS
def test_min_tokens_stop_ids_and_ignore_eos(overlap):
    rig = Rig(async_scheduling=overlap, vocab=8, max_len=128)
    requests = [
        request("min", (1, 2, 3), max_tokens=60, min_tokens=25),
        request("stop", (1, 2, 3), max_tokens=60, stop_token_ids=(5,), ignore_eos=True),
        request("ignore", (1, 2, 3), ignore_eos=True),
    ]
    for req in requests:
        rig.engine.submit(req)
    rig.finish()
    for req in requests:
        assert_as_alone(rig, req)
    assert len(rig.tokens("min")) >= 25
    assert rig.tokens("stop")[-1] == 5 and EOS in rig.tokens("ignore")
    assert len(rig.tokens("ignore")) == rig.max_len - 3


def test_logprobs_are_delivered_as_asked():
    rig = Rig()
    for name, logprobs in (("none", None), ("chosen", 0), ("best", 1)):
        rig.engine.submit(request(name, 5, max_tokens=1, logprobs=logprobs))
    rig.finish()
    none, chosen, best = rig.end("none"), rig.end("chosen"), rig.end("best")
    assert (none.logprob, none.top_logprobs) == (None, ())
    assert chosen.token and best.token
    assert (chosen.logprob, chosen.top_logprobs) == (-chosen.token, ())
    assert best.top_logprobs == ((best.token, -best.token),)


def test_chunks_and_decodes_share_steps_within_the_budget():
    rig = Rig(max_tokens_per_step=20, max_chunk=8)
    rig.engine.submit(request("a", 4, max_tokens=12, ignore_eos=True))
    rig.turn()
    rig.engine.submit(request("b", 60, max_tokens=2, ignore_eos=True))
    rig.finish()
    mixed = [b for b in rig.executor.batches if sorted(len(r.tokens) for r in b.rows) == [1, 19]]
    assert mixed, "with ample memory the prompt takes all that decodes leave"
    assert rig.executor.largest_step <= 20


@BOTH_LOOPS
def test_preemption_by_recompute_changes_no_token(overlap):
    rig = Rig(async_scheduling=overlap, pages=8, admit_below=1.0, max_len=400)
    requests = [request(name, 60, max_tokens=150, ignore_eos=True, seed=3) for name in "abcd"]
    for req in requests:
        rig.engine.submit(req)
    rig.finish()
    assert rig.engine.stats().preemptions > 0 and rig.engine.stats().recomputed_tokens > 0
    for req in requests:
        assert_as_alone(rig, req)
    rig.assert_baseline()


@BOTH_LOOPS
def test_cancel_frees_within_one_step(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.engine.submit(request("a", 30, ignore_eos=True))
    rig.engine.submit(request("b", 30, max_tokens=30, ignore_eos=True))
    for _ in range(6):
        rig.turn()
    rig.engine.cancel("a")
    rig.turn()
    assert rig.end("a").finish_reason == "cancelled" and rig.end("a").token is None
    assert len(rig.executor.sequences) == 1
    rig.engine.cancel("a")
    rig.engine.cancel("unknown")
    rig.finish()
    assert len(rig.tokens("b")) == 30
    rig.assert_baseline()


def test_cancel_while_waiting_and_with_a_reason():
    rig = Rig(max_seqs=1)
    rig.engine.submit(request("a", 3, max_tokens=5, ignore_eos=True))
    rig.engine.submit(request("b", 3, max_tokens=5))
    rig.turn()
    rig.engine.cancel("b", "stop")
    rig.finish()
    assert rig.end("b").finish_reason == "stop" and rig.tokens("b") == []
    with pytest.raises(RequestRefused, match="invalid_parameter"):
        rig.engine.cancel("a", "because")  # pyright: ignore[reportArgumentType]


@BOTH_LOOPS
def test_a_failed_step_fails_its_requests_only(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.fail_steps = {3}
    rig.engine.submit(request("a", 5, ignore_eos=True))
    rig.engine.submit(request("b", 5, ignore_eos=True))
    for _ in range(3):
        rig.turn()
    late = request("late", 5, max_tokens=7, ignore_eos=True)
    rig.turn()
    rig.engine.submit(late)
    rig.finish()
    for name in "ab":
        assert rig.end(name).finish_reason == "error" and rig.end(name).error == "device_error: step failed"
    assert_as_alone(rig, late)
    assert (rig.engine.stats().failed, rig.engine.stats().failed_steps) == (2, 1)
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_step_that_cannot_be_launched_fails_its_requests_only(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.refuse_steps = {2}
    rig.executor.refuse_attach = {"c"}
    for name in "abc":
        rig.engine.submit(request(name, 5, ignore_eos=True))
    for _ in range(4):
        rig.turn()
    late = request("late", 5, max_tokens=7, ignore_eos=True)
    rig.engine.submit(late)
    rig.finish()
    assert {rig.end(name).error for name in "ab"} == {"device_error: cannot launch"}
    assert rig.end("c").error == "device_error: no sampler state left"
    assert_as_alone(rig, late)
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_numeric_error_fails_one_request(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.numeric_errors = {("a", 3)}
    other = request("b", 5, max_tokens=9, ignore_eos=True)
    rig.engine.submit(request("a", 5, max_tokens=9, ignore_eos=True))
    rig.engine.submit(other)
    rig.finish()
    assert (rig.end("a").error or "").startswith("numeric_error") and len(rig.tokens("a")) == 3
    assert_as_alone(rig, other)
    rig.assert_baseline()


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (Request("x", ()), "empty_prompt"),
        (Request("x", (1, 50)), "token_out_of_range"),
        (Request("x", (1, -1)), "token_out_of_range"),
        (Request("x", (1,), SamplingParams(logit_bias={50: 1.0})), "token_out_of_range"),
        (request("x", 256), "context_length_exceeded"),
        (request("x", 200, max_tokens=57), "context_length_exceeded"),
        (request("x", 200, max_tokens=10), "exceeds_capacity"),
    ],
)
def test_what_can_never_run_is_refused(bad, code):
    rig = Rig(pages=3)
    with pytest.raises(RequestRefused) as refusal:
        rig.engine.submit(bad)
    assert refusal.value.code == code
    assert not rig.busy and rig.engine.stats().accepted == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"min_tokens": 4, "max_tokens": 3},
        {"repetition_penalty": 0.0},
        {"logit_bias": {1: float("inf")}},
        {"logprobs": -1},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestRefused, match=f"invalid_parameter: {next(iter(bad))}"):
        SamplingParams(**bad)


def test_without_max_tokens_generation_ends_at_the_smaller_of_context_and_pool():
    rig = Rig(pages=3)
    rig.engine.submit(request("a", 20, ignore_eos=True))
    rig.finish()
    assert len(rig.tokens("a")) == rig.engine.pool.plan.tokens_for(3) + 1 - 20
    rig.assert_baseline()


def test_a_full_queue_and_a_duplicate_are_refused():
    rig = Rig(queue_limit=2, max_seqs=1)
    for name in "ab":
        rig.engine.submit(request(name, 5, max_tokens=3))
    with pytest.raises(RequestRefused, match="queue_full"):
        rig.engine.submit(request("c", 5))
    rig.turn()
    with pytest.raises(RequestRefused, match="duplicate_request"):
        rig.engine.submit(request("a", 5))
    rig.finish()
    rig.engine.submit(request("a", 5, max_tokens=1))
    rig.finish()


ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 3, 12]),  # turns until it arrives
        st.integers(1, 60),  # prompt
        st.sampled_from([None, None, 90, 60, 35, 34, 33, 7, 1]),  # max_tokens
        st.booleans(),  # ignore_eos
        st.integers(0, 4),  # min_tokens
        st.sampled_from([None, None, None, None, 1, 5, 40]),  # cancelled that many turns after arrival
    ),
    min_size=4,
    max_size=10,
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=ARRIVALS,
    budget=st.sampled_from([1, 3, 16, 64]),
    max_chunk=st.integers(1, 40),
    max_seqs=st.integers(2, 6),
    spans=st.sampled_from([0.4, 1.0, 1.2, 1.7, 2.5, 6.0]),
    group_bytes=st.sampled_from([1500, 4096, 10_000]),
    admit_below=st.sampled_from([0.5, 0.95, 1.0]),
    vocab=st.sampled_from([9, 45, 500]),
    overlap=st.booleans(),
    premaps=st.integers(0, 3),
    fail_steps=st.sets(st.integers(0, 60), max_size=2),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    arrivals, budget, max_chunk, max_seqs, spans, group_bytes, admit_below, vocab, overlap, premaps, fail_steps
):
    """`spans` is the pool's size in sequences of full length: memory is tight in most examples."""
    rig = Rig(
        max_tokens_per_step=budget,
        max_chunk=max_chunk,
        max_seqs=max_seqs,
        max_len=96,
        vocab=vocab,
        pages=max(1, int(spans * 6 * group_bytes / 4096)),
        group_bytes=group_bytes,
        async_scheduling=overlap,
        admit_below=admit_below,
    )
    rig.executor.fail_steps = fail_steps
    serve_and_check(rig, arrivals, premaps)


@BOTH_LOOPS
@pytest.mark.parametrize("seed", range(12))
def test_dense_traffic_in_tight_memory(seed, overlap):
    """Long outputs, everybody at once, room for one and a half: preemption all the time."""
    rng = random.Random(seed)
    rig = Rig(
        max_tokens_per_step=rng.choice([8, 64]),
        max_chunk=rng.choice([5, 64]),
        max_len=96,
        vocab=500,
        pages=rng.choice([6, 9, 14]),
        group_bytes=4096,
        async_scheduling=overlap,
        admit_below=1.0,
    )
    arrivals = [
        (rng.randint(0, 30), rng.randint(1, 60), rng.choice([None, 35, 20]), rng.random() < 0.8, 0, None)
        for _ in range(14)
    ]
    serve_and_check(rig, arrivals, premaps=seed % 3)
    assert rig.engine.stats().preemptions > 0


def serve_and_check(rig: Rig, arrivals, premaps: int) -> None:
    accepted, cancels, refused = {}, {}, 0
    due = sorted((at, n) for n, (at, *_) in enumerate(arrivals))
    while due or rig.busy:
        while due and due[0][0] <= rig.now:
            n = due.pop(0)[1]
            _, prompt, max_tokens, ignore_eos, min_tokens, cancel = arrivals[n]
            if max_tokens is not None:
                min_tokens = min(min_tokens, max_tokens)
            req = request(
                f"r{n}", tuple((7 * n + i) % rig.vocab for i in range(prompt)), max_tokens,
                ignore_eos=ignore_eos, min_tokens=min_tokens, seed=n,
            )  # fmt: skip
            try:
                rig.engine.submit(req)
            except RequestRefused as refusal:
                assert refusal.code in ("exceeds_capacity", "context_length_exceeded")
                refused += 1
                continue
            accepted[req.id] = req
            if cancel is not None:
                cancels[req.id] = rig.now + cancel
        for name, at in cancels.items():
            if at == rig.now:
                rig.engine.cancel(name)
        for _ in range(premaps):
            rig.engine.pool.premap()
        rig.turn()
        assert rig.now < 100_000, "no end in sight"
    for name, req in accepted.items():
        if rig.end(name).finish_reason in ("cancelled", "error"):
            assert name in cancels or rig.executor.fail_steps
            expected, _ = expected_outputs(req, limit_of(rig, req), rig.vocab)
            assert rig.tokens(name) == expected[: len(rig.tokens(name))]
        else:
            assert_as_alone(rig, req)
    stats = rig.engine.stats()
    assert stats.accepted == len(accepted) == len(arrivals) - refused
    assert stats.accepted == stats.finished + stats.cancelled + stats.failed
    assert (stats.running, stats.waiting) == (0, 0)
    rig.assert_baseline()


def test_two_runs_take_the_same_decisions():
    def batches():
        rig = Rig(pages=6, admit_below=1.0)
        for name in "abcdef":
            rig.engine.submit(request(name, 50, max_tokens=60, ignore_eos=True))
        rig.finish()
        return rig.executor.batches

    assert batches() == batches()


class TestThread:
    """The engine's own thread, on the same fakes."""

    def engine(self, sink, **config):
        memory = FakeMemory(4096)
        executor = FakeExecutor(memory, Limits(64, 8, 256, 50), KVSpec(1000))
        settings = EngineConfig(kv_bytes=64 * 4096, page_bytes=4096, eos_ids=(EOS,), check=True, **config)
        return Engine(executor, settings, sink, memory)

    @BOTH_LOOPS
    def test_drain_waits_for_everything_and_refuses_new_requests(self, overlap):
        outputs = []
        engine = self.engine(outputs.extend, async_scheduling=overlap)
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
    def test_many_threads_submit_and_cancel(self, overlap):
        outputs: list[TokenOutput] = []
        engine = self.engine(outputs.extend, async_scheduling=overlap)
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

    def test_stop_ends_every_request_with_an_error(self):
        outputs = []
        engine = self.engine(outputs.extend)
        for n in range(20):
            engine.submit(request(f"r{n}", 5, ignore_eos=True))
        engine.start()
        engine.stop()
        ends = [o for o in outputs if o.finish_reason]
        assert len(ends) == 20
        assert {o.error.split(":")[0] for o in ends if o.finish_reason == "error"} <= {"shutting_down"}

    def test_a_sink_that_raises_ends_the_engine_but_nobody_waits(self):
        calls = []

        def sink(outputs):
            calls.append(outputs)
            if len(calls) == 1:
                raise ValueError("broken sink")

        engine = self.engine(sink)
        engine.submit(request("a", 5, ignore_eos=True))
        engine.start()
        assert engine.drain(60.0)
        with pytest.raises(RequestRefused, match="engine_failed"):
            engine.submit(request("b", 5))
        assert [(o.request_id, o.finish_reason) for o in calls[-1]] == [("a", "error")]
        engine.stop()
