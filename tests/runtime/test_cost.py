"""The cost model of steps: what it knows of a step, that more never takes less, and that it is quick to ask."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from xllm.runtime.cost import Basis, StepCost
from xllm.targets.base import StepSizes

BASIS = Basis((1, 4, 16), (1, 8), (0, 32))


def some_cost(chance: random.Random, basis: Basis = BASIS) -> StepCost:
    return StepCost(basis, tuple(chance.choice((0.0, chance.random())) for _ in range(basis.size)))


def some_rows(chance: random.Random) -> list[tuple[int, int]]:
    return [(chance.randrange(100), chance.choice((1, 1, chance.randrange(1, 60)))) for _ in range(chance.randrange(8))]


def test_the_parts_of_a_step_are_what_costs_name_them() -> None:
    chance = random.Random(3)
    for _ in range(200):
        rows = some_rows(chance)
        sizes = StepSizes([(new, past) for past, new in rows])
        constant, sequences, *curves, keys, pairs, near, near_pairs = BASIS.parts(rows, 5)
        assert (constant, sequences) == (1, len(rows))
        assert sum(curves[:3]) == sizes["T"] and sum(curves[3:]) == 5
        assert curves[0] == min(sizes["T"], 1) and curves[2] == max(0, sizes["T"] - 4)
        assert (keys, pairs, near, near_pairs) == tuple(sizes[name] for name in ("K", "P", "K32", "P32"))


def test_more_of_anything_never_takes_less() -> None:
    chance = random.Random(5)
    for _ in range(300):
        cost, rows = some_cost(chance), some_rows(chance)
        before = cost.seconds(rows)
        assert before >= cost.seconds([]) == cost.seconds_of[0] >= 0
        more = [*rows, (chance.randrange(100), chance.randrange(1, 20))]
        assert cost.seconds(more) >= before
        at = chance.randrange(len(more))
        past, new = more[at]
        longer, larger = [*more], [*more]
        longer[at], larger[at] = (past + 1, new), (past, new + 1)
        assert min(cost.seconds(longer), cost.seconds(larger)) >= cost.seconds(more) - 1e-9
        assert cost.seconds(rows, 0) <= before


def test_the_tokens_that_fit_a_time_are_the_most_that_do() -> None:
    chance = random.Random(7)
    for _ in range(300):
        cost, rows, most = some_cost(chance), some_rows(chance), chance.randrange(1, 300)
        past = chance.randrange(50)
        limit = cost.seconds([*rows, (past, chance.randrange(1, 2 * most))]) * chance.choice((1.0, 0.5))
        found = cost.tokens_within(limit, most, rows, past)
        assert 0 <= found <= most
        assert found == 0 or cost.seconds([*rows, (past, found)]) <= limit
        assert found == most or cost.seconds([*rows, (past, found + 1)]) > limit


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda cost: replace(cost, seconds_of=cost.seconds_of[:-1]), "figures for 11 parts"),
        (lambda cost: replace(cost, seconds_of=(-1e-9, *cost.seconds_of[1:])), "from 0 on"),
        (lambda cost: replace(cost, seconds_of=(float("nan"), *cost.seconds_of[1:])), "from 0 on"),
        (lambda cost: replace(BASIS, tokens=(1, 4, 4)), "tokens must be"),
        (lambda cost: replace(BASIS, tokens=()), "tokens must be"),
        (lambda cost: replace(BASIS, sampled=(0, 4)), "sampled must be"),
        (lambda cost: replace(BASIS, sampled=tuple(range(1, 100))), "sampled must be"),
        (lambda cost: replace(BASIS, windows=(-1,)), "windows must be"),
    ],
)
def test_figures_that_are_no_model_are_refused(change, why) -> None:
    with pytest.raises(ValueError, match=why):
        change(StepCost(BASIS, (1.0,) * BASIS.size))
