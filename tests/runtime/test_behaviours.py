"""The prefix cache by numbers: behaviours 1 to 5 of the acceptance list, with blocks of 4 tokens, one to a page."""

from __future__ import annotations

import pytest

from tests.runtime.fakes import FakeMemory, Rig, assert_as_alone, request
from xllm.runtime import KVSpec, MemoryFault
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import PageState, PoolPlan
from xllm.runtime.prefix import extend_chain
from xllm.runtime.store import PageStore

PAGE, BLOCK = 4096, 4
TEXT = [*range(1, 10)]


def pool_of(pages: int) -> KvPool:
    plan = PoolPlan(KVSpec(PAGE, group_tokens=BLOCK), PAGE, pages, span_pages=8, spans=4)
    return KvPool(plan, PageStore(FakeMemory(PAGE), pages))


def chain_of(tokens: list[int], salt: str = "") -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, tokens, BLOCK, salt)
    return chain


def compute(pool: KvPool, tokens: list[int]) -> None:
    """A sequence of this text, alone."""
    chain = chain_of(tokens)
    slot = pool.start(len(tokens), chain)
    pool.grow(slot, len(tokens))
    pool.finish(slot, chain)
    pool.check()


def cached(pool: KvPool) -> int:
    return pool.figures().states[PageState.CACHED]


def test_behaviour_1_a_match_is_of_whole_blocks_from_the_start() -> None:
    pool = pool_of(8)
    compute(pool, TEXT)
    assert pool.match(chain_of(TEXT)) == 2
    assert pool.match(chain_of(TEXT[4:])) == 0
    slot = pool.start(28)
    pool.grow(slot, 28)  # 7 of the 8 pages
    assert pool.figures().evictions == 1
    assert pool.match(chain_of(TEXT)) == pool.match(chain_of(TEXT[:5])) == 1


def test_behaviour_2_unrelated_texts_have_their_own_blocks() -> None:
    pool, other = pool_of(8), [token + 20 for token in TEXT]
    compute(pool, TEXT)
    compute(pool, other)
    assert cached(pool) == 4
    assert pool.match(chain_of(TEXT)) == pool.match(chain_of(other)) == 2


def test_behaviour_3_digests_are_the_same_however_they_come() -> None:
    text = [*range(1, 30)]
    at_once, growing = chain_of(text), list[bytes]()
    for end in range(len(text) + 1):
        extend_chain(growing, text[:end], BLOCK, "")
    assert growing == at_once and len(at_once) == 7
    other = chain_of([0, *text[1:]])
    assert not set(other) & set(at_once)
    assert not set(chain_of(text, "a tenant")) & set(at_once)


@pytest.mark.parametrize(("prefix_cache", "shared", "pages"), [(True, 8, 4 + 2), (False, 0, 6 + 2)])
def test_behaviour_4_prompts_that_come_together_share_blocks(prefix_cache: bool, shared: int, pages: int) -> None:
    """Each has one page more, of what it generates."""
    rig = Rig(group_bytes=PAGE, group_tokens=BLOCK, pages=16, prefix_cache=prefix_cache)
    asked = [
        request(name, (*range(1, 9), *last), 4, ignore_eos=True) for name, last in (("a", TEXT[:4]), ("b", TEXT[5:]))
    ]
    for each in asked:
        rig.engine.submit(each)
    most = 0
    while sum(out.finish_reason is not None for out in rig.outputs) < 2:
        rig.turn()
        most = max(most, rig.engine.pool.figures().states[PageState.MAPPED])
    for each in asked:
        assert_as_alone(rig, each)
    assert sorted(rig.end(each.id).cached_tokens for each in asked) == [0, shared]
    assert most == pages
    rig.finish()
    rig.assert_baseline()


def test_behaviour_5_a_failed_allocation_gives_shared_pages_back() -> None:
    pool = pool_of(8)
    compute(pool, TEXT)
    assert cached(pool) == 2
    taken = pool.start(20)
    pool.grow(taken, 20)  # 5 pages: with those of the text 7 of 8
    chain = chain_of(TEXT)
    slot = pool.start(24, chain)
    assert cached(pool) == 0, "in use"
    with pytest.raises(MemoryFault):
        pool.grow(slot, 24)
    pool.finish(slot, chain[:2])
    pool.check()
    assert cached(pool) == 2 and pool.match(chain) == 2
