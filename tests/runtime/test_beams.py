"""Beam search over a model that is a table: what is followed is what a full sort follows, and wide beams find the best
text there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, request, search
from tests.runtime.test_scheduler import budget, decoding, given_tokens, waiting
from xllm.runtime import Request, RequestRefused, SamplingParams
from xllm.runtime.beams import BeamParams, BeamSearch, Found, likeliest
from xllm.runtime.config import TierConfig
from xllm.runtime.groups import BeamGroup
from xllm.runtime.policies import PRESETS, choose
from xllm.runtime.policies.orders import ORDERS, rank
from xllm.runtime.policies.trace import Trace, recorded, summary
from xllm.runtime.scheduler import TokenCost, decide
from xllm.runtime.urgency import Urgency

STEPS = [-0.25 * step for step in range(12)]  # sums of these are exact: ties are ties


@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.lists(st.sampled_from(STEPS), max_size=8)), min_size=1, max_size=6),
    st.integers(1, 20),
)
@settings(derandomize=True, database=None)
def test_the_likeliest_are_those_of_a_full_sort(beams, count):
    totals = [total for total, _ in beams]
    best = [[(rank, logprob) for rank, logprob in enumerate(sorted(row, reverse=True))] for _, row in beams]
    every = [
        (total + logprob, at, rank)
        for at, (total, row) in enumerate(zip(totals, best, strict=True))
        for rank, logprob in row
    ]
    assert likeliest(totals, best, count) == sorted(every, key=lambda item: (-item[0], *item[1:]))[:count]


def table(seed: int, vocab: int) -> np.ndarray:
    """Logprobs of each token after each."""
    rows = np.random.default_rng(seed).standard_normal((vocab, vocab)) * 1.5
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def following(model: np.ndarray, made: BeamSearch) -> list[tuple[tuple[int, float], ...]]:
    rows = [model[(1, *beam.tokens)[-1]] for beam in made.live]
    orders = [np.argsort(-row, kind="stable")[: made.wanted] for row in rows]
    return [tuple((int(i), float(row[i])) for i in order) for row, order in zip(rows, orders, strict=True)]


def found_by(model: np.ndarray, beams: BeamParams, max_tokens: int, eos: Sequence[int] = ()) -> tuple[list[Found], int]:
    """What is found, and in how many steps."""
    made = BeamSearch(SamplingParams(), beams, eos, max_tokens)
    for steps in itertools.count():
        if not made.live:
            return made.results(), steps
        made.advance(following(model, made))
    raise AssertionError


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(4))
def test_beams_that_leave_nothing_out_find_the_best_texts(seed, penalty):
    vocab, length, eos = 4, 4, 0
    model = table(seed, vocab)
    found, _ = found_by(model, BeamParams(64, 5, penalty, "never"), length, (eos,))
    every = []
    for size in range(1, length + 1):
        for text in itertools.product(range(vocab), repeat=size):
            if eos in text[:-1] or (text[-1] != eos and size < length):
                continue
            total = sum(float(model[a][b]) for a, b in itertools.pairwise((1, *text)))
            every.append((total / size**penalty, text))
    scores = {text: score for score, text in every}
    assert len({result.beam.tokens for result in found}) == 5
    assert [result.score for result in found] == pytest.approx(sorted(scores.values(), reverse=True)[:5])
    assert all(result.score == pytest.approx(scores[result.beam.tokens]) for result in found)
    assert all((result.finish_reason == "stop") == (result.beam.tokens[-1] == eos) for result in found)


def test_a_step_of_one_beam_is_greedy_and_early_stopping_ends_sooner():
    model = table(3, 30)
    [greedy], _ = found_by(model, BeamParams(1), 6)
    expected, at = [], 1
    for _ in range(6):
        at = int(model[at].argmax())
        expected.append(at)
    assert list(greedy.beam.tokens) == expected and greedy.finish_reason == "length"
    ways = (True, False, "never")
    steps = [found_by(model, BeamParams(3, early_stopping=way), 40, range(5))[1] for way in ways]
    assert steps == sorted(steps) and steps[0] < 40


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"width": 0}, "beam_width"),
        ({"width": 129}, "beam_width"),
        ({"width": 2, "returned": 3}, "num_return_sequences"),
        ({"width": 2, "length_penalty": math.nan}, "length_penalty"),
        ({"width": 2, "early_stopping": "often"}, "early_stopping"),
    ],
)
def test_what_no_search_can_have_is_refused_by_name(fields, name):
    with pytest.raises(RequestRefused, match=name):
        BeamParams(**fields)


@BOTH_LOOPS
def test_behaviour_9_a_group_is_not_split_by_a_steps_budget(overlap):
    """Two beams, a budget of two tokens, another request that runs: the group waits for a step of its own."""
    rig = Rig(async_scheduling=overlap, max_tokens_per_step=2, max_chunk=2)
    rig.engine.submit(request("other", (3,), 12, ignore_eos=True))
    rig.engine.submit(search("beams", (4,), 5, 2, ignore_eos=True))
    rig.finish()
    sizes = [len(batch.rows) for batch in rig.executor.batches]
    assert sizes.count(2) == 5, "the prompts, then four steps of both beams"
    last = max(
        at for at, batch in enumerate(rig.executor.batches) if batch.rows[0].tokens == (3,) or len(batch.rows) == 1
    )
    assert all(size == 2 for size in sizes[last + 1 :]), "the other had its tokens first"
    assert_as_alone(rig, request("other", (3,), 12, ignore_eos=True))
    assert_as_alone(rig, search("beams", (4,), 5, 2, ignore_eos=True))
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_prompt_is_computed_once_and_beams_share_its_pages(overlap):
    """100 tokens fill six groups and a part of the seventh; a page has four groups. Without the prefix cache."""
    rig = Rig(async_scheduling=overlap, prefix_cache=False, group_bytes=1024)
    asked = search("a", 100, 6, 4, ignore_eos=True)
    rig.engine.submit(asked)
    rig.finish()
    assert_as_alone(rig, asked)
    tokens = [sum(len(row.tokens) for row in batch.rows) for batch in rig.executor.batches]
    assert sum(tokens[:-5]) == 100 and tokens[-5:] == [4] * 5
    stats = rig.engine.stats()
    assert stats.prompt_tokens == 100 and stats.generated_tokens == 1 + 5 * 4
    assert stats.critical_maps == 1 + 4, "a page that all have, and one for each"


def test_a_group_takes_no_more_pages_than_it_is_promised():
    """Room for just the group: the prompt's page once, and one for each of four beams."""
    rig = Rig(pages=5, group_bytes=1024, max_len=160)
    asked = search("a", 64, 60, 4, ignore_eos=True)
    rig.engine.submit(asked)
    rig.finish()
    assert_as_alone(rig, asked)
    for beams, tokens in ((5, 60), (4, 66)):
        with pytest.raises(RequestRefused, match="exceeds_capacity"):
            rig.engine.submit(search("b", 64, tokens, beams, ignore_eos=True))
    with pytest.raises(RequestRefused, match="beam_width is 9, a step holds 8 sequences"):
        rig.engine.submit(search("b", 6, 6, 9))
    with pytest.raises(RequestRefused, match="prompt_logprobs"):
        rig.engine.submit(search("b", 6, 6, 2, prompt_logprobs=1))
    rig.assert_baseline()


