"""Pools of several models on one store: nobody loses a page that was promised, nobody waits for ever, no byte of one
model is read by another."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runtime.fakes import BOTH_LOOPS, FakeMemory, Rig, assert_as_alone, request
from tests.runtime.test_prefix import chain_of, text_of
from xllm.runtime import InvariantBroken, KVSpec, MemoryFault, Request
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PageState, PoolPlan
from xllm.runtime.rest import give_back, take_back
from xllm.runtime.store import PageStore

PAGE = 4096
PAGES = 14


def make_pools(pages: int = PAGES, spans: int = 8, **sizes: int) -> tuple[PageStore, list[KvPool]]:
    """A store and a pool for each size of longest request; a page holds 16 tokens."""
    store = PageStore(FakeMemory(PAGE), pages)
    plans = [PoolPlan(KVSpec(PAGE), PAGE, pages, span_pages, spans) for span_pages in sizes.values()]
    return store, [KvPool(plan, store) for plan in plans]


def fill(pool: KvPool, pages: int) -> list[int]:
    """Sequences of one page each; their slots."""
    slots = [pool.start(16) for _ in range(pages)]
    for slot in slots:
        pool.grow(slot, 16)
    return slots


def test_each_is_kept_room_for_its_longest_request():
    _, (large, small) = make_pools(10, large=6, small=3)
    assert (large.free_pages, small.free_pages) == (7, 4)
    fill(large, 7)
    assert (large.free_pages, small.free_pages) == (0, 3)
    with pytest.raises(MemoryFault, match="memory_unavailable"):
        large.grow(large.start(16), 16)
    slot = small.start(48)
    small.grow(slot, 48)
    small.check()
    assert small.free_pages == 0
    small.finish(slot)
    assert large.free_pages == 0, "what is kept for the other is no less for being used"


def test_a_store_too_small_for_all_is_refused():
    with pytest.raises(MemoryFault, match=r"pool_too_small.*every model"):
        make_pools(8, large=6, small=3)


def test_idle_pages_go_to_who_needs_them():
    _, (one, other) = make_pools(10, one=6, other=3)
    for slot in fill(one, 7):
        one.finish(slot)
    assert one.figures().states[PageState.REUSABLE] == 7
    fill(other, 4)
    assert one.figures().states[PageState.REUSABLE] == 6 and one.figures().unmaps == 1
    one.check()


def test_cached_pages_go_in_the_order_of_their_use_whoever_has_them():
    _, (one, other) = make_pools(6, one=3, other=3)
    for pool, text in ((one, 0), (other, 1), (one, 2)):
        slot = pool.start(16)
        pool.grow(slot, 16)
        pool.finish(slot, [bytes([text])])
    fill(one, 3)
    assert [pool.figures().states[PageState.CACHED] for pool in (one, other)] == [2, 1]
    slot = other.start(16)
    other.grow(slot, 16)
    assert [pool.match([bytes([text])]) for pool, text in ((one, 0), (other, 1), (one, 2))] == [0, 1, 1]
    assert (one.figures().evictions, other.figures().evictions) == (1, 0)
    other.check()


def test_pages_ahead_of_one_do_not_stand_in_the_way_of_another():
    store, (one, other) = make_pools(8, one=5, other=3)
    slot = one.start(80)
    one.grow(slot, 16)
    while one.premap():
        pass
    assert len(one.held_pages) >= 5
    taken = other.start(48)
    other.grow(taken, 48)
    one.grow(slot, 80)
    one.check()
    assert not store.free


def test_a_pool_that_rests_leaves_its_share_and_has_it_again():
    _, (one, other) = make_pools(8, one=4, other=4)
    give_back(one)
    assert other.free_pages == 8
    slots = fill(other, 8)
    take_back(one)
    assert (one.free_pages, other.free_pages) == (0, -4)
    assert one.promises.owed and other.promises.owed is False
    told = []
    one.on_room = lambda: told.append(one.promises.owed)
    for slot in slots:
        other.finish(slot)
    assert told == [True] * 3 + [False] * 5 and one.free_pages == 4


def test_memory_is_given_back_when_all_rest():
    store, (one, other) = make_pools(8, one=4, other=4)
    calls: list[str] = []
    store.memory.discard = lambda: calls.append("discard")
    store.memory.reclaim = lambda: calls.append("reclaim")
    give_back(one)
    assert calls == []
    give_back(other)
    give_back(other)
    assert calls == ["discard"]
    take_back(one)
    take_back(other)
    assert calls == ["discard", "reclaim"]


def test_memory_that_cannot_be_given_back_leaves_the_pool_awake():
    store, (one,) = make_pools(8, one=4)

    def refuse() -> None:
        raise MemoryFault("memory_unavailable", "fallocate failed")

    store.memory.discard = refuse
    with pytest.raises(MemoryFault):
        give_back(one)
    assert one.promises.share == 4 and not one.promises.resting


def test_a_pool_that_ends_leaves_all_its_pages():
    store, (one, other) = make_pools(8, one=4, other=4)
    fill(one, 2)
    slot = one.start(16)
    one.grow(slot, 16)
    one.finish(slot, [b"text"])
    one.close()
    one.close()
    assert len(store.free) == 8 and other.free_pages == 8
    other.check()
    other.close()
    assert not vars(store.memory)["mapped"]


def test_check_notices_a_page_of_two():
    store, (one, other) = make_pools(8, one=4, other=4)
    fill(one, 1)
    store.free.append(next(iter(one.held_pages)))
    with pytest.raises(InvariantBroken):
        other.check()


class StoreMachine(RuleBasedStateMachine):
    """Two pools of unlike models, in any order of all that may happen. What one wrote is what it reads."""

    def __init__(self):
        super().__init__()
        self.memory = FakeMemory(PAGE)
        self.store = PageStore(self.memory, PAGES)
        sizes = ((KVSpec(1500), 6), (KVSpec(5000), 5))
        self.pools = [KvPool(PoolPlan(kv, PAGE, PAGES, span, 5), self.store) for kv, span in sizes]
        self.upset = False  # somebody woke up or claimed, and may be owed pages that others still have
        self.live: list[dict[int, tuple[int, int]]] = [{}, {}]  # slot -> text, tokens written
        self.chains = [{text: chain_of(text, 16 * 16) for text in range(3)} for _ in self.pools]

    def room(self, at: int, tokens: int, before: int = 0) -> bool:
        plan = self.pools[at].plan
        return plan.pages_for(tokens) - plan.pages_for(before) <= self.pools[at].free_pages

    @rule(at=st.integers(0, 1), text=st.integers(0, 2), more=st.integers(1, 90), limit=st.integers(0, 14))
    def start(self, at, text, more, limit):
        pool = self.pools[at]
        if pool.promises.resting or len(self.live[at]) == 5:
            return
        chain = self.chains[at][text][:limit]
        chain = chain[: pool.match(chain)]
        tokens = min(len(chain) * 16 + more, pool.plan.tokens_for(pool.plan.span_pages))
        if tokens <= len(chain) * 16 or not self.room(at, tokens):
            return
        slot = pool.start(tokens, chain)
        assert slot not in self.live[at]
        self.live[at][slot] = text, len(chain) * 16
        self.write(at, slot, tokens)

    @precondition(lambda self: any(self.live))
    @rule(data=st.data(), more=st.integers(1, 80))
    def grow(self, data, more):
        at, slot = self.draw(data)
        plan, before = self.pools[at].plan, self.live[at][slot][1]
        tokens = min(before + more, plan.tokens_for(plan.span_pages))
        if self.room(at, tokens, before):
            self.write(at, slot, tokens)

    @precondition(lambda self: any(self.live))
    @rule(data=st.data(), ends=st.booleans(), known=st.booleans())
    def offer_or_finish(self, data, ends, known):
        at, slot = self.draw(data)
        text, tokens = self.live[at][slot]
        chain = self.chains[at][text][: tokens // 16] if known else ()
        if ends:
            self.pools[at].finish(slot, chain)
            del self.live[at][slot]
        else:
            self.pools[at].offer(slot, chain)

    @rule(at=st.integers(0, 1))
    def premap(self, at):
        self.pools[at].premap()

    @rule(at=st.integers(0, 1))
    def sleep_or_wake(self, at):
        if self.pools[at].promises.resting:
            take_back(self.pools[at])
            self.upset = True
        elif not self.live[at]:
            self.store.unclaim(self.pools[at])
            give_back(self.pools[at])

    @rule(at=st.integers(0, 1), ends=st.booleans())
    def claim(self, at, ends):
        one, other = self.pools[at], self.pools[1 - at]
        if ends:
            self.store.unclaim(one)
        elif not one.promises.resting and self.store.claim(one):
            self.upset = True
            assert other.promises.shut_out and not one.promises.shut_out
            assert other.free_pages + other.promises.total <= other.promises.share, "more than its share"

    def draw(self, data) -> tuple[int, int]:
        return data.draw(st.sampled_from([(at, slot) for at in (0, 1) for slot in sorted(self.live[at])]))

    def write(self, at: int, slot: int, tokens: int) -> None:
        text, done = self.live[at][slot]
        self.pools[at].grow(slot, tokens)
        for position in range(done, tokens):
            self.memory.write(self.address(at, slot, position), text_of(text)[position] + 10_000 * at)
        self.live[at][slot] = text, tokens

    def address(self, at: int, slot: int, position: int) -> int:
        group, lane = divmod(position, 16)
        size = self.pools[at].plan.kv.group_bytes
        return self.pools[at].base(slot) + group * size + lane * size // 16

    @invariant()
    def holds(self):
        owed = [pool.promises.owed for pool in self.pools]
        self.upset = self.upset and any(owed)
        assert self.upset or not any(owed), "promises ate into what is kept"
        for at, pool in enumerate(self.pools):
            pool.check()
            promises = {slot: pool.promises.of(slot) for slot in range(5)}
            live = {slot: pool.plan.pages_for(tokens) for slot, (_, tokens) in self.live[at].items()}
            assert promises == dict.fromkeys(range(5), 0) | live and pool.promises.total == sum(live.values())
            assert self.upset or pool.free_pages + pool.promises.total >= pool.promises.kept, "not kept its room"
            for slot, (text, tokens) in self.live[at].items():
                read = [self.memory.read(self.address(at, slot, position)) - 10_000 * at for position in range(tokens)]
                assert read == text_of(text)[:tokens]

    def teardown(self):
        for at, pool in enumerate(self.pools):
            for slot in list(self.live[at]):
                pool.finish(slot)
            pool.check()
        for pool in self.pools:
            pool.close()
        assert not self.memory.mapped


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None, derandomize=True)
TestStoreMachine = StoreMachine.TestCase


def two_rigs(pages: int, **options) -> tuple[Rig, Rig]:
    """Engines of unlike models on one store."""
    store = PageStore(FakeMemory(PAGE), pages)
    common = {"pages": pages, "store": store, "admit_below": 1.0, **options}
    return Rig(group_bytes=1000, max_len=200, **common), Rig(group_bytes=3000, max_len=120, vocab=60, **common)


def together(rigs, turns: int = 20_000) -> None:
    """Turns in alternation, until nobody has anything to do."""
    for _ in range(turns):
        if not any(rig.busy for rig in rigs):
            return
        for rig in rigs:
            rig.turn()
    raise AssertionError(f"still busy: {[rig.engine.why for rig in rigs]}")


@BOTH_LOOPS
@pytest.mark.parametrize("seed", range(4))
def test_two_engines_in_tight_memory_answer_as_alone(seed, overlap):
    rigs, rng = two_rigs(14, async_scheduling=overlap), random.Random(seed)
    asked: list[tuple[Rig, Request]] = []
    for n in range(60):
        rig = rigs[rng.random() < 0.5]
        prompt = tuple(text_of(n % 3)[: rng.randint(1, 80)])
        each = request(f"r{n}", tuple(token % 40 for token in prompt), rng.randint(1, 38), ignore_eos=True)
        rig.engine.submit(each)
        asked.append((rig, each))
        for one in rigs:
            for _ in range(rng.randint(0, 4)):
                one.turn()
                one.engine.pool.premap()
    together(rigs)
    for rig, each in asked:
        assert_as_alone(rig, each)
    assert all(rig.engine.stats().preemptions for rig in rigs), "memory was not tight"
    for rig in rigs:
        rig.assert_baseline()


@BOTH_LOOPS
def test_who_woke_up_waits_until_others_end_or_give_way(overlap):
    rigs = sleeper, other = two_rigs(14, async_scheduling=overlap)
    ordered = sleeper.engine.sleep("light", lambda: None)
    sleeper.turn()
    assert ordered.result(0) and other.engine.pool.free_pages == 14
    taken = [request(f"long{n}", tuple([n + 1] * 60), 58, ignore_eos=True) for n in range(4)]
    for each in taken:
        other.engine.submit(each)
    for _ in range(40):
        other.turn()
    assert other.engine.pool.promises.total > 14 - 4
    woken = sleeper.engine.wake(lambda: None)
    sleeper.turn()
    assert woken.result(0)
    late = request("late", tuple([3] * 150), 40, ignore_eos=True)
    sleeper.engine.submit(late)
    sleeper.turn()
    assert sleeper.engine._starved and not sleeper.busy and sleeper.engine.stats().waiting == 1
    together(rigs)
    assert_as_alone(sleeper, late)
    for each in taken:
        assert_as_alone(other, each)


def test_a_pause_of_one_leaves_the_other_alone():
    held, other = two_rigs(14)
    held.engine.submit(request("held", 60, 30, ignore_eos=True))
    for _ in range(5):
        held.turn()
    held.engine.pause("keep")
    for _ in range(5):
        held.turn()
    assert held.engine.pool.promises.total == 0
    asked = [request(f"r{n}", tuple([n + 1] * 50), 20, ignore_eos=True) for n in range(6)]
    for each in asked:
        other.engine.submit(each)
    other.finish()
    held.engine.resume()
    held.finish()
    for each in asked:
        assert_as_alone(other, each)
    assert held.end("held").finish_reason == "length"


@pytest.mark.parametrize("premap", [False, True])
def test_with_threads_it_is_the_same(premap):
    """Two engine threads, and two that map ahead, on pages far too few."""
    rigs = two_rigs(14, premap=premap)
    rng, done, left = random.Random(7), threading.Event(), [160]
    lock = threading.Lock()

    def count(rig: Rig):
        def sink(outputs) -> None:
            rig.outputs.extend(outputs)
            with lock:
                left[0] -= sum(output.finish_reason is not None for output in outputs)
                if not left[0]:
                    done.set()

        return sink

    asked = []
    for rig in rigs:
        rig.engine._sink = count(rig)
        rig.engine.start()
    for n in range(160):
        rig = rigs[n % 2]
        prompt = tuple(token % 40 for token in text_of(n % 3)[: rng.randint(1, 80)])
        asked.append((rig, request(f"r{n}", prompt, rng.randint(1, 38), ignore_eos=True)))
        rig.engine.submit(asked[-1][1])
    assert done.wait(300)
    for rig in rigs:
        rig.engine.stop()
    for rig, each in asked:
        assert_as_alone(rig, each)
