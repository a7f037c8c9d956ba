"""The pool's states under random use, its choice of spans, and mapping ahead."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runtime.fakes import FakeMemory
from xllm.runtime import InvariantBroken, KVSpec, MemoryFault
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PageState, PoolPlan, plan_pool
from xllm.runtime.store import PageStore
from xllm.runtime.xtensor import MAX_MAPPINGS, choose_page_bytes

PAGE = 4096


def make_pool(pages: int = 16, span_pages: int = 8, spans: int = 4, group_bytes: int = PAGE) -> KvPool:
    """With the default group, a page holds 16 tokens."""
    plan = PoolPlan(KVSpec(group_bytes), PAGE, pages, span_pages, spans)
    return KvPool(plan, PageStore(FakeMemory(PAGE), plan.pages))


def run(pool: KvPool, pages: int) -> int:
    """A sequence of so many pages, finished at once; returns its slot."""
    slot = pool.start(pages * 16)
    pool.grow(slot, pages * 16)
    pool.finish(slot)
    return slot


@pytest.mark.parametrize("fixed_bytes", [0, 64, 4096, 9984])
@pytest.mark.parametrize(("group_bytes", "page_bytes"), [(1000, 4096), (4096, 4096), (10_000, 4096), (300, 8192)])
def test_pages_and_tokens_are_inverse(group_bytes, page_bytes, fixed_bytes):
    plan = PoolPlan(KVSpec(group_bytes, fixed_bytes=fixed_bytes), page_bytes, 100, 100, 1)
    for tokens in range(1, 600):
        pages = plan.pages_for(tokens)
        assert pages == -(-(fixed_bytes + -(-tokens // 16) * group_bytes) // page_bytes)
        assert plan.tokens_for(pages) >= tokens > plan.tokens_for(pages - 1)
        assert 0 <= plan.waste_bytes(tokens) < page_bytes
    assert plan.pages_for(0) == 0


def test_plan_divides_memory_and_refuses_too_little():
    plan = plan_pool(KVSpec(1 << 20), max_len=4096, max_seqs=4, kv_bytes=100 << 20)
    assert (plan.page_bytes, plan.pages, plan.span_pages, plan.spans) == (2 << 20, 50, 128, 4)
    assert plan_pool(KVSpec(1 << 20), 64, 2, 100 << 20).pages == 4, "no more pages than the spans hold"
    with pytest.raises(MemoryFault, match="pool_too_small"):
        plan_pool(KVSpec(1 << 20), 4096, 4, 1 << 20)


def test_what_does_not_grow_is_paid_by_every_sequence():
    kv = KVSpec(group_bytes=1024, fixed_bytes=3 * PAGE)
    plan = plan_pool(kv, max_len=64, max_seqs=3, kv_bytes=1 << 20, page_bytes=PAGE)
    assert (plan.span_pages, plan.pages) == (4, 12)
    assert kv.tokens_in(3 * PAGE) == plan.tokens_for(3) == 0, "nothing but what does not grow"
    pool = KvPool(plan, PageStore(FakeMemory(PAGE), plan.pages))
    slots = [pool.start(1) for _ in range(3)]
    for slot in slots:
        pool.grow(slot, 1)
        pool.grow(slot, 64)
        pool.check()
    assert pool.free_pages == 0 and pool.figures().critical_maps == 12, "the first token maps all of it"


def test_page_size_grows_with_the_pool_and_shrinks_with_the_span():
    assert choose_page_bytes(8 << 30, 1 << 30, 256) == 2 << 20
    large = choose_page_bytes(256 << 30, 1 << 30, 256)
    assert (256 << 30) // large + 256 <= MAX_MAPPINGS
    assert choose_page_bytes(1 << 30, 300 << 10, 256) == 512 << 10


def test_a_finished_span_is_reused_without_a_map_call():
    pool = make_pool()
    slot = run(pool, 3)
    before = pool.figures()
    assert before.states[PageState.REUSABLE] == 3 and before.critical_maps == 3
    assert run(pool, 3) == slot
    assert run(pool, 2) == slot, "one page of slack is fine"
    assert pool.figures() == before


def test_mapped_pages_come_before_free_ones_however_many_are_to_spare():
    pool = make_pool()
    long = run(pool, 6)
    before = pool.figures()
    assert run(pool, 1) == long
    assert pool.figures() == before
    pool.check()


def test_one_client_after_the_other_touches_no_more_memory_than_one():
    pool = make_pool(pages=64)
    mapped = []
    for _ in range(20):
        slot = pool.start(32)
        for tokens in range(32, 96):
            pool.grow(slot, tokens)
            pool.premap()
        pool.finish(slot)
        while pool.premap():
            pass
        mapped.append(pool.figures().states[PageState.REUSABLE])
    assert mapped == mapped[:1] * 20


def test_a_shorter_span_is_extended():
    pool = make_pool()
    slot = run(pool, 3)
    assert run(pool, 5) == slot
    assert pool.figures().critical_maps == 5 and pool.figures().unmaps == 0


def test_reusable_pages_are_reclaimed_when_none_is_free():
    pool = make_pool(pages=8)
    slots = [pool.start(32) for _ in range(4)]
    for slot in slots:
        pool.grow(slot, 32)
    for slot in slots:
        pool.finish(slot)
    slot = pool.start(8 * 16)
    pool.grow(slot, 8 * 16)
    pool.check()
    assert pool.figures().unmaps == 6 and pool.free_pages == 0
    with pytest.raises(MemoryFault, match="slot"):
        pool.grow(pool.start(16), 16)


def test_pages_mapped_ahead_never_stand_in_the_way():
    pool = make_pool(pages=8)
    first = pool.start(16)
    pool.grow(first, 16)
    while pool.premap():
        pass
    assert pool.figures().states[PageState.FREE] == 0 and pool.free_pages == 7
    second = pool.start(7 * 16)
    pool.grow(second, 7 * 16)
    pool.check()
    assert pool.free_pages == 0


def test_growth_over_premapped_pages_is_hidden():
    pool = make_pool()
    slot = pool.start(16)
    for tokens in range(1, 8 * 16 + 1):
        while pool.premap():
            pool.check()
        pool.grow(slot, tokens)
    figures = pool.figures()
    assert figures.critical_maps == 0 and figures.hidden_maps >= 8


def test_an_idle_pool_gets_pages_ready():
    pool = make_pool(spans=16, span_pages=4)
    while pool.premap():
        pass
    assert pool.figures().states[PageState.REUSABLE] == 8
    slot = pool.start(10)
    pool.grow(slot, 10)
    assert pool.figures().critical_maps == 0


def test_a_failed_mapping_loses_no_page():
    pool = make_pool()

    def refuse(page, address, writable=True):
        raise MemoryFault("memory_unavailable", "mmap failed")

    slot = pool.start(16)
    works, pool._memory.map = pool._memory.map, refuse
    with pytest.raises(MemoryFault):
        pool.grow(slot, 16)
    with pytest.raises(MemoryFault):
        pool.premap()
    pool.check()
    pool._memory.map = works
    pool.grow(slot, 16)
    pool.check()


def test_a_failed_unmapping_loses_no_page():
    pool = make_pool(pages=4)
    run(pool, 4)

    def refuse(address, pages=1):
        raise MemoryFault("memory_unavailable", "mmap failed")

    works, pool._memory.unmap = pool._memory.unmap, refuse
    blocker, slot = pool.start(64), pool.start(16)
    with pytest.raises(MemoryFault):
        pool.grow(slot, 16)
    pool.finish(blocker)
    with pytest.raises(MemoryFault):
        pool.grow(slot, 16)
    pool.check()
    pool._memory.unmap = works
    pool.grow(slot, 16)
    pool.check()


def test_check_notices_a_lost_page():
    pool = make_pool()
    pool.store.free.pop()
    with pytest.raises(InvariantBroken):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Any order of start, grow, finish and premap, within what a scheduler may promise."""

    kv = KVSpec(1500)

    def __init__(self):
        super().__init__()
        self.memory = FakeMemory(PAGE)
        plan = PoolPlan(self.kv, PAGE, pages=12, span_pages=6, spans=5)
        self.pool = KvPool(plan, PageStore(self.memory, 12))
        self.live: dict[int, int] = {}

    @precondition(lambda self: len(self.live) < 5)
    @rule(tokens=st.integers(1, 250))
    def start(self, tokens):
        slot = self.pool.start(tokens)
        assert slot not in self.live
        self.live[slot] = 0

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 80))
    def grow(self, data, more):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        plan = self.pool.plan
        tokens = min(self.live[slot] + more, plan.tokens_for(plan.span_pages))
        if plan.pages_for(tokens) - plan.pages_for(self.live[slot]) <= self.pool.free_pages:
            self.pool.grow(slot, tokens)
            self.live[slot] = tokens

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def finish(self, data):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.finish(slot)
        del self.live[slot]

    @rule()
    def premap(self):
        self.pool.premap()

    @invariant()
    def holds(self):
        self.pool.check()
        assert sum(self.pool.figures().states.values()) == 12
        promised = sum(self.pool.plan.pages_for(tokens) for tokens in self.live.values())
        assert self.pool.free_pages == 12 - promised
        for slot, tokens in self.live.items():
            for page in range(self.pool.plan.pages_for(tokens)):
                assert self.pool.base(slot) + page * PAGE in self.memory.mapped