def test_others_do_not_wait_for_a_merge():
    """A group's next step needs its last one, others' do not: they are in every step, it is in every second one."""
    rig = Rig(max_seqs=8)
    rig.engine.submit(request("other", 5, 30, ignore_eos=True))
    rig.engine.submit(search("beams", 5, 10, 4, ignore_eos=True))
    rig.finish()
    sizes = [len(batch.rows) for batch in rig.executor.batches]
    assert len(sizes) == 30 and sizes[2:20:2] == [5] * 9 and set(sizes[1:20:2]) == {1}


def test_a_prompt_before_a_group_leaves_tokens_for_each_of_its_rows():
    """In one list the prompt comes first, and time and tokens are kept for those that decode."""
    group, prompt = decoding(0), waiting(1, 80)
    group.rows = group.width = 4
    object.__setattr__(prompt.request, "urgency", Urgency(ttft_slo_ms=1))
    limits, policy = budget(40), choose("mix")
    queues = rank([group], [prompt], 8, policy.order, limits, TokenCost(1e-9), 0.0)
    assert [one.id for one in queues.line] == ["w1", "r0"]
    assert given_tokens(decide(queues, limits, 1000, 0.0, policy, TokenCost(1e-9))) == {"w1": 36, "r0": 1}


@BOTH_LOOPS
@pytest.mark.parametrize("way", ["preempt", "cancel", "pause", "sleep", "fail", "numeric", "attach"])
def test_whatever_comes_in_the_middle_of_a_search(overlap, way):
    """After every number of turns: it ends as alone, or with the error, and holds nothing."""
    asked = search("a", 37, 12, 4, ignore_eos=True, presence_penalty=0.5 if way == "attach" else 0.0)
    for turns in range(16):
        rig = Rig(async_scheduling=overlap, pages=40)
        rig.engine.submit(asked)
        for _ in range(turns):
            rig.turn()
        core = rig.engine._core
        if way == "preempt":
            core.preempt_all()
        elif way == "cancel":
            rig.engine.cancel("a")
        elif way == "pause":
            paused = rig.engine.pause("keep")
            rig.finish()
            assert paused.done() and rig.engine.pool.free_pages == rig.engine.pool.plan.pages
            rig.engine.resume()
        elif way == "sleep":
            slept = rig.engine.sleep("light", lambda: None, "wait")
            rig.finish()
            assert slept.result(0)
            rig.engine.wake(lambda: None)
        elif way == "fail":
            rig.executor.fail_steps = {turns}
        elif way == "numeric":
            rig.executor.numeric_errors = {("a", max(0, turns - 4))}
        elif turns > 4:
            rig.executor.refuse_attach = {"a"}
        rig.finish()
        end = rig.end("a")
        if way in ("preempt", "pause", "sleep") or (way == "attach" and turns <= 4):
            assert_as_alone(rig, asked)
        elif end.finish_reason not in ("length", "stop"):
            assert end.finish_reason == ("cancelled" if way == "cancel" else "error") and not end.found
        rig.assert_baseline()
        again = search("again", 37, 12, 4, ignore_eos=True)
        rig.executor.fail_steps, rig.executor.refuse_attach = set(), set()
        rig.engine.submit(again)
        rig.finish()
        assert_as_alone(rig, again)


