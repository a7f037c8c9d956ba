"""Random traffic through the whole engine on fakes: any schedule gives what each request gives alone."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, expected_outputs, limit_of, request
from xllm.runtime import RequestRefused

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
    serve_and_check(rig, dense_arrivals(rng), premaps=seed % 3)
    assert rig.engine.stats().preemptions > 0


@pytest.mark.skipif(sys.platform != "linux", reason="memfd and mmap are Linux's")
@BOTH_LOOPS
def test_dense_traffic_on_real_pages_with_the_background_thread(overlap):
    rig = Rig(
        max_len=96,
        vocab=500,
        pages=11,
        group_bytes=4096,
        async_scheduling=overlap,
        admit_below=1.0,
        real_memory=True,
        premap=True,
    )
    rig.engine.pool.start_premapping()
    serve_and_check(rig, dense_arrivals(random.Random(5)), premaps=0)
    rig.engine.stop()


def dense_arrivals(rng: random.Random) -> list:
    return [
        (rng.randint(0, 30), rng.randint(1, 60), rng.choice([None, 35, 20]), rng.random() < 0.8, 0, None)
        for _ in range(14)
    ]


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