class FixedPoolMachine(PoolMachine):
    """Of sequences with more state than fits one page before their first token."""

    kv = KVSpec(1500, fixed_bytes=5056)


SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)
PoolMachine.TestCase.settings = SETTINGS
FixedPoolMachine.TestCase.settings = SETTINGS
TestPoolMachine = PoolMachine.TestCase
TestFixedPoolMachine = FixedPoolMachine.TestCase


def test_ten_thousand_operations_leak_nothing():
    pool, rng = make_pool(pages=40, span_pages=8, spans=12, group_bytes=1500), random.Random(1)
    live: dict[int, int] = {}
    for step in range(10_000):
        choice = rng.random()
        if choice < 0.3 and len(live) < 12:
            live[pool.start(rng.randint(1, 300))] = 0
        elif choice < 0.6 and live:
            slot = rng.choice(list(live))
            tokens = min(live[slot] + rng.randint(1, 60), pool.plan.tokens_for(8))
            if pool.plan.pages_for(tokens) - pool.plan.pages_for(live[slot]) <= pool.free_pages:
                pool.grow(slot, tokens)
                live[slot] = tokens
        elif choice < 0.8 and live:
            slot = rng.choice(list(live))
            pool.finish(slot)
            del live[slot]
        else:
            pool.premap()
        if step % 50 == 0:
            pool.check()
    for slot in live:
        pool.finish(slot)
    pool.check()
    assert pool.free_pages == 40 and sum(pool.figures().states.values()) == 40


def test_the_background_thread_maps_ahead_and_ends():
    pool = make_pool(pages=64, span_pages=8, spans=8)
    ready = threading.Event()
    populate = pool._memory.populate

    def populated(address):
        populate(address)
        if pool.figures().hidden_maps >= 8:
            ready.set()

    pool._memory.populate = populated
    pool.start_premapping()
    slot = pool.start(16)
    assert ready.wait(60)
    pool.grow(slot, 16)
    pool.check()
    pool.close()
    assert "xllm-premap" not in {thread.name for thread in threading.enumerate()}
