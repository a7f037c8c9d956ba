"""Beam search over a model that is a table: what is followed is what a full sort follows, and wide beams find the best
text there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, request
from xllm.runtime import Request, RequestRefused, SamplingParams, TokenOutput
from xllm.runtime.beams import BeamParams, BeamSearch, likeliest
from xllm.runtime.policies import PRESETS
from xllm.runtime.policies.orders import ORDERS
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


def answer(given: Request, model: np.ndarray) -> TokenOutput:
    row = model[[*given.prompt, *given.generated][-1]]
    order = np.argsort(-row, kind="stable")[: given.params.logprobs]
    top = tuple((int(token), float(row[token])) for token in order)
    return TokenOutput(given.id, top[0][0], len(given.generated), top[0][1], top, "length")


def search(model: np.ndarray, beams: BeamParams, max_tokens: int, eos: tuple[int, ...] = ()) -> BeamSearch:
    made = BeamSearch(Request("a", (1,), SamplingParams(max_tokens=max_tokens)), beams, eos)
    while made.live:
        made.advance([answer(asked, model) for asked in made.requests()])
    return made


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(4))
def test_beams_that_leave_nothing_out_find_the_best_texts(seed, penalty):
    vocab, length, eos = 4, 4, 0
    model = table(seed, vocab)
    found = search(model, BeamParams(64, 5, penalty, "never"), length, (eos,)).results()
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
    [greedy] = search(model, BeamParams(1), 6).results()
    expected, at = [], 1
    for _ in range(6):
        at = int(model[at].argmax())
        expected.append(at)
    assert list(greedy.beam.tokens) == expected and greedy.finish_reason == "length"
    steps = {}
    for stopping in (True, False, "never"):
        made = BeamSearch(
            Request("a", (1,), SamplingParams(max_tokens=40)), BeamParams(3, early_stopping=stopping), range(5)
        )
        steps[stopping] = 0
        while made.live:
            steps[stopping] += 1
            made.advance([answer(asked, model) for asked in made.requests()])
    assert steps[True] <= steps[False] <= steps["never"] and steps[True] < 40


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
def test_a_request_goes_on_behind_what_it_has(overlap):
    """As a beam does: the rest is what it would have generated itself, whatever is cached and preempted."""
    rig = Rig(async_scheduling=overlap, pages=12)
    whole = request("whole", 30, 20, ignore_eos=True)
    rig.engine.submit(whole)
    rig.finish()
    assert_as_alone(rig, whole)
    tokens = tuple(rig.tokens("whole"))
    for cut in (1, 7, 19):
        rest = Request(f"rest-{cut}", whole.prompt, whole.params, generated=tokens[:cut])
        rig.engine.submit(rest)
    for other in range(4):
        rig.engine.submit(request(f"other-{other}", 40, 30, ignore_eos=True))
    rig.finish()
    for cut in (1, 7, 19):
        assert tuple(rig.tokens(f"rest-{cut}")) == tokens[cut:]
        assert rig.end(f"rest-{cut}").index == 19
    with pytest.raises(RequestRefused, match="20 tokens are generated already"):
        rig.engine.submit(Request("full", whole.prompt, whole.params, generated=tokens))
    rig.assert_baseline()


@BOTH_LOOPS
def test_behaviour_9_a_group_is_not_split_by_a_steps_budget(overlap):
    """Two beams, a budget of two tokens, another request that runs: the group waits for a step of its own."""
    rig = Rig(async_scheduling=overlap, max_tokens_per_step=2, max_chunk=2)
    rig.engine.submit(request("other", (3,), 12, ignore_eos=True))
    rig.turn()
    for name, token in (("a", 4), ("b", 5)):
        rig.engine.submit(Request(name, (token,), SamplingParams(max_tokens=1, ignore_eos=True), together="beams"))
    rig.finish()
    firsts = {row.tokens[0]: batch.step for batch in rig.executor.batches for row in batch.rows if row.start == 0}
    assert firsts[4] == firsts[5] >= 11, "both in one step, when the other had its tokens"
    assert all(len(batch.rows) == 1 for batch in rig.executor.batches[: firsts[4]])
    assert len(rig.tokens("other")) == 12
    rig.assert_baseline()


def test_a_group_that_no_step_can_hold_starts_in_parts():
    rig = Rig(max_tokens_per_step=2, max_chunk=2)
    members = [
        Request(f"{at}", (at, 7, 8), SamplingParams(max_tokens=2, ignore_eos=True), together="beams") for at in range(3)
    ]
    for member in members:
        rig.engine.submit(member)
    rig.finish()
    for member in members:
        assert_as_alone(rig, member)


@given(
    st.randoms(use_true_random=False), st.sampled_from(sorted(PRESETS)), st.sampled_from(sorted(ORDERS)), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_groups_beside_others_end_with_their_text_under_any_policy(source, preset, order, overlap):
    """Some are aged, some urgent, some offline; beginnings are common, slots and tokens are few."""
    policy = {"scheduler": preset, "order": order, "aged_seconds": source.choice((5.0, 30.0))}
    limits = {"max_seqs": source.choice((2, 4, 8)), "max_tokens_per_step": source.choice((8, 16, 64)), "max_chunk": 8}
    rig = Rig(async_scheduling=overlap, pages=source.choice((20, 64)), policy=policy, **limits)
    asked = []
    for at in range(30):
        rig.turn()
        if source.random() < 0.5:
            urgency = Urgency(source.choice(("HIGH", "LOW")), offline=source.random() < 0.3)
            prompt = (*range(1, source.choice((5, 17, 33))), source.randrange(40))
            together = f"{at}" if source.random() < 0.5 else ""
            arrival = max(1.0, rig.now - source.choice((0, 20, 400)))
            for member in range(source.randint(2, 5) if together else 1):
                params = SamplingParams(max_tokens=source.randint(1, 8), ignore_eos=True, seed=member)
                more = {"together": together, "urgency": urgency, "arrival": arrival}
                asked.append(Request(f"{at}-{member}", (*prompt, member), params, **more))
                rig.engine.submit(asked[-1])
    rig.finish(5000)
    for one in asked:
        assert_as_alone(rig, one)
    rig.assert_baseline()
