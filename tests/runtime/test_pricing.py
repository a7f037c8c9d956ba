"""What work that waits will take: beside what the engine's own core makes of it in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from xllm.runtime.config import EngineConfig
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.executor import Limits
from xllm.runtime.pricing import Prices, Work
from xllm.runtime.simulation import Arrival, Machine, simulate

# 10 ms a step, 1 ms a sequence, 1 ms a token up to 64 and half of that behind, and what attention meets.
COST = StepCost(Basis((64, 512), (1,), (0,)), (0.01, 1e-3, 1e-3, 5e-4, 0.0, 1e-6, 1e-7))
SLOTS, STEP, BESIDE = 8, 256, 128


@pytest.mark.parametrize(
    ("prompts", "output"),
    [
        ([2000], 1),
        ([100] * 8, 1),
        ([700] * 6, 100),
        ([20] * 8, 50),
        ([64] * 60, 40),
        ([16] * 100, 100),
        ([1500, 30, 30, 800, 64], 20),
        ([300] * 30, 300),
    ],
)
def test_a_burst_takes_what_the_simulated_engine_takes(prompts: list[int], output: int) -> None:
    prices = Prices(COST, STEP, BESIDE, SLOTS)
    ahead = Work()
    for prompt in prompts:
        ahead = ahead.plus(prices.of(prompt))
    steps = prices.steps(ahead, 0, sum(prompts) / len(prompts), output)
    machine = Machine(COST, Limits(STEP, SLOTS, 4096, 1000, SLOTS), 1 << 14, 1 << 30, 1 << 16)
    limits: dict[str, Any] = {"max_tokens_per_step": STEP, "max_beside_decodes": BESIDE, "max_chunk": STEP}
    config = EngineConfig(1 << 30, prefix_cache=False, **limits)
    served, _ = simulate([Arrival(0.0, prompt, output) for prompt in prompts], machine, config)
    assert steps.count * steps.seconds == pytest.approx(max(one.ttft for one in served), rel=0.12)


def test_more_ahead_never_takes_less() -> None:
    prices = Prices(COST, STEP, BESIDE, SLOTS, kv_tokens=2000)
    ahead, before = Work(), 0.0
    for prompt in (1, 900, 20, 300, *[64] * 20):
        ahead = ahead.plus(prices.of(prompt))
        steps = prices.steps(ahead, 2, 100, 50)
        assert steps.count * steps.seconds >= before > -1
        before = steps.count * steps.seconds
    for prompt in (1, 900, 20, 300, *[64] * 20):
        ahead = ahead.less(prices.of(prompt))
    assert ahead == Work()
