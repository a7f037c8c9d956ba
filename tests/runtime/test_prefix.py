"""The prefix cache: what a sequence starts on, what is shared and copied, and what goes when memory is short."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.runtime.fakes import BOTH_LOOPS, FakeMemory, Rig, assert_as_alone, request
from xllm.runtime import KVSpec
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PageState, PoolPlan
from xllm.runtime.prefix import extend_chain
from xllm.runtime.store import PageStore

PAGE = 4096
TEXT = tuple(range(1, 40)) * 6
GROUP_BYTES = pytest.mark.parametrize("group_bytes", [300, 1500, 4096, 10_000])


def ask(rig: Rig, name: str, prompt: tuple[int, ...], tokens: int = 5, salt: str = "") -> int:
    """Run one request alone, as it must; returns its cached tokens."""
    asked = request(name, prompt, tokens, ignore_eos=True)
    rig.engine.submit(replace(asked, cache_salt=salt))
    rig.finish()
    assert_as_alone(rig, asked)
    rig.assert_baseline()
    return rig.end(name).cached_tokens


@BOTH_LOOPS
@GROUP_BYTES
def test_a_prompt_starts_on_what_earlier_ones_computed(group_bytes, overlap):
    rig = Rig(group_bytes=group_bytes, pages=200, async_scheduling=overlap)
    assert ask(rig, "first", TEXT[:100]) == 0
    assert ask(rig, "same", TEXT[:100]) == 96
    assert ask(rig, "whole groups", TEXT[:96]) == 80, "the last token is computed, or there would be nothing to sample"
    assert ask(rig, "longer", TEXT[:200]) == 96
    assert ask(rig, "longer again", TEXT[:200]) == 192
    assert ask(rig, "other end", (*TEXT[:70], *TEXT[:30])) == 64
    assert ask(rig, "other start", (40, *TEXT[:100])) == 0
    generated = tuple(rig.tokens("first"))
    assert ask(rig, "next turn", (*TEXT[:100], *generated, *TEXT[:20])) >= 96
    stats = rig.engine.stats()
    assert stats.looked_up_tokens == sum(out.prompt_tokens for out in rig.outputs if out.finish_reason)
    assert stats.cached_tokens == sum(out.cached_tokens for out in rig.outputs if out.finish_reason)


def test_what_was_generated_is_cached_too():
    rig = Rig(pages=200)
    ask(rig, "first", TEXT[:20], tokens=60)
    assert ask(rig, "second", (*TEXT[:20], *rig.tokens("first"), 1)) >= 64


def test_tenants_share_nothing():
    rig = Rig(pages=200)
    cached = [ask(rig, f"{salt}{n}", TEXT[:100], salt=salt) for n in range(2) for salt in ("", "a", "b")]
    assert cached == [0] * 3 + [96] * 3


def test_switched_off_nothing_is_kept():
    rig = Rig(pages=200, prefix_cache=False)
    assert ask(rig, "a", TEXT[:100]) == ask(rig, "b", TEXT[:100]) == 0
    assert rig.engine.stats().cached_pages == 0


@BOTH_LOOPS
@GROUP_BYTES
def test_requests_together_compute_what_they_share_once(group_bytes, overlap):
    rig = Rig(group_bytes=group_bytes, pages=400, max_len=400, async_scheduling=overlap)
    asked = [request(f"r{n}", (*TEXT[:200], n, *TEXT[:n]), 30, ignore_eos=True) for n in range(6)]
    for each in asked:
        rig.engine.submit(each)
    rig.finish()
    for each in asked:
        assert_as_alone(rig, each)
    assert [rig.end(each.id).cached_tokens for each in asked] == [0] + [192] * 5
    rig.assert_baseline()


def test_the_oldest_unused_pages_go_first_and_only_when_needed():
    rig = Rig(group_bytes=4096, pages=20, admit_below=1.0)
    ask(rig, "a", TEXT[:80])
    ask(rig, "b", (40, *TEXT[:80]))
    ask(rig, "a again", TEXT[:80])
    assert rig.engine.stats().evictions == 0
    ask(rig, "large", (41, *TEXT[:190]))
    assert rig.engine.stats().evictions > 0
    assert ask(rig, "a last", TEXT[:80]) >= 64, "used last, so kept"
    assert ask(rig, "b last", (40, *TEXT[:80])) < 64, "and this one went from its end"


def test_a_failed_step_leaves_nothing_in_the_cache():
    rig = Rig(pages=200)
    rig.executor.fail_steps = {1, 2, 3}
    rig.engine.submit(request("a", TEXT[:100], 5))
    rig.finish()
    assert rig.end("a").finish_reason == "error"
    rig.executor.fail_steps = set()
    assert ask(rig, "b", TEXT[:100]) <= 64, "the first step went well"


@BOTH_LOOPS
@pytest.mark.parametrize("seed", range(8))
def test_few_texts_in_tight_memory(seed, overlap):
    """Shared starts, preemption and eviction all the time, cancels and failed steps between."""
    rng = random.Random(seed)
    rig = Rig(
        max_tokens_per_step=rng.choice([24, 64]), max_chunk=rng.choice([5, 16, 64]), max_len=128, vocab=500,
        pages=rng.choice([12, 18, 30]), group_bytes=rng.choice([1500, 4096, 6000]), async_scheduling=overlap,
        admit_below=1.0,
    )  # fmt: skip
    rig.executor.fail_steps = {rng.randint(5, 60)} if seed % 2 else set()
    asked = []
    for n in range(30):
        text = TEXT[rng.choice([0, 0, 0, 1]) :]
        prompt = (*text[: rng.randint(1, 80)], *([n] * rng.randint(0, 3)))
        tokens = min(rng.randint(1, 40), rig.engine.pool.plan.tokens_for(rig.pages) - len(prompt))
        if tokens < 1:
            continue
        asked.append(request(f"r{n}", prompt, tokens, ignore_eos=True))
        rig.engine.submit(asked[-1])
        for _ in range(rng.randint(0, 6)):
            rig.turn()
            rig.engine.pool.premap()
        if n % 7 == 3:
            rig.engine.cancel(asked[rng.randrange(len(asked))].id)
    rig.finish()
    ended = [rig.end(each.id).finish_reason for each in asked]
    for each, reason in zip(asked, ended, strict=True):
        if reason == "length":
            assert_as_alone(rig, each)
    assert ended.count("length") > 10
    stats = rig.engine.stats()
    assert stats.cached_tokens > 0 and stats.evictions > 0
    rig.assert_baseline()


class CacheMachine(RuleBasedStateMachine):
    """Spans whose texts come from few, in any order of start, grow, offer and finish: no page is lost, read without
    being what it says, or writable by two (FakeMemory sees to that)."""

    kv = KVSpec(1500)

    def __init__(self):
        super().__init__()
        self.memory = FakeMemory(PAGE)
        plan = PoolPlan(self.kv, PAGE, pages=14, span_pages=6, spans=5)
        self.pool = KvPool(plan, PageStore(self.memory, 14))
        self.live: dict[int, tuple[int, int]] = {}  # slot -> text, tokens written
        self.chains = {text: chain_of(text, self.pool.plan.tokens_for(6)) for text in range(3)}

    def pages_for(self, tokens: int) -> int:
        return self.pool.plan.pages_for(tokens)

    @precondition(lambda self: len(self.live) < 5)
    @rule(text=st.integers(0, 2), more=st.integers(1, 90), limit=st.integers(0, 14))
    def start(self, text, more, limit):
        chain = self.chains[text][:limit]
        chain = chain[: self.pool.match(chain)]
        tokens = min(len(chain) * 16 + more, self.pool.plan.tokens_for(6))
        if tokens <= len(chain) * 16 or self.pages_for(tokens) > self.pool.free_pages:
            return
        slot = self.pool.start(tokens, chain)
        self.pool.check()
        assert slot not in self.live
        self.live[slot] = text, len(chain) * 16
        self.write(slot, tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 80))
    def grow(self, data, more):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        tokens = min(self.live[slot][1] + more, self.pool.plan.tokens_for(6))
        if self.pages_for(tokens) - self.pages_for(self.live[slot][1]) <= self.pool.free_pages:
            self.write(slot, tokens)

    def write(self, slot: int, tokens: int) -> None:
        text, done = self.live[slot]
        self.pool.grow(slot, tokens)
        for position in range(done, tokens):
            self.memory.write(self.address(slot, position), text_of(text)[position])
        self.live[slot] = text, tokens

    def address(self, slot: int, position: int) -> int:
        group, lane = divmod(position, 16)
        return self.pool.base(slot) + group * self.kv.group_bytes + lane * self.kv.group_bytes // 16

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ends=st.booleans(), known=st.booleans())
    def offer_or_finish(self, data, ends, known):
        slot = data.draw(st.sampled_from(sorted(self.live)))
        text, tokens = self.live[slot]
        chain = self.chains[text][: tokens // 16] if known else ()
        if ends:
            self.pool.finish(slot, chain)
            del self.live[slot]
        else:
            self.pool.offer(slot, chain)

    @rule()
    def premap(self):
        self.pool.premap()

    @invariant()
    def holds(self):
        self.pool.check()
        assert sum(self.pool.figures().states.values()) == 14
        assert self.pool.free_pages == 14 - sum(self.pages_for(tokens) for _, tokens in self.live.values())
        for slot, (text, tokens) in self.live.items():
            read = [self.memory.read(self.address(slot, position)) for position in range(tokens)]
            assert read == text_of(text)[:tokens]

    def teardown(self):
        for slot in list(self.live):
            self.pool.finish(slot)
        self.pool.check()
        states = self.pool.figures().states
        assert states[PageState.MAPPED] == states[PageState.ALLOCATED] == 0


class WideCacheMachine(CacheMachine):
    """Where a group is larger than a page."""

    kv = KVSpec(5000)


def text_of(text: int) -> list[int]:
    """Three texts that part after 40 and after 100 tokens."""
    return [position if position < (40, 100, 1000)[text] else 1000 * (text + 1) + position for position in range(400)]


def chain_of(text: int, tokens: int) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, text_of(text)[:tokens], 16, "")
    return chain


SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)
CacheMachine.TestCase.settings = SETTINGS
WideCacheMachine.TestCase.settings = SETTINGS
TestCacheMachine = CacheMachine.TestCase
TestWideCacheMachine = WideCacheMachine.TestCase
