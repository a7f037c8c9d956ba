"""Ten orders, who goes first however long others keep coming, decisions taken again, and names that are none."""

from __future__ import annotations

import json
import math
import random

import pytest

from tests.runtime.fakes import BOTH_LOOPS, Rig, request
from tests.runtime.test_policies import OFFLINE, names, urged
from tests.runtime.test_policies_end import Quadratic
from tests.runtime.test_scheduler import budget, decoding, waiting
from xllm.runtime import EngineConfig, RequestRefused, RuntimeFault
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.policies import MODIFIERS, PRESETS, choose
from xllm.runtime.policies.orders import LATE, ORDERS, RELAXED, URGENT, View, rank
from xllm.runtime.policies.trace import Replayed, Trace, recorded, replay, summary
from xllm.runtime.scheduler import TokenCost, decide
from xllm.runtime.sequence import Sequence
from xllm.runtime.urgency import Urgency


def ranked(order: str, live: list[Sequence], queue: list[Sequence], now: float = 10.0) -> list[str]:
    queues = rank(live, queue, 8, ORDERS[order], budget(1000), TokenCost(0.01), now)
    assert names(queues.running) + names(queues.waiting) != [] and len(queues.line) == len(live) + len(queue)
    return names(queues.line)


def crowd() -> tuple[list[Sequence], list[Sequence]]:
    """Two that decode, one with little time left; four that wait: long and due first, short, middle and LOW, and one
    too late for its first token."""
    live = [
        urged(decoding(0), Urgency("LOW", tpot_slo_ms=20_000), first_at=5.0),
        urged(decoding(1), Urgency("NORMAL", tpot_slo_ms=6000), first_at=5.0),
    ]
    queue = [
        urged(waiting(2, 800, arrival=9.0), Urgency("NORMAL", ttft_slo_ms=10_000)),
        urged(waiting(3, 20, arrival=9.0), Urgency("NORMAL", ttft_slo_ms=30_000)),
        urged(waiting(4, 100, arrival=9.0), Urgency("HIGH", ttft_slo_ms=40_000)),
        urged(waiting(5, 10, arrival=8.0), Urgency("HIGH", ttft_slo_ms=1000)),
    ]
    return live, queue


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fcfs", ["r0", "r1", "w2", "w3", "w4", "w5"]),
        ("priority", ["w4", "w5", "r1", "w2", "w3", "r0"]),
        ("deadline", ["w5", "r1", "w2", "r0", "w3", "w4"]),
        ("sjf", ["r0", "r1", "w5", "w3", "w4", "w2"]),
        ("density", ["r1", "r0", "w5", "w3", "w4", "w2"]),
        ("decode_deadline", ["r1", "r0", "w5", "w2", "w3", "w4"]),
        ("decode_density", ["r1", "r0", "w5", "w3", "w4", "w2"]),
        ("urgency_density", ["r1", "w2", "r0", "w3", "w4", "w5"]),
        ("urgency_priority", ["r1", "w2", "w4", "w3", "r0", "w5"]),
        ("decode_urgency_density", ["r1", "r0", "w2", "w3", "w4", "w5"]),
    ],
)
def test_ten_orders(order, expected):
    """9.3 s of work are left, of 10 ms a token: due before that is urgent."""
    live, queue = crowd()
    assert ranked(order, live, queue) == expected
    view = View(live, queue, budget(1000), TokenCost(0.01), 10.0)
    assert view.classes.tolist() == [RELAXED, URGENT, URGENT, RELAXED, RELAXED, LATE]


def test_there_are_ten_orders_and_equal_keys_go_by_arrival():
    assert len(ORDERS) == 10
    for order in ORDERS:
        queue = [waiting(n, 10, arrival=1.0) for n in range(5)]
        assert ranked(order, [], queue, now=2.0) == [f"w{n}" for n in range(5)]


def test_online_goes_before_offline_in_every_order():
    for order in ORDERS:
        queue = [urged(waiting(n, 5 + n, arrival=1.0), Urgency("HIGH", n % 2 == 0, 10)) for n in range(6)]
        assert {name for name in ranked(order, [], queue, 2.0)[:3]} == {"w1", "w3", "w5"}


