"""Models that share the cores: each gets its share of the time, however long steps are; in virtual time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from itertools import pairwise

import pytest

from xllm.targets.turns import GRACE_SECONDS, Line, Turn, Turns


@dataclass
class Load:
    """A model that computes step after step. step, gap: seconds of a step, and from its end to the next; begins, ends:
    when it has work."""

    step: float
    gap: float = 0.0
    begins: float = 0.0
    ends: float = float("inf")


def simulate(loads: list[Load], seconds: float) -> list[list[tuple[float, float]]]:
    """When each model's steps ran: (asked, began)."""
    turns, line = Turns(), Line()
    members = [Turn(turns) for _ in loads]
    at: list[float] = [load.begins for load in loads]  # when each asks next
    asked, now, over = [0.0] * len(loads), 0.0, float("inf")
    steps: list[list[tuple[float, float]]] = [[] for _ in loads]
    while now < seconds:
        for index, member in enumerate(members):
            if at[index] <= now:
                line.ask(member, now)
                asked[index], at[index] = now, float("inf")
        waits = {index: line.wait(member, now) for index, member in enumerate(members) if member in line.waiting}
        first = next((index for index, wait in waits.items() if wait == 0), None)
        if first is not None:
            line.begin(members[first], now)
            over = now + loads[first].step
            steps[first].append((asked[first], now))
            continue
        now = min([over, *at, *[now + wait for wait in waits.values() if wait]])
        if now == over and line.holder is not None:
            index = members.index(line.holder)
            line.end(line.holder, now)
            over, at[index] = float("inf"), now + loads[index].gap if now < loads[index].ends else float("inf")
    return steps


def share(steps: list[tuple[float, float]], step: float, seconds: float) -> float:
    return len(steps) * step / seconds


def test_a_model_of_long_steps_takes_no_more_than_its_half():
    """Prompts without end, in chunks, beside one that decodes: by turns alone it would get a sixteenth."""
    chunks, decodes = simulate([Load(0.150), Load(0.010, gap=0.0005)], 60)
    assert share(decodes, 0.010, 60) == pytest.approx(0.47, abs=0.03)
    assert share(chunks, 0.150, 60) == pytest.approx(0.5, abs=0.03)
    assert max(began - asked for asked, began in chunks) < 0.150 * 1.2


def test_of_three_each_has_a_third():
    loads = [Load(0.200), Load(0.020), Load(0.002)]
    found = simulate(loads, 60)
    for steps, load in zip(found, loads, strict=True):
        assert share(steps, load.step, 60) == pytest.approx(1 / 3, abs=0.02)


def test_equal_steps_alternate():
    first, second = simulate([Load(0.010, gap=0.0001), Load(0.010, gap=0.0001)], 10)
    assert abs(len(first) - len(second)) <= 1 and len(first) + len(second) > 980


def test_who_was_away_has_saved_nothing_up():
    """It goes next, and no more than its share after that."""
    busy, late = simulate([Load(0.050), Load(0.050, begins=30)], 40)
    assert late[0][1] - late[0][0] <= 0.050
    assert sum(began >= 30 for _, began in busy) == pytest.approx(100, abs=3)


def test_who_comes_when_nobody_computes_has_saved_nothing_up_either():
    """The other one comes back right after it, and is not behind by all that it ever had."""
    line, busy, late = Line(), *(Turn(Turns()) for _ in range(2))
    for turn, began, ended in ((busy, 0, 30), (late, 31, 32)):
        line.ask(turn, began)
        line.begin(turn, began)
        if turn is late:
            line.ask(busy, 31.5)
        line.end(turn, ended)
    line.ask(late, 32.001)
    assert line.wait(busy, 32.001) == 0


def test_rare_requests_wait_for_one_step_at_most():
    rare = simulate([Load(0.100), Load(0.005, gap=0.333)], 60)[1]
    assert max(began - asked for asked, began in rare) <= 0.100 + 1e-9


def test_nobody_waits_long_for_one_that_has_gone():
    [steps, _] = simulate([Load(0.100), Load(0.010, ends=1)], 60)
    assert share(steps, 0.100, 60) > 0.98
    later = [began for _, began in steps if began > 1.2]
    assert max(b - a for a, b in pairwise(later)) < 0.100 + GRACE_SECONDS


def test_one_step_runs_at_a_time_and_all_end():
    """The same with threads: none is forgotten while it waits."""
    turns, running, most, done = Turns(), 0, 0, [0] * 4

    def work(index: int) -> None:
        nonlocal running, most
        turn = turns.join()
        for _ in range(100):
            with turn:
                running += 1
                most = max(most, running)
                time.sleep(0.0001 * (index + 1))
                running -= 1
            done[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, done) == (1, [100] * 4)
