"""The scheduler's decisions, state by state."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import request
from xllm.runtime import KVSpec
from xllm.runtime.pages import PoolPlan
from xllm.runtime.scheduler import Budget, Decision, Queues, chunk, decide
from xllm.runtime.sequence import Sequence, State

PAGE_TOKENS = 16


def budget(
    tokens: int,
    max_chunk: int = 512,
    pages: int = 1000,
    admit_pages: int | None = None,
    beside_decodes: int | None = None,
) -> Budget:
    pool = PoolPlan(KVSpec(4096), 4096, pages, pages, 64)
    return Budget(tokens, beside_decodes or tokens, max_chunk, pages if admit_pages is None else admit_pages, pool)


def waiting(order: int, prompt: int, max_tokens: int = 1000, arrival: float = 0.0) -> Sequence:
    sequence = Sequence(request(f"w{order}", prompt), max_tokens, order)
    sequence.arrived = arrival
    return sequence


def running(order: int, prompt: int, computed: int, outputs: int = 0, in_flight: bool = False) -> Sequence:
    sequence = Sequence(request(f"r{order}", prompt), 1000, order)
    sequence.tokens += [1] * outputs
    sequence.computed = computed
    sequence.state, sequence.slot, sequence.flights = State.RUNNING, order, int(in_flight)
    sequence.pages = -(-computed // PAGE_TOKENS)
    sequence.capacity = sequence.pages * PAGE_TOKENS
    return sequence


def decoding(order: int, length: int = 30, in_flight: bool = False) -> Sequence:
    return running(order, length - 1, length - 1, outputs=1, in_flight=in_flight)


def given_tokens(decision: Decision) -> dict[str, int]:
    return {grant.sequence.id: grant.tokens for grant in decision.grants}


def test_prompts_take_less_beside_decodes_and_all_of_it_without():
    limits = budget(512, 512, beside_decodes=64)
    beside = decide(Queues([decoding(0)], [waiting(1, 50), waiting(2, 500)], 8), limits, 900, now=0.0)
    assert given_tokens(beside) == {"r0": 1, "w1": 50, "w2": 14}
    alone = decide(Queues([], [waiting(1, 50), waiting(2, 500)], 8), limits, 900, now=0.0)
    assert given_tokens(alone) == {"w1": 50, "w2": 462}


@pytest.mark.parametrize(
    ("done", "total", "limit", "left", "expected"),
    [(32, 96, 40, 64, 40), (32, 96, 40, 0, 0), (32, 96, 100, 64, 64), (32, 96, 100, 30, 30), (96, 96, 40, 64, 0)],
)
def test_chunk(done, total, limit, left, expected):
    assert chunk(done, total, limit, left) == expected


def test_decodes_come_first_and_a_prompt_takes_what_is_left_when_memory_is_ample():
    state = Queues([decoding(n) for n in range(5)], [waiting(5, 10_000)], 8)
    decision = decide(state, budget(10_000, 1024), 900, now=0.0)
    assert given_tokens(decision) == {**{f"r{n}": 1 for n in range(5)}, "w5": 9995}
    assert not decision.grants[-1].sample and decision.why == ()


def test_a_prompt_keeps_to_its_chunk_when_memory_is_scarce():
    state = Queues([decoding(n) for n in range(5)], [waiting(5, 10_000)], 8)
    decision = decide(state, budget(10_000, 1024), 625, now=0.0)
    assert given_tokens(decision)["w5"] == 1024
    assert "memory is scarce" in decision.why[0]


def test_chunks_are_shared_before_the_rest_goes_to_the_oldest():
    state = Queues([running(0, 300, 10)], [waiting(1, 300), waiting(2, 300)], 8)
    assert given_tokens(decide(state, budget(120, 40), 900, 0.0)) == {"r0": 40, "w1": 40, "w2": 40}
    assert given_tokens(decide(state, budget(200, 40), 900, 0.0)) == {"r0": 120, "w1": 40, "w2": 40}


def test_the_last_chunk_samples():
    decision = decide(Queues([running(0, 100, 90)], [], 8), budget(64), 900, 0.0)
    assert given_tokens(decision) == {"r0": 10} and decision.grants[0].sample


def test_admission_is_first_come_first_served_and_says_what_it_waits_for():
    state = Queues([decoding(0)], [waiting(1, 2000, arrival=2.0), waiting(2, 5, arrival=3.0)], 8)
    decision = decide(state, budget(512), 100, now=5.0)
    assert decision.admitted == () and decision.oldest_wait == 3.0
    assert decision.why == ("w1: needs 125 pages, 100 may be promised",)
    decision = decide(Queues([decoding(0)], [waiting(1, 5), waiting(2, 5)], 1), budget(512), 100, 0.0)
    assert [s.id for s in decision.admitted] == ["w1"] and decision.why == ("w2: no free slot",)
    decision = decide(Queues([decoding(0)], [waiting(1, 5)], 1), budget(1), 100, 0.0)
    assert decision.why == ("w1: no tokens left in the step",)


def test_admission_leaves_headroom_unless_nothing_runs():
    limits = budget(512, pages=100, admit_pages=95)
    assert not decide(Queues([decoding(0)], [waiting(1, 96 * 16)], 8), limits, 98, 0.0).admitted
    assert decide(Queues([], [waiting(1, 96 * 16)], 8), limits, 100, 0.0).admitted


def test_pages_promised_to_a_running_prompt_are_not_given_to_another():
    state = Queues([running(0, 1600, 16)], [waiting(1, 32)], 8)
    assert not decide(state, budget(64, 16, pages=100), 100 - 1, 0.0).admitted
    assert decide(state, budget(64, 16, pages=102), 102 - 1, 0.0).admitted


def test_pages_promised_in_the_same_step_count_as_well():
    state = Queues([], [waiting(0, 60 * 16), waiting(1, 60 * 16)], 8)
    assert [s.id for s in decide(state, budget(64, 16, pages=100), 100, 0.0).admitted] == ["w0"]


def test_out_of_pages_the_last_arrived_gives_way():
    old, young, youngest = decoding(0, 33), decoding(1, 20), decoding(2, 20)
    decision = decide(Queues([old, young, youngest], [waiting(3, 5)], 8), budget(64), 0, 0.0)
    assert [s.id for s in decision.preempted] == ["r2"]
    assert given_tokens(decision) == {"r0": 1, "r1": 1} and not decision.admitted
    assert "r2: preempted" in decision.why[0]


def test_the_youngest_waits_instead_of_taking_from_older_ones():
    decision = decide(Queues([decoding(0, 20), decoding(1, 33)], [], 8), budget(64), 0, 0.0)
    assert decision.preempted == () and given_tokens(decision) == {"r0": 1}
    assert decision.why == ("r1: waits for 1 pages",)


def test_an_older_prompt_takes_back_what_a_younger_decode_was_given():
    prompt, decode = running(0, 100, 16), decoding(1, 20)
    decision = decide(Queues([prompt, decode], [], 8), budget(64), 0, 0.0)
    assert [s.id for s in decision.preempted] == ["r1"]
    assert given_tokens(decision) == {"r0": 32}, "the victim's two pages, and its token is given back as well"


def test_pages_of_a_victim_in_flight_come_a_step_later():
    old, victim = decoding(0, 33, in_flight=True), decoding(1, 20, in_flight=True)
    decision = decide(Queues([old, victim], [], 8), budget(64), 0, 0.0)
    assert [s.id for s in decision.preempted] == ["r1"] and decision.grants == ()
    assert decision.why[-1] == "r0: waits for 1 pages"


def test_what_was_freed_for_an_older_sequence_is_not_taken_by_a_younger_one():
    a, b, victim = (decoding(n, length, in_flight=True) for n, length in ((0, 33), (1, 33), (2, 10)))
    decision = decide(Queues([a, b, victim], [], 8), budget(64), 0, 0.0)
    assert [s.id for s in decision.preempted] == ["r2"], "one page comes, for the oldest; the next one waits"
    assert decision.grants == ()


def test_each_waiting_sequence_gets_pages_of_its_own():
    a, b, c, d = (decoding(n, length, in_flight=True) for n, length in ((0, 33), (1, 33), (2, 10), (3, 10)))
    decision = decide(Queues([a, b, c, d], [], 8), budget(64), 0, 0.0)
    assert [s.id for s in decision.preempted] == ["r3", "r2"], "one page for r0, another for r1"


def test_a_sequence_whose_last_token_is_in_flight_gets_no_row():
    done = decoding(0, in_flight=True)
    done.max_outputs = 1
    assert decide(Queues([done], [], 8), budget(64), 10, 0.0).grants == ()


def test_a_step_too_small_for_all_decodes_serves_the_oldest():
    decision = decide(Queues([decoding(n) for n in range(9)], [waiting(9, 4)], 8), budget(4), 100, 0.0)
    assert list(given_tokens(decision)) == ["r0", "r1", "r2", "r3"]
    assert decision.why == ("w9: no tokens left in the step", "5 running sequences: no tokens left in the step")


def test_nothing_to_do_is_an_empty_decision():
    assert decide(Queues([], [], 8), budget(64), 100, 0.0) == Decision((), (), (), (), 0.0)


STATES = st.lists(
    st.tuples(st.integers(1, 200), st.floats(0, 1), st.integers(0, 40), st.booleans(), st.booleans()), max_size=12
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STATES, st.integers(0, 80), st.integers(1, 50), st.integers(0, 60), st.integers(0, 6), st.booleans())
def test_budgets_hold_in_any_state(states, tokens, max_chunk, spare, slots, in_flight):
    live, queue = [], []
    for order, (prompt, share, outputs, decodes, waits) in enumerate(states):
        if queue or waits:
            queue.append(waiting(order, prompt))
        elif decodes:
            live.append(decoding(order, prompt + outputs + 1, in_flight))
        else:
            live.append(running(order, prompt, int(share * (prompt - 1)), in_flight=in_flight))
    held = sum(sequence.pages for sequence in live)
    limits = budget(tokens, max_chunk, pages=held + spare, admit_pages=held + spare)
    queues = Queues(tuple(live), tuple(queue), slots)
    before = copy.deepcopy([{n: getattr(s, n) for n in Sequence.__slots__} for s in live + queue])
    decision = decide(queues, limits, spare, 0.0)
    assert decide(queues, limits, spare, 0.0) == decision
    assert before == [{n: getattr(s, n) for n in Sequence.__slots__} for s in live + queue], "state was changed"

    assert sum(grant.tokens for grant in decision.grants) <= tokens
    assert all(grant.tokens >= 1 for grant in decision.grants)
    assert all(grant.sample == (grant.tokens == grant.sequence.remaining) for grant in decision.grants)
    rows = [grant.sequence for grant in decision.grants]
    assert len(set(map(id, rows))) == len(rows) and not set(rows) & set(decision.preempted)
    assert list(decision.admitted) == queue[: len(decision.admitted)] and len(decision.admitted) <= slots
    assert set(decision.admitted) <= set(rows)
    assert list(decision.preempted) == live[::-1][: len(decision.preempted)]
    assert not (decision.preempted and decision.admitted)
    taken = sum(grant.pages - grant.sequence.pages for grant in decision.grants)
    freed = sum(victim.pages for victim in decision.preempted if not victim.flights)
    assert taken <= spare + freed
    for grant in decision.grants:
        assert limits.pool.pages_for(grant.sequence.computed + grant.tokens) <= grant.pages
        assert grant.pages >= grant.sequence.pages
    if live and tokens and not in_flight and held + spare >= limits.pool.pages_for(live[0].computed + 1):
        assert live[0] in rows or sum(s.decoding for s in live) >= tokens, "the oldest goes on"


def test_no_request_starves_while_others_keep_coming():
    """A big prompt among an endless stream of small ones is admitted in its turn."""
    rng = random.Random(0)
    limits = budget(64, 32, pages=40, admit_pages=38)
    live: list[Sequence] = []
    queue = [waiting(0, 30, 20), waiting(1, 500, 20)]
    order = 2
    for _ in range(200):
        while len(queue) < 5:
            queue.append(waiting(order, rng.randint(1, 40), rng.randint(1, 30)))
            order += 1
        free = 40 - sum(sequence.pages for sequence in live)
        decision = decide(Queues(live, queue, 8 - len(live)), limits, free, 0.0)
        for victim in decision.preempted:
            live.remove(victim)
            victim.pages = victim.capacity = victim.computed = 0
            queue.insert(0, victim)
        del queue[: len(decision.admitted)]
        live += decision.admitted
        for sequence, tokens, pages, sample in decision.grants:
            sequence.computed += tokens
            sequence.pages, sequence.capacity = pages, pages * PAGE_TOKENS
            sequence.tokens += [1] * sample
        if any(sequence.order == 1 and sequence.outputs == 20 for sequence in live):
            return
        live = [sequence for sequence in live if sequence.outputs < sequence.max_outputs]
    raise AssertionError("the big prompt never finished")
