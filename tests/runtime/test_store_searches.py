"""Searches of several models on one store: they may need more than is kept for them, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, request, search
from tests.runtime.test_prefix import text_of
from tests.runtime.test_store import make_pools, together, two_rigs
from xllm.runtime import Request, RequestRefused


@BOTH_LOOPS
def test_a_search_larger_than_a_longest_request_waits_for_other_models(overlap):
    """All pages but those kept for it are another model's: it claims them, and has them when that one's have ended."""
    rigs = searcher, other = two_rigs(14, async_scheduling=overlap)
    asked = [(other, request(f"long{n}", tuple([n + 1] * 60), 58, ignore_eos=True)) for n in range(4)]
    for _, each in asked:
        other.engine.submit(each)
    for _ in range(60):
        other.turn()
    asked.append((searcher, search("wide", (1,) * 60, 40, 4, ignore_eos=True)))
    searcher.engine.submit(asked[-1][1])
    asked += [(other, request(f"later{n}", tuple([n + 1] * 60), 58, ignore_eos=True)) for n in range(8)]
    for _, each in asked[5:]:
        other.engine.submit(each)
    together(rigs)
    for rig, each in asked:
        assert_as_alone(rig, each)
    assert other.engine.pool.free_pages == 14 - searcher.engine.pool.promises.share, "nothing is claimed any more"


@pytest.mark.parametrize("ends", ["cancel", "pause", "stop"])
def test_a_claim_ends_with_its_search_or_a_pause(ends):
    searcher, other = two_rigs(14)
    for at in range(4):
        other.engine.submit(request(f"long{at}", 60, 58, ignore_eos=True))
    while other.engine.pool.promises.total < 8:
        other.turn()
    searcher.engine.submit(search("wide", 60, 40, 4, ignore_eos=True))
    while not other.engine.pool.promises.shut_out:
        assert searcher.busy, "it waits without a claim"
        searcher.turn()
    if ends == "stop":
        searcher.engine.stop()
    else:
        searcher.engine.cancel("wide") if ends == "cancel" else searcher.engine.pause("keep")
        searcher.turn()
    assert not other.engine.pool.promises.shut_out
    other.finish()


@BOTH_LOOPS
@pytest.mark.parametrize("scheduler", ["chunked", "zero-evict"])
def test_an_engine_that_fails_leaves_what_it_had_to_a_search_that_waits(overlap, scheduler, monkeypatch):
    """It dies with more than its share, a step launched; who waits gets that, and what it was kept besides."""
    searcher, other = two_rigs(14, async_scheduling=overlap, policy={"scheduler": scheduler})
    asked = [request(f"long{at}", 60, 58, ignore_eos=True) for at in range(4)]
    for each in asked:
        other.engine.submit(each)
    while other.engine.pool.promises.total < 8:
        other.turn()
    wide = search("wide", 60, 40, 4, ignore_eos=True)
    searcher.engine.submit(wide)
    searcher.finish()
    assert searcher.engine._starved and other.engine.pool.promises.shut_out, "it has room as it is"
    monkeypatch.setattr(other.engine, "_turn", lambda _: 1 // 0)
    other.engine._run()
    for each in asked:
        assert (other.end(each.id).error or "").startswith("internal_error")
    figures = other.engine.stats()
    assert other.executor.closed and figures.running == figures.mapped_pages == figures.cached_pages == 0
    with pytest.raises(RequestRefused, match="engine_failed"):
        other.engine.submit(request("late", 5))
    searcher.finish()
    assert_as_alone(searcher, wide)
    assert searcher.engine.pool.promises.most == searcher.engine.pool.free_pages == 14
    assert searcher.engine.budget.reach_pages is None, "all of it is its own"
    searcher.engine.pool.check()
    other.engine.stop()
    searcher.engine.pool.check()


@BOTH_LOOPS
@pytest.mark.parametrize("scheduler", ["chunked", "prefill-only", "mix", "zero-evict", "fixed-steps"])
def test_searches_of_two_models_in_tight_memory_answer_as_alone(scheduler, overlap):
    """Both have some that need more than is kept for them, so that each may wait for what the other holds."""
    asked: list[tuple[Rig, Request]] = []
    for seed in range(3):
        rigs, rng = two_rigs(14, async_scheduling=overlap, policy={"scheduler": scheduler}), random.Random(seed)
        asked.clear()
        for n in range(40):
            rig = rigs[rng.random() < 0.5]
            prompt = tuple(token % 40 for token in text_of(n % 3)[: rng.randint(1, 70)])
            each = request(f"r{n}", prompt, rng.randint(1, 45), ignore_eos=True)
            if rng.random() < 0.5:
                each = search(f"r{n}", prompt, rng.randint(1, 45), rng.randint(1, 6), ignore_eos=True)
            try:
                rig.engine.submit(each)
            except RequestRefused as refusal:
                assert refusal.code == "exceeds_capacity" and each.beams
                continue
            asked.append((rig, each))
            for one in rigs:
                for _ in range(rng.randint(0, 4)):
                    one.turn()
                    one.engine.pool.premap()
        together(rigs)
        for rig, each in asked:
            assert_as_alone(rig, each)
        for rig in rigs:
            rig.assert_baseline()


def test_a_group_is_promised_its_pages_until_it_has_given_all_of_them_up():
    """Another model may plan a step between any two slots."""
    rig, other = two_rigs(24)
    seen: list[bool] = []

    def look() -> None:
        rig.engine.pool.check()
        seen.append(rig.engine.pool.promises.total > 0)

    other.engine.pool.on_room = look
    rig.engine.submit(search("wide", 60, 40, 4, ignore_eos=True))
    rig.finish()
    assert seen == [True] * 3 + [False]


def test_nothing_is_mapped_ahead_while_a_step_waits_for_the_last_page(monkeypatch):
    """A tier that fills it gives it back; the background would map it for the waiting slot, and the step find none."""
    store, (pool,) = make_pools(4, one=4)
    first, waits = pool.start(32), pool.start(16)
    pool.grow(first, 32)
    kept = pool.start(16)
    pool.grow(kept, 16)
    pool._hungry = {waits: None}
    filled, store.filling = store.free.pop(), 1

    def wait_for(found) -> None:
        assert not found()
        store.free.append(filled)
        store.filling = 0
        store.lock.release()
        assert not pool.premap()
        store.lock.acquire()

    monkeypatch.setattr(store.filled, "wait_for", wait_for)
    pool.grow(waits, 16)
    pool.check()
