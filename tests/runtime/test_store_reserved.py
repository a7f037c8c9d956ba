"""What a model reserves of the store for its own sequences, beside others: `zero-evict` preempts nobody there."""

from __future__ import annotations

import random

import pytest

from tests.runtime.fakes import BOTH_LOOPS, FakeMemory, Rig, assert_as_alone, request
from tests.runtime.test_store import fill, make_pools, together, two_rigs
from xllm.runtime import Request, RuntimeFault
from xllm.runtime.config import TierConfig
from xllm.runtime.store import PageStore


@BOTH_LOOPS
@pytest.mark.parametrize("seed", range(4))
def test_zero_evict_counts_on_no_page_that_the_other_model_may_take(seed, overlap):
    """What its sequences will need is not promised to the other one, and what that one has is not counted on."""
    preemptions = {}
    for name in ("chunked", "zero-evict"):
        rigs, rng = two_rigs(18, async_scheduling=overlap, policy={"scheduler": name}), random.Random(seed)
        asked: list[tuple[Rig, Request]] = []
        for n in range(40):
            rig = rigs[rng.random() < 0.5]
            each = request(f"r{n}", tuple([n % 40] * rng.randint(1, 60)), rng.randint(20, 60), ignore_eos=True)
            rig.engine.submit(each)
            asked.append((rig, each))
            for one in rigs:
                for _ in range(rng.randint(0, 4)):
                    one.turn()
        together(rigs)
        for rig, each in asked:
            assert_as_alone(rig, each)
        preemptions[name] = [rig.engine.stats().preemptions for rig in rigs]
        for rig in rigs:
            rig.assert_baseline()
    assert all(preemptions["chunked"]) and preemptions["zero-evict"] == [0, 0]


def test_what_is_reserved_is_nobody_elses_until_it_is_not_needed():
    store, (first, second) = make_pools(20, first=4, second=4)
    told: list[int] = []
    second.on_room = lambda: told.append(second.free_pages)
    slots = fill(first, 2)
    store.reserve(first, 12)
    assert (first.free_pages, second.free_pages) == (14, 8)
    fill(second, 5)
    store.reserve(first, 30)
    assert (first.promises.reserved, second.free_pages) == (15, 0), "no more than there is"
    store.reserve(first, 6)
    assert second.free_pages == told.pop() == 9
    assert store.claim(second) and second.free_pages == 11, "a search comes first"
    store.unclaim(second)
    for slot in slots:
        first.finish(slot)
    assert second.free_pages == 11, "nothing runs"
    second.check()


def test_an_engine_that_could_not_be_made_keeps_no_room():
    store = PageStore(FakeMemory(4096), 14)
    with pytest.raises(RuntimeFault):
        Rig(group_bytes=1000, max_len=200, pages=14, store=store, tiers=TierConfig(host_bytes=1, identity="0" * 32))
    other = Rig(group_bytes=3000, max_len=120, vocab=60, pages=14, store=store)
    assert other.engine.pool.free_pages == 14
