"""What an engine is told beside requests: whatever is told when, everybody gets the text they would have got alone."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, expected_outputs, limit_of, request
from xllm.runtime.orders import Mode


def started(overlap: bool = True, requests: int = 2, turns: int = 6, **settings) -> tuple[Rig, list]:
    """A rig whose requests have a few tokens each."""
    rig = Rig(async_scheduling=overlap, **settings)
    asked = [request(f"r{n}", 40 + n, 30, seed=n, ignore_eos=True) for n in range(requests)]
    for one in asked:
        rig.engine.submit(one)
    for _ in range(turns):
        rig.turn()
    assert all(0 < len(rig.tokens(one.id)) < 30 for one in asked[:2])
    return rig, asked


@BOTH_LOOPS
def test_pause_keep_frees_everything_and_resume_gives_the_same_text(overlap):
    rig, asked = started(overlap)
    done = rig.engine.pause()
    rig.finish()
    stats = rig.engine.stats()
    assert done.result(0) and stats.paused
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 2, stats.total_pages)
    asked.append(request("late", 20, 5, ignore_eos=True))
    rig.engine.submit(asked[-1])
    rig.finish()
    assert rig.tokens("late") == [] and rig.engine.stats().waiting == 3
    again = rig.engine.pause()
    rig.finish()
    assert not again.result(0)
    rig.engine.resume()
    rig.finish()
    assert not rig.engine.stats().paused
    for one in asked:
        assert_as_alone(rig, one)
    rig.assert_baseline()


@BOTH_LOOPS
def test_pause_abort_ends_all_and_queues_none_again(overlap):
    rig, asked = started(overlap, requests=10)  # eight run, two wait
    done = rig.engine.pause("abort")
    rig.finish()
    assert done.result(0)
    for one in asked:
        assert rig.end(one.id).finish_reason == "cancelled"
    rig.assert_baseline()
    rig.engine.submit(late := request("late", 20, 5))
    rig.finish()
    assert rig.engine.stats().waiting == 1
    rig.engine.resume()
    rig.finish()
    assert_as_alone(rig, late)
    assert len(rig.outputs) == sum(len(rig.tokens(one.id)) + 1 for one in asked) + len(rig.tokens("late"))


@BOTH_LOOPS
def test_pause_wait_finishes_who_runs_and_admits_nobody(overlap):
    rig, asked = started(overlap, max_seqs=2)
    rig.engine.submit(late := request("late", 20, 5))
    done = rig.engine.pause("wait")
    rig.turn()
    assert not done.done() and not rig.engine.paused
    rig.finish()
    assert done.result(0) and rig.engine.stats().waiting == 1
    assert rig.engine.pool.match(asked_chain(rig, asked[0])) > 0, "what was computed is kept"
    for one in asked:
        assert_as_alone(rig, one)
    assert rig.engine.resume() and not rig.tokens("late")
    rig.finish()
    assert_as_alone(rig, late)


def asked_chain(rig: Rig, one) -> list[bytes]:
    from xllm.runtime.prefix import extend_chain

    chain: list[bytes] = []
    extend_chain(chain, one.prompt, rig.executor.kv.group_tokens, "")
    return chain


def test_a_pause_that_waits_is_taken_back_or_hurried():
    rig, asked = started()
    waits = rig.engine.pause("wait")
    rig.turn()
    back = rig.engine.resume()
    rig.turn()
    assert not waits.result(0) and not back.result(0) and not rig.engine.paused
    waits, keeps = rig.engine.pause("wait"), rig.engine.pause("keep")
    rig.finish()
    assert sorted([waits.result(0), keeps.result(0)]) == [False, True] and rig.engine.stats().waiting == 2
    rig.engine.resume()
    rig.finish()
    for one in asked:
        assert_as_alone(rig, one)


def test_who_waits_in_a_pause_can_leave_and_a_stop_ends_the_rest():
    rig, _ = started()
    rig.engine.pause()
    rig.finish()
    rig.engine.cancel("r0")
    rig.finish()
    assert rig.end("r0").finish_reason == "cancelled" and rig.engine.stats().waiting == 1
    waits = rig.engine.pause("wait")
    rig.engine.stop()
    assert rig.end("r1").error == "shutting_down: the engine stopped"
    assert waits.exception(0) is not None
    with pytest.raises(Exception, match="shutting_down"):
        rig.engine.pause()


STEP = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 90), st.integers(1, 30)),
    st.tuples(st.just("turn"), st.integers(1, 12), st.just(0)),
    st.tuples(st.sampled_from(["keep", "wait", "abort", "resume", "resume"]), st.just(0), st.just(0)),
)


@given(st.lists(STEP, max_size=40), st.booleans(), st.sampled_from([6, 24]))
@settings(max_examples=60, deadline=None)
def test_pauses_at_any_time_change_no_text(steps, overlap, pages):
    """Every request ends once: with its own text, or by an abort with the beginning of it."""
    rig = Rig(async_scheduling=overlap, pages=pages, max_seqs=4)
    asked: list = []
    orders: list = []
    aborts = False
    for kind, first, second in steps:
        if kind == "submit":
            asked.append(request(f"r{len(asked)}", first, min(second, 20), seed=len(asked)))
            try:
                rig.engine.submit(asked[-1])
            except Exception:
                asked.pop()  # can never fit so small a pool
        elif kind == "turn":
            for _ in range(first):
                rig.turn()
        else:
            aborts |= kind == "abort"
            orders.append(rig.engine.resume() if kind == "resume" else rig.engine.pause(cast(Mode, kind)))
    rig.finish()
    rig.engine.resume()
    rig.finish()
    assert all(isinstance(order.result(0), bool) for order in orders)
    for one in asked:
        if rig.end(one.id).finish_reason != "cancelled":
            assert_as_alone(rig, one)
        else:
            expected, _ = expected_outputs(one, limit_of(rig, one), rig.vocab)
            assert aborts and rig.tokens(one.id) == expected[: len(rig.tokens(one.id))]
    rig.assert_baseline()
