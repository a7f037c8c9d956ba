"""What an engine is told beside requests: whatever is told when, everybody gets the text they would have got alone."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import BOTH_LOOPS, RealMemory, Rig, assert_as_alone, expected_outputs, limit_of, request
from tests.runtime.test_prefix import TEXT
from tests.runtime.test_tiers import tiered, tiers_of
from xllm.runtime import Group, RequestRefused
from xllm.runtime.orders import ABORTED, Mode
from xllm.runtime.prefix import extend_chain


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


def test_sleep_is_refused_beside_requests_and_refuses_them():
    rig, asked = started(real_memory=True)
    rested: list[str] = []
    with pytest.raises(RequestRefused, match="engine_busy"):
        rig.engine.sleep("light", lambda: rested.append("light"))
    falls = rig.engine.sleep("light", lambda: rested.append("light"), "wait")
    with pytest.raises(RequestRefused, match="asleep"):
        rig.engine.submit(request("early", 5))
    rig.finish()
    assert falls.result(0) and rested == ["light"] and rig.engine.stats().asleep == "light"
    for one in asked:
        assert_as_alone(rig, one)
    assert os.fstat(cast(RealMemory, rig.memory)._fd).st_blocks == 0, "the pages' memory is the system's again"
    with pytest.raises(RequestRefused, match="asleep"):
        rig.engine.submit(request("late", 5))
    again, deeper = (rig.engine.sleep(level, lambda: rested.append("more")) for level in ("light", "deep"))
    swap = rig.engine.swap("b", lambda: rested.append("swapped"))
    rig.finish()
    assert not again.result(0) and deeper.result(0) and rested == ["light", "more"]
    with pytest.raises(RequestRefused, match="engine_busy"):
        swap.result(0)
    wakes, too = rig.engine.wake(lambda: None), rig.engine.wake(lambda: None)
    rig.finish()
    assert wakes.result(0) and not too.result(0) and not rig.engine.stats().asleep
    rig.engine.submit(one := request("r0", 40, 30, seed=0, ignore_eos=True))
    del rig.outputs[:]
    rig.finish()
    assert_as_alone(rig, one)
    assert rig.end("r0").cached_tokens == 0, "what a text had was forgotten"
    rig.assert_baseline()


def test_who_can_not_wake_sleeps_on():
    rig = Rig()
    rig.engine.sleep("deep", lambda: None)
    rig.finish()
    wakes = rig.engine.wake(lambda: exec("raise OSError('the file is gone')"))
    rig.finish()
    assert isinstance(wakes.exception(0), OSError) and rig.engine.asleep == "deep"
    wakes = rig.engine.wake(lambda: None)
    rig.finish()
    assert wakes.result(0) and not rig.engine.asleep


def test_a_sleep_that_waits_is_taken_back_and_one_of_paused_requests_is_refused():
    rig, asked = started()
    falls = rig.engine.sleep("light", lambda: None, "wait")
    rig.turn()
    rig.engine.wake(lambda: None)
    rig.turn()
    assert not falls.result(0) and not rig.engine.asleep
    rig.engine.submit(late := request("late", 5, 5, ignore_eos=True))
    rig.engine.pause()
    falls = rig.engine.sleep("light", lambda: None, "wait")
    rig.finish()
    with pytest.raises(RequestRefused, match="engine_busy: 3 requests"):
        falls.result(0)
    rig.engine.resume()
    rig.finish()
    for one in (*asked, late):
        assert_as_alone(rig, one)
    rig.engine.submit(request("ended", 5, ignore_eos=True))
    rig.turn()
    falls = rig.engine.sleep("light", lambda: None, "abort")
    rig.finish()
    assert falls.result(0) and rig.end("ended").finish_reason == "cancelled"


def test_weights_that_are_paused_half_way_are_not_mixed():
    rig, asked = started()
    rig.engine.submit(late := request("late", 5, 5, ignore_eos=True))
    rig.engine.pause()
    refused = rig.engine.swap("b", lambda: setattr(rig.executor, "weights", 1))
    rig.finish()
    with pytest.raises(RequestRefused, match="engine_busy: 2 requests"):
        refused.result(0)
    swaps = rig.engine.swap("b", lambda: setattr(rig.executor, "weights", 1), "abort")
    rig.finish()
    assert swaps.result(0) and rig.engine.stats().weights == "b" and rig.engine.stats().cached_pages == 0
    assert [rig.end(one.id).error for one in asked] == [ABORTED] * 2
    rig.engine.resume()
    rig.finish()
    assert rig.tokens("late") == expected_outputs(late, 5, rig.vocab, weights=1)[0]


STEP = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 90), st.integers(1, 30)),
    st.tuples(st.just("turn"), st.integers(1, 12), st.just(0)),
    st.tuples(st.sampled_from(["keep", "wait", "abort", "resume", "resume"]), st.just(0), st.just(0)),
    st.tuples(st.just("swap"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.sampled_from(["sleep", "wake", "wake"]), st.integers(0, 2), st.just(0)),
)


@given(st.lists(STEP, max_size=50), st.booleans(), st.sampled_from([6, 24]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_orders_at_any_time_change_no_text_and_mix_no_weights(steps, overlap, pages, tiers):
    """Every request ends once: with the text of exactly one version of the weights, or by an abort with the beginning
    of it. Every order is carried out or refused."""
    settings: dict[str, Any] = {"async_scheduling": overlap, "pages": pages, "max_seqs": 4}
    rig = tiered(host=50, **settings) if tiers else Rig(**settings)
    engine = rig.engine
    asked: list = []
    orders: list = []
    aborts = False
    for kind, first, second in steps:
        try:
            if kind == "submit":
                group = Group()
                for _ in range(1 + first % 3):
                    # Half of a prompt is everybody's: what one version computed of it must not be found by another.
                    prompt = (*range(min(first, 40)), *((len(asked) + n) % 40 for n in range(max(first - 40, 1))))
                    one = request(f"r{len(asked)}", prompt, min(second, 20), seed=3)
                    engine.submit(one := replace(one, group=group))
                    asked.append(one)
            elif kind == "turn":
                for at in range(first):
                    rig.turn()
                    if tiers and at % 3 != 2:
                        tiers_of(rig).work()
            elif kind == "swap":
                aborts |= second == 3
                load = partial(setattr, rig.executor, "weights", first)
                orders.append(engine.swap(f"v{first}" if first else "", load, "abort" if second == 3 else "wait"))
            elif kind == "sleep":
                mode = cast(Any, ("wait", "abort", None)[first])
                orders.append(engine.sleep("light", lambda: None, mode))
                aborts |= mode == "abort"
            elif kind == "wake":
                orders.append(engine.wake(lambda: None))
            else:
                orders.append(engine.resume() if kind == "resume" else engine.pause(cast(Mode, kind)))
                aborts |= kind == "abort"
        except RequestRefused as refusal:
            assert refusal.code in ("asleep", "engine_busy", "exceeds_capacity")
    for order in (lambda: engine.wake(lambda: None), engine.resume):
        rig.finish()
        order()
    rig.finish()
    for order in orders:
        refused = order.exception(0)
        assert refused is None or (isinstance(refused, RequestRefused) and refused.code == "engine_busy")
    versions: dict[Group, str] = {}
    for one in asked:
        tokens = [output for output in rig.outputs if output.request_id == one.id and output.token is not None]
        [version] = {output.weights for output in tokens} or {""}
        if tokens:
            assert versions.setdefault(one.group, version) == version, "one answer, two versions"
        expected, reason = expected_outputs(one, limit_of(rig, one), rig.vocab, weights=int(version[1:] or 0))
        if rig.end(one.id).finish_reason == "cancelled":
            assert aborts and rig.tokens(one.id) == expected[: len(rig.tokens(one.id))]
        else:
            assert (rig.tokens(one.id), rig.end(one.id).finish_reason) == (expected, reason)
    rig.assert_baseline()
    engine.stop()


def test_a_tier_gives_nothing_that_other_weights_have_computed_and_keeps_what_a_sleep_forgets():
    rig = tiered(host=50)

    def found(name: str, weights: int = 0) -> int:
        rig.engine.submit(one := request(name, tuple(TEXT[:200]), 4, ignore_eos=True))
        rig.finish()
        while tiers_of(rig).work():
            pass
        assert rig.tokens(name) == expected_outputs(one, 4, rig.vocab, weights=weights)[0]
        return rig.end(name).cached_tokens

    def done(order: Future[bool]) -> bool:
        rig.finish()
        return order.result(0)

    assert (found("a"), found("b")) == (0, 192)
    assert done(rig.engine.sleep("light", lambda: None)) and done(rig.engine.wake(lambda: None))
    assert found("c") == 192, "of the host's memory, which sleeps with it"
    assert done(rig.engine.swap("v1", partial(setattr, rig.executor, "weights", 1)))
    assert (found("d", 1), found("e", 1)) == (0, 192)
    assert done(rig.engine.swap("", partial(setattr, rig.executor, "weights", 0)))
    assert found("f") == 192, "these weights have computed it before"
    rig.engine.stop()


def test_nothing_is_loaded_into_a_pool_that_sleeps():
    rig = tiered(host=50)
    rig.engine.submit(request("a", tuple(TEXT[:200]), 1))
    rig.finish()
    while tiers_of(rig).work():
        pass
    rig.engine.sleep("light", lambda: None)
    rig.finish()
    chain: list[bytes] = []
    extend_chain(chain, TEXT[:200], rig.executor.kv.group_tokens, "0a")
    tiers_of(rig).load(chain, lambda: True)
    assert tiers_of(rig).work() and rig.engine.stats().cached_pages == 0
    assert os.fstat(cast(RealMemory, rig.memory)._fd).st_blocks == 0
    rig.engine.stop()
