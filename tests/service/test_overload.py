"""Ten times too much, in virtual time: what is told at the door is what the engine then takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median

import pytest

from xllm.runtime import EngineConfig, Request, TokenOutput
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.executor import Limits
from xllm.runtime.pricing import Prices
from xllm.runtime.simulation import Arrival, Machine, simulate
from xllm.service.backlog import Backlog
from xllm.service.errors import ApiError

SLOTS, STEP = 64, 512


def cost(slower: float = 1.0) -> StepCost:
    """A step of 40 ms, 6 ms a sequence and 4 ms a token: some of a model of 0.6 B on two cores."""
    return StepCost(Basis((512,), (1,), (0,)), tuple(slower * part for part in (0.04, 6e-3, 4e-3, 0.0, 0.0, 0.0)))


class Door:
    """A backlog as the service has it. told: by request that came in, what it would wait for."""

    def __init__(self, max_wait: float, prices: Prices) -> None:
        self.now = 0.0
        self.backlog = Backlog(max_wait, prices, clock=lambda: self.now)
        self.told: dict[str, float] = {}

    def admits(self, request: Request, now: float) -> bool:
        self.now = now
        told = self.backlog.seconds
        try:
            self.backlog.add([request])
        except ApiError:
            return False
        self.told[request.id] = told
        return True

    def heard(self, outputs: Sequence[TokenOutput], now: float) -> None:
        self.now = now
        self.backlog.started(*[output.request_id for output in outputs])
        for output in outputs:
            if output.finish_reason is not None:
                self.backlog.ended(output.request_id, output.index + 1)


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("prompt", "output", "beside", "most"),
    [(128, 32, 16, 1.25), (128, 32, 512, 1.9), (400, 4, 64, 1.8), (32, 200, 16, 2.3)],
)
def test_who_comes_in_waits_as_long_as_was_said(
    prompt: int, output: int, beside: int, most: float, slower: float
) -> None:
    """Prices are those of another machine, and answers are shorter than they are taken to be."""
    source = random.Random(0)

    def some(most: int) -> int:
        return source.randrange(max(1, most // 4), most + 1)

    arrivals, at = [], 0.0
    while at < 400.0 * slower:
        at += source.expovariate(20.0 / slower)
        arrivals.append(Arrival(at, some(prompt), some(output)))
    machine = Machine(cost(slower), Limits(STEP, SLOTS, 4096, 1000, SLOTS), 1 << 14, 1 << 30, 1 << 16)
    config = EngineConfig(1 << 30, prefix_cache=False, max_tokens_per_step=STEP, max_beside_decodes=beside)
    door = Door(20.0, Prices(cost(), STEP, beside, SLOTS))
    served, _ = simulate(arrivals, machine, config, gate=door)
    number = {arrival: str(index) for index, arrival in enumerate(arrivals)}
    settled = [one for one in served if one.arrival.at > at / 4]
    assert 100 < len(settled) < len(arrivals) / 5, "most are refused"
    took = [one.ttft / door.told[number[one.arrival]] for one in settled]
    assert 0.95 < median(took) < 1.35, "the step that is under way and its own are in what it took"
    assert max(took) < most