def test_the_oldest_goes_first_when_it_has_waited_too_long():
    queue = [urged(waiting(0, 50, arrival=1.0), Urgency("LOW")), urged(waiting(1, 50, arrival=2.0), Urgency("HIGH"))]
    assert ranked("priority", [], queue, now=30.0) == ["w1", "w0"]
    assert ranked("priority", [], queue, now=31.5) == ["w0", "w1"]
    urged(queue[0], Urgency("LOW", offline=True))
    assert ranked("priority", [], queue, now=40.0) == ["w1", "w0"], "an offline one is ten times as patient"
    assert ranked("priority", [], queue, now=400.0) == ["w0", "w1"]


@pytest.mark.parametrize("urgency", [Urgency("LOW"), OFFLINE])
def test_nobody_starves_while_more_urgent_ones_keep_coming(urgency):
    policy = {"scheduler": "chunked", "order": "priority", "aged_seconds": 20.0}
    rig = Rig(max_seqs=2, pages=9, max_len=96, policy=policy)
    rig.engine.submit(request("last", 40, 20, urgency, ignore_eos=True))
    for n in range(600):
        if rig.engine.stats().waiting < 4:
            rig.engine.submit(request(f"high{n}", 20, 10, Urgency("HIGH"), ignore_eos=True))
        rig.turn()
        if len(rig.tokens("last")) == 20:
            assert rig.now > 20
            return
    raise AssertionError("it never ended")


@BOTH_LOOPS
@pytest.mark.parametrize("scheduler", list(PRESETS))
def test_recorded_decisions_are_taken_again(scheduler, overlap, tmp_path):
    trace, cost = Trace(steps=500), Quadratic(1e-4)
    policy = {"scheduler": scheduler, "order": "urgency_density", "cost": cost, "trace": trace}
    rig = Rig(async_scheduling=overlap, pages=10, max_len=150, max_seqs=4, admit_below=1.0, policy=policy)
    draw = random.Random(3)
    for n in range(12):
        urgency = Urgency("HIGH" if n % 3 else "LOW", n % 4 == 0, *draw.choice([(None, None), (9000, 1500)]))
        rig.engine.submit(request(f"r{n}", draw.randint(1, 60), draw.randint(1, 50), urgency, ignore_eos=True))
        rig.turn()
    rig.finish()
    trace.write(tmp_path / "trace")
    lines = (tmp_path / "trace").read_text().splitlines()
    assert 50 < len(lines) <= 501
    assert replay(lines, cost) == Replayed(scheduler, len(lines) - 1, 0)
    with pytest.raises(ValueError, match="a cost model that is not in the trace"):
        replay(lines)
    for queues, limits, free, now, known, decided in recorded(lines[1:], cost):
        assert summary(decide(queues, limits, free, now, choose(scheduler), known)) == decided
        again = rank(sorted(queues.running, key=number), bare(queues.waiting), 0, ORDERS["urgency_density"], limits,
                     cost, now)  # fmt: skip
        assert names(again.running) == names(queues.running) and names(again.waiting) == names(queues.waiting)
    with pytest.raises(ValueError, match="not a line"):
        next(recorded([json.dumps({"now": 1})]))


@pytest.mark.parametrize(
    "head",
    [
        [],
        {"schema": 0},
        {"schema": 1, "scheduler": "chunked"},
        {"schema": 1, "scheduler": ["chunked"], "modelled": False, "model": None},
        {"schema": 1, "scheduler": "chunked", "modelled": True, "model": 1},
        {"schema": 1, "scheduler": "chunked", "modelled": True, "model": {"basis": {"tokens": 5}}},
    ],
)
def test_what_is_no_trace_is_told(head):
    with pytest.raises(ValueError, match="not a schedule's trace"):
        replay([json.dumps(head)])


def number(sequence: Sequence) -> int:
    return sequence.order


def bare(queue) -> list[Sequence]:
    """As they wait: what of them is cached was looked up after they were ranked."""
    for sequence in queue:
        sequence.computed = 0
    return sorted(queue, key=number)


def test_a_trace_keeps_the_latest_decisions():
    trace = Trace(steps=5)
    rig = Rig(policy={"trace": trace})
    rig.engine.submit(request("a", 5, 20, ignore_eos=True))
    rig.finish()
    assert len(trace.lines) == 5 and json.loads(trace.lines[-1])["now"] > 15
    short = Trace(size=3 * len(trace.lines[-1]))
    rig = Rig(policy={"trace": short})
    assert short.text() is None
    rig.engine.submit(request("a", 5, 20, ignore_eos=True))
    rig.finish()
    assert list(short.lines) == list(trace.lines)[-len(short.lines) :] and 2 <= len(short.lines) <= 3


