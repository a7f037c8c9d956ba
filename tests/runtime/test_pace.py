"""Prompt tokens beside decodes follow what steps take."""

from __future__ import annotations

import pytest

from tests.runtime.test_scheduler import budget as budget_of
from xllm.runtime.pace import FEWEST, Pace
from xllm.runtime.scheduler import TokenCost


@pytest.mark.parametrize("token_seconds", [1e-4, 1e-3, 1e-2, 1.0])
def test_a_bound_that_was_guessed_becomes_what_fits_the_time(token_seconds):
    budget, pace = budget_of(512, beside_decodes=128), Pace(0.25)
    for _ in range(20):
        rows = [1, budget.beside_decodes - 1]
        budget = pace.follow(budget, rows, budget.beside_decodes * token_seconds)
    fits = min(max(FEWEST, 0.25 / token_seconds), 512)
    assert abs(budget.beside_decodes - fits) <= fits / 7


def test_a_model_that_says_too_little_is_corrected_and_one_that_says_too_much_is_believed():
    pace, model = Pace(0.25), TokenCost(0.01)
    assert pace.cost(None) == TokenCost() and pace.cost(model) is model
    for _ in range(50):
        pace.compare(pace.cost(model).seconds([(0, 10)]), 0.15)
    assert pace.cost(model).seconds([(0, 10)]) == pytest.approx(0.15)
    pace.compare(0.0, 9.0)
    pace.compare(9.0, 0.0)
    for _ in range(50):
        pace.compare(pace.cost(model).seconds([(0, 10)]), 0.05)
    assert pace.cost(model) is model
    for _ in range(50):
        pace.compare(pace.cost(model).seconds([(0, 10)]), 1e9)
    assert pace.cost(model).seconds([(0, 10)]) == 0.2, "at most twice as long"


def test_one_slow_step_does_not_throw_it_over():
    budget, pace = budget_of(512, beside_decodes=250), Pace(0.25)
    for _ in range(5):
        budget = pace.follow(budget, [1, 249], 0.25)
    assert budget.beside_decodes == 249
    slow = pace.follow(budget, [200, 49, 1], 0.5)
    assert 150 < slow.beside_decodes < 250
    for _ in range(20):
        slow = pace.follow(slow, [249, 1], 0.25)
    assert slow.beside_decodes > 215


def test_a_step_a_little_too_long_counts_at_once_and_one_a_little_too_short_does_not():
    budget = budget_of(512, beside_decodes=250)
    assert Pace(0.25).follow(budget, [1, 249], 0.27).beside_decodes < 235
    assert Pace(0.25).follow(budget, [1, 249], 0.23) is budget


def test_it_leaves_alone_what_it_can_not_tell():
    budget = budget_of(512, beside_decodes=64)
    assert Pace(None).follow(budget, [64], 9.0) is budget
    assert Pace(0.25).follow(budget, [FEWEST - 1, 1, 1], 9.0) is budget
    assert Pace(0.25).follow(budget, [64], 0.0) is budget
    assert Pace(0.25).follow(budget, [1] * 64, 9.0) is budget, "decodes alone"


def test_decodes_take_their_part_of_the_time():
    budget, pace = budget_of(512, beside_decodes=16), Pace(0.25)
    for _ in range(20):
        rows = [1] * 100 + [budget.beside_decodes]
        budget = pace.follow(budget, rows, 0.001 * sum(rows))
    assert abs(budget.beside_decodes + 100 - 250) <= 150 / 7
    assert pace.follow(budget, [250], 0.25) is budget, "prompts alone do not say that nobody will decode"
    crowded = pace.follow(budget, [1] * 300 + [100], 0.4)
    assert crowded.beside_decodes == FEWEST
