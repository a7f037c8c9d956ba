"""Policies, state by state: orders, who gives way to whom, what goes into a step, decisions that are taken again. Names
carry the number of the behaviour they show."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, request
from tests.runtime.test_policies_end import Quadratic
from tests.runtime.test_scheduler import budget, decoding, given_tokens, running, waiting
from xllm.runtime import KVSpec, RequestRefused
from xllm.runtime.pages import PoolPlan
from xllm.runtime.policies import PRESETS, choose
from xllm.runtime.policies.admission import Lengths, peak_pages
from xllm.runtime.policies.orders import ORDERS, Curve, rank
from xllm.runtime.policies.state import CAUSES
from xllm.runtime.scheduler import Budget, Decision, TokenCost, chunk, decide
from xllm.runtime.sequence import Sequence
from xllm.runtime.urgency import Urgency

OFFLINE = Urgency(offline=True)


def pool(pages: int, tokens: int = 32) -> PoolPlan:
    return PoolPlan(KVSpec(4096), 4096 * tokens // 16, pages, pages, 64)


def small(pages: int, tokens: int = 10_000, max_chunk: int = 1024) -> Budget:
    return Budget(tokens, tokens, max_chunk, pages, pool(pages))


def urged(sequence: Sequence, urgency: Urgency, first_at: float | None = None, pages: int | None = None) -> Sequence:
    object.__setattr__(sequence.request, "urgency", urgency)
    sequence.facts = b""
    sequence.first_at = first_at
    if pages is not None:
        sequence.pages, sequence.capacity = pages, pages * 32
    return sequence


def taken(
    live: list[Sequence], queue: list[Sequence], limits: Budget, scheduler: str, order: str | None = None,
    now: float = 0.0, cost=None, slots: int = 8,
) -> Decision:  # fmt: skip
    """The decision of a policy, ranked as the engine ranks."""
    policy, cost = choose(scheduler, order), cost or TokenCost()
    free = limits.pool.pages - sum(sequence.pages for sequence in live)
    queues = rank(live, queue, slots, policy.order, limits, cost, now)
    decision = decide(queues, limits, free, now, policy, cost)
    assert decide(queues, limits, free, now, policy, cost) == decision
    return decision


def names(sequences) -> list[str]:
    return [sequence.id for sequence in sequences]


def test_behaviour_6_an_online_prompt_takes_the_pages_of_offline_decodes():
    """8 pages of 32 tokens, held by two offline sequences of 100."""
    live = [urged(decoding(order, 101), OFFLINE, 1.0, pages=4) for order in (0, 1)]
    decision = taken(live, [waiting(2, 80)], small(8), "continuous")
    assert given_tokens(decision) == {"w2": 80} and names(decision.admitted) == ["w2"]
    assert names(decision.preempted) == ["r1"] and decision.causes == ("online_prefill_preempt_offline",)
    mixed = taken(live, [waiting(2, 80)], small(8), "chunked")
    assert given_tokens(mixed) == {"w2": 80, "r0": 1} and names(mixed.preempted) == ["r1"]


def test_behaviour_6_only_if_what_all_of_them_hold_suffices():
    live = [decoding(0, 129), urged(decoding(1, 101), OFFLINE, pages=4)]
    live[0].pages, live[0].capacity = 5, 160
    decision = taken(live, [waiting(2, 200)], small(9), "chunked")
    assert not decision.preempted and given_tokens(decision) == {"r0": 1, "r1": 1}
    assert decision.why[0] == "w2: needs 7 pages, 4 may be promised"


def test_behaviour_6_a_victim_that_is_still_in_a_step_comes_a_step_later():
    live = [urged(decoding(order, 101, in_flight=True), OFFLINE, pages=4) for order in (0, 1)]
    decision = taken(live, [waiting(2, 80)], small(8), "chunked")
    assert names(decision.preempted) == ["r1"] and not decision.admitted
    assert "w2: waits for 3 pages" in decision.why


def test_an_online_request_takes_an_offline_slot():
    live = [urged(decoding(order), OFFLINE, pages=1) for order in (0, 1)]
    decision = taken(live, [waiting(2, 5)], small(100), "chunked", slots=0)
    assert names(decision.preempted) == ["r1"] and names(decision.admitted) == ["w2"]
    assert not taken([decoding(0)], [waiting(2, 5)], small(100), "chunked", slots=0).preempted


def test_behaviour_7_an_online_decode_takes_pages_of_offline_ones_first():
    live = [decoding(0, 33), urged(decoding(1, 33), OFFLINE), decoding(2, 20)]
    for sequence in live:
        sequence.pages = 1
        sequence.capacity = 32
    decision = taken(live, [], small(3), "chunked")
    assert names(decision.preempted) == ["r1"] and decision.causes == ("online_decode_preempt_offline",)
    assert given_tokens(decision) == {"r0": 1, "r2": 1}, "though r2 came last"


@pytest.mark.parametrize(
    ("needs", "behind", "cause"),
    [
        ("online decode", ["online", "offline"], "online_decode_preempt_offline"),
        ("online decode", ["online"], "online_decode_preempt_online"),
        ("online decode", [], None),
        ("online prompt", ["offline"], "online_prefill_preempt_offline"),
        ("online prompt", ["online"], "online_prefill_preempt_online"),
        ("offline decode", ["offline"], "offline_decode_preempt_offline"),
        ("offline prompt", ["offline"], None),
    ],
)
def test_the_matrix_of_who_gives_way(needs, behind, cause):
    """The first needs a page, none is free; the others need none now."""
    kind, phase = needs.split()
    first = decoding(0, 33) if phase == "decode" else running(0, 64, 32)
    live = [urged(first, OFFLINE if kind == "offline" else Urgency(), pages=1)]
    live += [urged(decoding(n, 20), OFFLINE if k == "offline" else Urgency(), pages=1) for n, k in enumerate(behind, 1)]
    decision = taken(live, [], small(len(live)), "chunked")
    assert decision.causes == ((cause,) if cause else ())
    assert names(decision.preempted) == ([f"r{len(behind)}"] if cause else [])
    assert ("r0" in given_tokens(decision)) == bool(cause)
    assert cause is None or cause in CAUSES


def test_offline_prompts_that_wait_for_each_other_do_not_wait_for_ever():
    live = [urged(running(order, 96, 32), OFFLINE, pages=1) for order in (0, 1)]
    decision = taken(live, [], small(2), "chunked")
    assert names(decision.preempted) == ["r1"] and decision.causes == ("offline_prefill_preempt_offline",)
    assert given_tokens(decision) == {"r0": 32}


def test_nobody_takes_from_one_before_it_whatever_its_class():
    """An offline decode at the end of its pages waits for online ones."""
    live = [decoding(0, 20), urged(decoding(1, 33), OFFLINE, pages=1)]
    live[0].pages, live[0].capacity = 1, 32
    decision = taken(live, [], small(2), "chunked")
    assert not decision.preempted and given_tokens(decision) == {"r0": 1}


def test_behaviour_8_three_priorities_in_11_pages():
    """Pages of 32 tokens, prompts of 4: two of three fit, the higher ones."""
    rig = Rig(
        max_tokens_per_step=512, max_chunk=512, pages=11, group_bytes=2048, max_len=300, admit_below=1.0,
        prefix_cache=False, policy={"scheduler": "continuous", "order": "priority"},
    )  # fmt: skip

    def held() -> set[str]:
        return {sequence.id for sequence in rig.engine._core.running}

    every = {"low": (Urgency("LOW"), 60), "normal": (Urgency("NORMAL"), 60), "high": (Urgency("HIGH"), 2)}
    for name, (urgency, outputs) in every.items():
        rig.engine.submit(request(name, 128, outputs, urgency, ignore_eos=True))
    rig.turn()
    assert held() == {"normal", "high"}
    while "low" not in held():
        rig.turn()
    assert rig.end("high")
    rig.engine.submit(request("late", 30, 30, Urgency("HIGH"), ignore_eos=True))
    rig.turn()
    last = rig.executor.batches[-1].rows
    assert [len(row.tokens) for row in last] == [30] and held() == {"late", "normal", "low"}, "it prefills at once"
    while not rig.engine.stats().preemptions:
        rig.turn()
    assert held() == {"late", "normal"}, "HIGH and NORMAL are left"
    rig.finish()
    assert len(rig.tokens("low")) == 60


@pytest.mark.parametrize("cost", [Quadratic(), Quadratic(1e-3)])
def test_behaviour_10_the_curve_reproduces_the_cost(cost):
    curve = Curve.of(cost, 256)
    for before, after in ((0, 1), (0, 100), (0, 4096), (64, 65), (500, 800)):
        assert curve.work(before, after) == pytest.approx(cost.seconds(((before, after - before),)))


def test_behaviour_10_a_request_over_the_budget_waits():
    """A decode has 10 s left; 0.5 x^2 + 10 x milliseconds of a prompt: 60 tokens take 2.4 s, 900 take 414 s."""
    decode = urged(decoding(0), Urgency(tpot_slo_ms=10_000), first_at=0.0)
    prompt = urged(waiting(1, 900), Urgency(ttft_slo_ms=1e6))
    cost = Quadratic(1e-3)
    decision = taken([decode], [prompt], budget(1000), "mix", now=0.0, cost=cost)
    tokens = given_tokens(decision)
    assert tokens["r0"] == 1 and 50 < tokens["w1"] < 900
    rows = [(decode.computed, 1), (0, tokens["w1"])]
    assert decision.seconds == cost.seconds(rows) <= 10.0 < cost.seconds([rows[0], (0, tokens["w1"] + 1)])
    later = taken([decode], [prompt], budget(1000), "mix", now=9.0, cost=cost)
    assert later.seconds <= 6.5, "no step is cut below 0.65 of the time per token"
    short = urged(decoding(0), Urgency(tpot_slo_ms=1000), first_at=0.0)
    assert not taken([short], [prompt], budget(1000), "mix", now=0.5, cost=cost).admitted
    last = taken([short], [urged(waiting(1, 20), Urgency())], budget(1000), "mix", now=0.5, cost=cost)
    assert given_tokens(last)["w1"] == 20, "a short piece only when it is the last"


def test_a_latency_that_cannot_be_kept_stops_nobody():
    decode = urged(decoding(0), Urgency(tpot_slo_ms=0.001), first_at=0.0)
    cost = TokenCost(1.0)
    live = [decode, *(urged(decoding(n), Urgency(), 0.0) for n in range(1, 200))]
    assert taken(live, [waiting(200, 90)], budget(1000), "mix", now=5.0, cost=cost).admitted


@pytest.mark.parametrize("free", [900, 625])
def test_behaviours_13_and_14_a_prompt_takes_what_is_left_while_memory_is_ample(free):
    limits = budget(10_000, 1024)
    live = [decoding(n) for n in range(5)]
    queues = rank(live, [waiting(5, 10_000)], 8, ORDERS["fcfs"], limits, TokenCost(), 0.0)
    decision = decide(queues, limits, free, 0.0)
    assert given_tokens(decision)["w5"] == (9995 if free == 900 else 1024)


@pytest.mark.parametrize("scheduler", ["continuous", "prefill-only", "fixed-steps", "continuous+latency-aware"])
@BOTH_LOOPS
def test_behaviour_15_no_step_mixes_prompts_and_decodes(scheduler, overlap):
    rig = Rig(async_scheduling=overlap, max_chunk=8, policy={"scheduler": scheduler})
    for n in range(6):
        rig.engine.submit(request(f"r{n}", 30, 12, ignore_eos=True))
        rig.turn()
    rig.finish()
    for batch in rig.executor.batches:
        kinds = {row.start + len(row.tokens) <= 30 for row in batch.rows}
        assert len(kinds) == 1, "positions below the prompt's end, and beyond"


def test_behaviour_16_chunks():
    assert [chunk(32, 96, 40, 64), chunk(80, 96, 40, 64), chunk(32, 96, 40, 0)] == [40, 16, 0]


@pytest.mark.parametrize("scheduler", [*PRESETS, "chunked+latency-aware"])
def test_behaviours_48_and_49_both_loops_and_every_policy_give_the_same_tokens(scheduler):
    said = []
    for overlap in (False, True):
        policy = {"scheduler": scheduler, "order": "urgency_priority", "cost": Quadratic(1e-3)}
        rig = Rig(async_scheduling=overlap, pages=12, admit_below=1.0, vocab=40, max_len=200, policy=policy)
        requests = [
            request("eos", 60, 90), request("stop", 60, 90, stop_token_ids=(7,)), request("long", 60, 90, OFFLINE),
            request("slo", 50, 80, Urgency("HIGH", False, 5000, 900), ignore_eos=True),
        ]  # fmt: skip
        for req in requests:
            rig.engine.submit(req)
        rig.finish()
        for req in requests:
            assert_as_alone(rig, req)
        said.append([rig.tokens(req.id) for req in requests])
    assert said[0] == said[1]


@pytest.mark.parametrize("scheduler", ["zero-evict", "continuous+zero-evict", "mix+zero-evict"])
@pytest.mark.parametrize("seed", range(4))
def test_zero_evict_preempts_nobody_as_long_as_answers_are_no_longer_than_assumed(scheduler, seed):
    preemptions = {}
    for name in (scheduler.replace("zero-evict", "chunked").removesuffix("+chunked"), scheduler):
        rig = Rig(pages=14, max_len=200, group_bytes=4096, admit_below=1.0, policy={"scheduler": name})
        draw = random.Random(seed)
        for n in range(12):
            rig.engine.submit(request(f"r{n}", draw.randint(1, 60), draw.randint(1, 100), ignore_eos=True))
        rig.finish()
        preemptions[name] = rig.engine.stats().preemptions
    assert preemptions.pop(scheduler) == 0 and all(preemptions.values())


def test_the_peak_of_pages_is_that_of_every_round():
    draw = random.Random(0)
    for _ in range(200):
        held = [decoding(n, draw.randint(2, 90)) for n in range(draw.randint(1, 100))]
        for sequence in held:
            sequence.max_outputs = draw.randint(1, 60)
        plan = pool(100, tokens=16)
        left = [max(0, min(40 if s.outputs < 40 else 80, s.max_outputs) - s.outputs) for s in held]
        rounds = [
            sum(plan.pages_for(len(s.tokens) + min(r, n) - 1) for s, n in zip(held, left, strict=True) if n + 2 >= r)
            for r in range(max(left) + 3)
        ]
        found = peak_pages(held, plan, 40, delay=5)
        assert found == max(rounds) if len(set(left)) <= 64 else found >= max(rounds)


def test_answers_are_taken_to_be_as_long_as_the_long_ones_were():
    lengths, limits = Lengths(), small(10)
    for n in range(1, 101):
        limits = lengths.follow(limits, n)
    assert limits.answer_tokens in range(88, 97)


def test_fixed_steps_run_a_group_to_its_end():
    rig = Rig(pages=12, max_len=100, group_bytes=4096, admit_below=1.0, policy={"scheduler": "fixed-steps"})
    for n in range(10):
        rig.engine.submit(request(f"r{n}", 20 + n, 30, ignore_eos=True))
    groups = []
    while rig.busy:
        rig.turn()
        held = frozenset(s.id for s in rig.engine._core.running)
        if held and not (groups and held <= groups[-1]):
            assert not groups or not held & groups[-1], "somebody joined"
            groups.append(held)
    assert len(groups) > 1 and sum(map(len, groups)) == 10 and rig.engine.stats().preemptions == 0


def test_offline_decodes_join_a_timed_step_as_far_as_there_is_time():
    live = [urged(decoding(0), Urgency(tpot_slo_ms=10_000), first_at=0.0)]
    live += [urged(decoding(n), OFFLINE, first_at=0.0) for n in range(1, 40)]
    limits = replace(budget(1000), step_seconds=60.0)
    decision = taken(live, [], limits, "mix", now=0.0, cost=TokenCost(1.0))
    assert len(decision.grants) == 10 and decision.seconds == 10.0
    assert "30 offline sequences: no time left in the step" in decision.why


def test_a_backlog_of_offline_requests_leaves_room_in_the_queue():
    rig = Rig(queue_limit=20)
    with pytest.raises(RequestRefused, match="queue_full: 18 requests wait"):
        for n in range(20):
            rig.engine.submit(request(f"offline{n}", 5, 5, OFFLINE))
    for n in range(2):
        rig.engine.submit(request(f"online{n}", 5, 5))
    with pytest.raises(RequestRefused, match="queue_full: 20 requests wait"):
        rig.engine.submit(request("online2", 5, 5))
    rig.finish()


def test_an_online_request_does_not_wait_for_the_same_prompt_of_an_offline_one():
    rig = Rig(max_tokens_per_step=8, max_chunk=8)
    rig.engine.submit(request("offline", tuple(range(40)), 5, OFFLINE, ignore_eos=True))
    rig.turn()
    rig.engine.submit(request("online", tuple(range(40)), 5, ignore_eos=True))
    rig.turn()
    assert {row.slot for row in rig.executor.batches[-1].rows} == {rig.engine._live["online"].slot}
    rig.finish()
    assert rig.tokens("online") == rig.tokens("offline")


def test_an_online_request_starts_on_what_is_cached_though_its_slot_is_taken_from_an_offline_one():
    rig = Rig(max_seqs=1, page_bytes=2000, premap=False)
    rig.engine.submit(request("first", tuple(range(1, 41)), 4, ignore_eos=True))
    rig.finish()
    rig.engine.submit(request("offline", 5, 200, OFFLINE, ignore_eos=True))
    for _ in range(3):
        rig.turn()
    rig.engine.submit(request("online", tuple(range(1, 41)), 4, ignore_eos=True))
    while not rig.tokens("online"):
        rig.turn()
    assert rig.end("first").cached_tokens == 0
    assert next(output for output in rig.outputs if output.request_id == "online").cached_tokens == 32
    rig.finish()
    assert rig.tokens("online") == rig.tokens("first")


@pytest.mark.parametrize("aged", [20.0, 1e6])
def test_who_has_waited_too_long_does_not_wait_for_a_younger_equal_prompt(aged):
    """Both have one prompt. The younger one, HIGH, computes it in pieces; the older one is LOW and waits for it, until
    it has aged."""
    policy = {"scheduler": "chunked", "order": "priority", "aged_seconds": aged}
    rig = Rig(max_tokens_per_step=8, max_chunk=4, max_seqs=2, policy=policy)
    same = tuple(range(1, 41)) * 4
    rig.engine.submit(request("busy", 5, 15, Urgency("HIGH"), ignore_eos=True))
    rig.engine.submit(request("more", 5, 15, Urgency("HIGH"), ignore_eos=True))
    rig.turn()
    rig.engine.submit(request("old", same, 5, Urgency("LOW"), ignore_eos=True))
    rig.engine.submit(request("young", same, 5, Urgency("HIGH"), ignore_eos=True))
    while "young" not in names(rig.engine._core.running):
        rig.turn()
    for _ in range(10):
        rig.turn()
    assert ("old" in names(rig.engine._core.running)) == (aged == 20.0)
    rig.finish()
    assert rig.tokens("old") == rig.tokens("young")