def test_replay_says_where_it_would_decide_otherwise():
    trace, model = Trace(), StepCost(Basis((1, 8), (1,), (0,)), (1e-3, 0.0, 1e-4, 2e-4, 0.0, 1e-6, 0.0))
    rig = Rig(policy={"trace": trace, "scheduler": "mix", "cost": model})
    rig.engine.submit(request("a", 50, 20, Urgency(ttft_slo_ms=2000, tpot_slo_ms=20), ignore_eos=True))
    rig.finish()
    lines = (trace.text() or b"").decode().splitlines()
    assert replay(lines) == Replayed("mix", len(lines) - 1, 0), "the model is in the trace"
    lines[2] = lines[2].replace('"grants":[[0,1,', '"grants":[[0,2,')
    other = replay(lines)
    assert other.differing == 1 and other.first.startswith("decision 1 at ")
    for head in ("", "{}", lines[1], lines[0].replace("mix", "best")):
        with pytest.raises(ValueError, match="not a schedule's trace"):
            replay([head, *lines[1:]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheduler": "best"}, "scheduler is 'best', there are chunked, continuous"),
        ({"scheduler": "mix+fast"}, "modifier of the scheduler is 'fast', there are latency-aware"),
        ({"order": "lifo"}, "order is 'lifo', there are fcfs, priority"),
        ({"aged_seconds": math.nan}, "aged_seconds is nan"),
    ],
)
def test_names_that_are_none_are_refused(options, said):
    with pytest.raises(RuntimeFault, match="invalid_config") as refusal:
        EngineConfig(kv_bytes=1, **options)
    assert said in refusal.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", "URGENT"), ("priority", 1), ("offline", 1), ("offline", "yes"), ("ttft_slo_ms", 0),
        ("ttft_slo_ms", -1.0), ("ttft_slo_ms", math.nan), ("ttft_slo_ms", math.inf), ("tpot_slo_ms", True),
        ("tpot_slo_ms", math.nan), ("tpot_slo_ms", "50"), ("tpot_slo_ms", 1e12),
    ],
)  # fmt: skip
def test_an_urgency_that_means_nothing_is_refused_by_its_field(field, value):
    with pytest.raises(RequestRefused) as refusal:
        Urgency(**{field: value})
    assert refusal.value.code == "invalid_parameter" and refusal.value.message.startswith(f"{field} is ")


def test_modifiers_go_with_every_preset():
    for preset in PRESETS:
        for modifier in MODIFIERS:
            policy = choose(f"{preset}+{modifier}", "deadline")
            assert policy.batching is PRESETS[preset].batching and policy.order is ORDERS["deadline"]


def test_a_decision_asks_about_a_row_a_few_times_however_many_there_are():
    """One prompt is cut to the time there is: pieces are tried beside 300 decodes, which are counted once."""

    class Counting(Quadratic):
        rows = 0

        def sizes(self, rows):
            self.rows += len(rows)
            return super().sizes(rows)

    live = [urged(decoding(n), Urgency(tpot_slo_ms=1000), first_at=9.0) for n in range(300)]
    queue = [urged(waiting(300 + n, 500), Urgency(ttft_slo_ms=60_000)) for n in range(300)]
    cost = Counting(1e-6)
    queues = rank(live, queue, 400, ORDERS["urgency_density"], budget(1000), cost, 9.0)
    decision = decide(queues, budget(1000), 900, 9.0, choose("mix"), cost)
    assert len(decision.grants) > 300 and decision.seconds == cost.seconds(
        [(grant.sequence.computed, grant.tokens) for grant in decision.grants]
    )
    assert cost.rows < 4 * 300


@BOTH_LOOPS
def test_queues_are_ranked_only_while_somebody_is_offline(overlap):
    trace = Trace()
    rig = Rig(async_scheduling=overlap, policy={"trace": trace})
    rig.engine.submit(request("online", 5, 30, ignore_eos=True))
    for name, ends in (("one", "length"), ("other", "cancelled")):
        rig.engine.submit(request(name, 5, 8, OFFLINE, ignore_eos=True))
        for _ in range(5):
            rig.turn()
        if ends == "cancelled":
            rig.engine.cancel(name)
        while rig.engine.stats().running > 1 or rig.engine.stats().waiting:
            rig.turn()
        before = len(trace.lines)
        rig.turn()
        rig.turn()
        ranked = [json.loads(line)["line"] for line in trace.lines]
        assert any(ranked) and len(ranked) > before and not any(ranked[before:])
    rig.finish()