@BOTH_LOOPS
def test_one_that_comes_back_computes_what_its_beams_have_in_common_once(overlap):
    rig = Rig(async_scheduling=overlap, prefix_cache=False)
    asked = search("a", 40, 30, 4, ignore_eos=True)
    rig.engine.submit(asked)
    for _ in range(20):
        rig.turn()
    before = rig.engine.stats().tokens
    rig.engine._core.preempt_all()
    first = len(rig.executor.batches)
    while not any(len(batch.rows) > 1 for batch in rig.executor.batches[first:]):
        rig.turn()
    spent = rig.engine.stats().tokens - before
    group = rig.engine._core.running[0]
    assert isinstance(group, BeamGroup)
    rest = len(group.search.live[0].tokens) - len(group.search.common)
    assert spent <= 40 + len(group.search.common) + 4 * (rest + 1)
    rig.finish()
    assert_as_alone(rig, asked)
    rig.assert_baseline()


@given(
    st.randoms(use_true_random=False), st.sampled_from(sorted(PRESETS)), st.sampled_from(sorted(ORDERS)), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_groups_beside_others_end_with_their_text_under_any_policy(source, preset, order, overlap):
    """Some are aged, some urgent, some offline, some cancelled; beginnings are common, slots and tokens are few."""
    trace = Trace()
    policy = {"scheduler": preset, "order": order, "aged_seconds": source.choice((5.0, 30.0)), "trace": trace}
    limits = {"max_seqs": source.choice((2, 4, 8)), "max_tokens_per_step": source.choice((8, 16, 64)), "max_chunk": 8}
    sizes = {"pages": source.choice((20, 64)), "group_bytes": source.choice((1000, 4096, 5000))}
    rig = Rig(async_scheduling=overlap, policy=policy, prefix_cache=source.random() < 0.7, **sizes, **limits)
    asked: list[Request] = []
    lost: set[str] = set()
    for at in range(30):
        rig.turn()
        if lost and source.random() < 0.2:
            rig.engine.cancel(source.choice(sorted(lost)))
        if source.random() < 0.5:
            urgency = Urgency(source.choice(("HIGH", "LOW")), offline=source.random() < 0.3)
            prompt = (*range(1, source.choice((5, 17, 33))), source.randrange(40))
            arrival = max(1.0, rig.now - source.choice((0, 20, 400)))
            params = SamplingParams(max_tokens=source.randint(1, 8), ignore_eos=source.random() < 0.5)
            width = source.choice((0, 0, 1, 2, 4))
            beams = BeamParams(min(width, rig.max_seqs)) if width else None
            one = Request(f"{at}", prompt, params, urgency=urgency, arrival=arrival, beams=beams)
            try:
                rig.engine.submit(one)
            except RequestRefused as refusal:
                assert refusal.code == "exceeds_capacity" and width
                continue
            asked.append(one)
            if source.random() < 0.2:
                lost.add(one.id)
    rig.finish(5000)
    for one in asked:
        if one.id not in lost or rig.end(one.id).finish_reason != "cancelled":
            assert_as_alone(rig, one)
    rig.assert_baseline()
    chosen = choose(preset, order)
    for queues, limit, free, now, cost, decided in recorded(trace.lines):
        assert summary(decide(queues, limit, free, now, chosen, cost)) == decided


@pytest.mark.parametrize("fixed_bytes", [0, 5000])
@BOTH_LOOPS
def test_searches_among_a_crowd_in_real_memory(overlap, fixed_bytes):
    """Spans and pages as they are, mapped ahead by a thread, with preemptions."""
    pages = 20 if fixed_bytes else 12
    rig = Rig(async_scheduling=overlap, pages=pages, real_memory=True, premap=True, fixed_bytes=fixed_bytes)
    rig.engine.pool.start_premapping()
    asked = [search(f"s{at}", 20 + 7 * at, 24, 2 + at % 3, ignore_eos=True) for at in range(5)]
    asked += [request(f"r{at}", 15 + 9 * at, 90, ignore_eos=True) for at in range(8)]
    for one in asked[::2] + asked[1::2]:
        rig.engine.submit(one)
    rig.finish()
    for one in asked:
        assert_as_alone(rig, one)
    assert rig.engine.stats().preemptions > 0
    rig.assert_baseline()
    rig.engine.pool.close()


@BOTH_LOOPS
def test_searches_come_back_from_a_tier(overlap):
    config = TierConfig(host_bytes=1 << 20, identity="x")
    rig = Rig(async_scheduling=overlap, pages=20, real_memory=True, tiers=config, group_bytes=1024)
    asked = [search(f"s{at}", 64 + 16 * at, 20, 4, ignore_eos=True) for at in range(3)]
    for turn in range(60):
        if turn % 12 == 0 and asked[turn // 12 :][:1]:
            rig.engine.submit(asked[turn // 12])
        if turn % 9 == 8:
            rig.engine._core.preempt_all()
        rig.turn()
        assert rig.engine._tiers is not None
        while rig.engine._tiers.work():
            pass
    rig.finish()
    for one in asked:
        assert_as_alone(rig, one)
    rig.assert_baseline()
    rig.engine.stop()
