"""The core in virtual time: exact where a step's time is known, and what policies are for shows under load."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from xllm.runtime import EngineConfig, Limits
from xllm.runtime.policies import choose
from xllm.runtime.policies.state import TokenCost
from xllm.runtime.policies.trace import Trace, recorded, summary
from xllm.runtime.scheduler import decide
from xllm.runtime.simulation import Arrival, Machine, Served, simulate
from xllm.runtime.urgency import Urgency

MACHINE = Machine(TokenCost(0.001), Limits(1000, 32, 4096, 100), 1000, 4000 * 1000, 4000)


def config(scheduler: str = "chunked", order: str | None = None) -> EngineConfig:
    return EngineConfig(
        kv_bytes=1, max_tokens_per_step=1000, max_chunk=1000, step_seconds=0.1, premap=False, prefix_cache=False,
        scheduler=scheduler, order=order, cost=MACHINE.cost, check=True,
    )  # fmt: skip


def burst(urgency: Urgency, seed: int = 0, count: int = 60, seconds: float = 10.0) -> list[Arrival]:
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, seconds) for _ in range(count))
    return [Arrival(at, draw.choice([20, 50, 900]), draw.randint(2, 40), urgency) for at in times]


def test_one_request_takes_what_its_steps_cost():
    [one], stats = simulate([Arrival(2.0, 100, 11)], MACHINE, config())
    assert one.ttft == pytest.approx(0.1) and one.tpot == pytest.approx(0.001)
    assert one.last == pytest.approx(2.11) and stats.generated_tokens == 11
    [two], _ = simulate([Arrival(0.0, 2500, 1)], MACHINE, config())
    assert two.ttft == pytest.approx(2.5) and two.tpot == 0


def test_the_same_arrivals_give_the_same_times():
    arrivals = burst(Urgency(ttft_slo_ms=800, tpot_slo_ms=50))
    for scheduler in ("chunked", "mix", "continuous"):
        first, again = (simulate(arrivals, MACHINE, config(scheduler))[0] for _ in range(2))
        assert first == again and len(first) == len(arrivals)


def good(served: list[Served]) -> float:
    return sum(one.good for one in served) / len(served)


@pytest.mark.parametrize("seed", range(3))
def test_mix_serves_more_in_time_than_arrival_order_does(seed):
    arrivals = burst(Urgency(ttft_slo_ms=1000, tpot_slo_ms=120), seed)
    fcfs, mix = (simulate(arrivals, MACHINE, config(scheduler))[0] for scheduler in ("chunked", "mix"))
    assert good(mix) > good(fcfs) + 0.2


def test_a_model_that_says_too_little_costs_little_and_its_decisions_can_be_taken_again():
    arrivals = burst(Urgency(ttft_slo_ms=1000, tpot_slo_ms=120))
    half, trace = TokenCost(0.0006), Trace()
    right = simulate(arrivals, MACHINE, config("mix"))[0]
    wrong = simulate(arrivals, MACHINE, replace(config("mix"), cost=half, trace=trace))[0]
    assert good(wrong) >= good(right) - 0.1
    costs = []
    for queues, limits, free, now, cost, decided in recorded(trace.lines, half):
        assert summary(decide(queues, limits, free, now, choose("mix"), cost)) == decided
        costs.append(cost.seconds([(0, 1)]))
    assert costs[0] == 0.0006 and costs[-1] == pytest.approx(0.001, rel=0.1)


@pytest.mark.parametrize("scheduler", ["chunked", "mix"])
def test_offline_work_costs_online_requests_little(scheduler):
    """Sixty offline requests are there from the start and fill slots and memory."""
    online = burst(Urgency(ttft_slo_ms=2000, tpot_slo_ms=200), count=20)
    offline = [Arrival(0.0, 200, 60, Urgency(offline=True)) for _ in range(60)]
    machine = replace(MACHINE, kv_bytes=60 * 4000)
    alone = simulate(online, machine, config(scheduler))[0]
    both, stats = simulate([*offline, *online], machine, config(scheduler))
    served = [one for one in both if not one.arrival.urgency.offline]
    assert len(both) == 80 and len(served) == 20
    assert stats.online_prefill_preempt_offline > 0 and stats.online_decode_preempt_online == 0
    assert good(served) >= good(alone) - 0.15
    last = max(one.last for one in both if one.arrival.urgency.offline)
    assert last > max(one.last for one in served) or scheduler == "chunked"


def test_what_is_not_done_in_time_is_left_out():
    served, _ = simulate([Arrival(0.0, 10, 5), Arrival(0.0, 10, 4000)], MACHINE, config(), until=1.0)
    assert [one.arrival.output for one in served] == [5]
