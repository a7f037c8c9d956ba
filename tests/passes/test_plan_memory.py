"""place against check_memory, and check_memory against a simulation in which any operation may be slow."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.test_schedule_streams import random_case, started_without
from xllm.errors import CompileError
from xllm.passes.plan_memory import ALIGN_BYTES, Arena, Value, check_memory, find_conflicts, place
from xllm.passes.schedule_streams import Schedule
from xllm.targets.base import Extent

BUCKETS = ({"T": 1, "S": 1}, {"T": 8, "S": 2}, {"T": 64, "S": 4})


def random_values(rng: random.Random) -> tuple[list[Value], Schedule]:
    """Values made by the operations of a random schedule and read by operations that depend on their makers."""
    graph, schedule = random_case(rng)
    values = []
    for maker in graph.nodes:
        readers = list(graph.successors(maker))
        for part in range(rng.choice((1, 1, 1, 2))):
            used = tuple(rng.sample(readers, rng.randint(0, len(readers))))
            size = Extent.of(rng.choice((4, 64, 500)), T=rng.choice((0, 4, 40, 256)), S=rng.choice((0, 12)))
            values.append(Value(f"{maker}.{part}", size, maker, used, kept=rng.random() < 0.1))
    return values, schedule


def accepted(values: list[Value], schedule: Schedule, arena: Arena) -> bool:
    try:
        check_memory(values, schedule, arena)
    except CompileError as error:
        assert error.code == "broken-plan"
        return False
    return True


def is_safe(values: list[Value], schedule: Schedule, arena: Arena) -> bool:
    """No two values that may be needed at once share a byte, whichever operation is slow."""
    spans = {v.name: (arena.offsets[v.name], arena.offsets[v.name] + v.bytes.at(arena.sizes)) for v in values}
    if any(start % ALIGN_BYTES or start < 0 or stop > arena.bytes for start, stop in spans.values()):
        return False

    def over_before(one: Value, other: Value) -> bool:
        touching = {one.made_by, *one.used_by}
        return not one.kept and all(other.made_by not in started_without(schedule, slow) for slow in touching)

    for index, one in enumerate(values):
        for other in values[:index]:
            (start, stop), (other_start, other_stop) = spans[one.name], spans[other.name]
            overlap = start < other_stop and other_start < stop
            if overlap and not over_before(one, other) and not over_before(other, one):
                return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_arenas_are_safe_and_no_larger_than_the_sum(seed: int) -> None:
    values, schedule = random_values(random.Random(seed))
    conflicts = find_conflicts(values, schedule)
    arenas = [place(values, conflicts, sizes) for sizes in BUCKETS]
    for arena in arenas:
        check_memory(values, schedule, arena)
        assert is_safe(values, schedule, arena)
        sizes = [-(-value.bytes.at(arena.sizes) // ALIGN_BYTES) * ALIGN_BYTES for value in values]
        assert max(sizes) <= arena.bytes <= sum(sizes)
        assert set(arena.offsets) == {value.name for value in values}


def test_a_chain_needs_two_places_however_long_it_is() -> None:
    names = [str(index) for index in range(20)]
    schedule = Schedule(tuple(names), dict.fromkeys(names, "compute"), {}, 0.0)
    values = [Value(name, Extent.of(T=64), name, (after,)) for name, after in pairwise(names)]
    arena = place(values, find_conflicts(values, schedule), BUCKETS[1])
    assert arena.bytes == 2 * 512


def test_values_of_concurrent_streams_stay_apart() -> None:
    schedule = Schedule(("a", "b"), {"a": "x", "b": "y"}, {}, 0.0)
    values = [Value("va", Extent.of(64), "a", ()), Value("vb", Extent.of(64), "b", ())]
    conflicts = find_conflicts(values, schedule)
    assert conflicts == [[1], [0]]
    assert not accepted(values, schedule, Arena(BUCKETS[0], 64, {"va": 0, "vb": 0}))
    in_order = replace(schedule, waits={"b": ("a",)})
    assert accepted(values, in_order, Arena(BUCKETS[0], 64, {"va": 0, "vb": 0}))
    kept = [replace(values[0], kept=True), values[1]]
    assert not accepted(kept, in_order, Arena(BUCKETS[0], 64, {"va": 0, "vb": 0}))


def test_no_broken_arena_is_accepted_and_no_sound_one_refused(mutations: int) -> None:
    rng = random.Random(5)
    broken = 0
    for _ in range(mutations // 10):
        values, schedule = random_values(rng)
        arena = place(values, find_conflicts(values, schedule), rng.choice(BUCKETS))
        for _ in range(10):
            offsets = dict(arena.offsets)
            name, other = rng.choice(sorted(offsets)), rng.choice(sorted(offsets))
            match rng.randrange(4):
                case 0:
                    offsets[name] = offsets[other]
                case 1:
                    offsets[name] = rng.randrange(0, arena.bytes + 64, ALIGN_BYTES)
                case 2:
                    offsets[name], offsets[other] = offsets[other], offsets[name]
                case _:
                    offsets[name] += rng.choice((-ALIGN_BYTES, ALIGN_BYTES, 8))
            changed = replace(arena, offsets=offsets)
            sound = is_safe(values, schedule, changed)
            assert accepted(values, schedule, changed) == sound, (values, schedule, changed)
            broken += not sound
    assert broken > mutations // 10


@pytest.mark.parametrize("offset", [-64, 1, 64])
def test_a_value_outside_the_arena_is_refused(offset: int) -> None:
    schedule = Schedule(("a",), {"a": "x"}, {}, 0.0)
    values = [Value("v", Extent.of(64), "a", ())]
    assert not accepted(values, schedule, Arena(BUCKETS[0], 64, {"v": offset}))
