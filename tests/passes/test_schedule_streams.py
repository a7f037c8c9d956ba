"""schedule_graph against check_schedule, and check_schedule against a simulation in which any operation may be slow."""

from __future__ import annotations

import random
from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.zoo import planned
from xllm.errors import CompileError
from xllm.passes.schedule_streams import Schedule, check_schedule, dependences, schedule_graph

Case = tuple[nx.DiGraph, dict[str, float], dict[str, str]]


@st.composite
def graphs(draw: st.DrawFn) -> Case:
    """A dependence graph, seconds and streams: up to 14 operations on one to three streams."""
    size, lanes = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    names = [f"op{index}" for index in range(size)]
    graph = nx.DiGraph()
    graph.add_nodes_from(draw(st.permutations(names)))
    for after in range(size):
        for before in draw(st.sets(st.integers(0, after - 1), max_size=3)) if after else ():
            graph.add_edge(names[before], names[after])
    seconds = {name: draw(st.sampled_from((0.0, 1.0, 2.5, 7.0))) for name in names}
    stream = {name: f"stream{draw(st.integers(0, lanes - 1))}" for name in names}
    return graph, seconds, stream


def accepted(graph: nx.DiGraph, schedule: Schedule) -> bool:
    try:
        check_schedule(graph, schedule)
    except CompileError as error:
        assert error.code == "broken-plan"
        return False
    return True


def started_without(schedule: Schedule, frozen: str) -> set[str]:
    """The operations that start although `frozen` never finishes. Streams run their own operations in order."""
    queues: dict[str, list[str]] = {}
    for name in schedule.order:
        queues.setdefault(schedule.stream[name], []).append(name)
    started: set[str] = set()
    finished: set[str] = set()
    moved = True
    while moved:
        moved = False
        for queue in queues.values():
            while queue and finished.issuperset(schedule.waits.get(queue[0], ())):
                started.add(queue[0])
                moved = True
                if queue[0] == frozen:
                    queue.clear()
                    break
                finished.add(queue.pop(0))
    return started


def is_safe(graph: nx.DiGraph, schedule: Schedule) -> bool:
    """No operation starts before one it depends on has finished, however slow that one is, and all can finish."""
    if started_without(schedule, "") != set(graph.nodes):
        return False
    return all(after not in started_without(schedule, before) for before, after in graph.edges)


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_schedules_are_safe_and_no_longer_than_one_stream(
    case: Case,
) -> None:
    graph, seconds, stream = case
    schedule = schedule_graph(graph, seconds, stream)
    check_schedule(graph, schedule)
    assert is_safe(graph, schedule)
    loads = {lane: sum(seconds[name] for name in stream if stream[name] == lane) for lane in stream.values()}
    longest: dict[str, float] = {}
    for name in nx.topological_sort(graph):
        longest[name] = seconds[name] + max((longest[before] for before in graph.predecessors(name)), default=0.0)
    assert max((*loads.values(), *longest.values())) <= schedule.makespan <= sum(seconds.values())
    if len(loads) == 1:
        assert not schedule.waits
        assert schedule.order == tuple(nx.lexicographical_topological_sort(graph, key=list(graph.nodes).index))


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_every_wait_is_needed(case: Case) -> None:
    """A wait costs an event on a device: dropping any one of them breaks a dependence."""
    graph, seconds, stream = case
    schedule = schedule_graph(graph, seconds, stream)
    for name, others in schedule.waits.items():
        for other in others:
            fewer = {**schedule.waits, name: tuple(item for item in others if item != other)}
            assert not accepted(graph, replace(schedule, waits=fewer))


def random_case(rng: random.Random) -> tuple[nx.DiGraph, Schedule]:
    size, lanes = rng.randint(2, 12), rng.randint(1, 3)
    graph = nx.DiGraph()
    graph.add_nodes_from(str(index) for index in range(size))
    for after in range(1, size):
        for before in rng.sample(range(after), min(after, rng.randint(0, 3))):
            graph.add_edge(str(before), str(after))
    seconds = {name: rng.choice((0.0, 1.0, 3.0)) for name in graph.nodes}
    stream = {name: str(rng.randrange(lanes)) for name in graph.nodes}
    return graph, schedule_graph(graph, seconds, stream)


def mutated(rng: random.Random, schedule: Schedule) -> Schedule:
    """One change that may or may not matter."""
    order, stream, waits = list(schedule.order), dict(schedule.stream), dict(schedule.waits)
    name, other = rng.sample(order, 2)
    match rng.randrange(8):
        case 0 if waits:
            waits.pop(rng.choice(sorted(waits)))
        case 1:
            one, two = order.index(name), order.index(other)
            order[one], order[two] = order[two], order[one]
        case 2:
            stream[name] = stream[other]
        case 3:
            waits[name] = (other,)
        case 4:
            order.remove(name)
        case 5:
            order[order.index(name)] = other
        case 6 if waits:
            key = rng.choice(sorted(waits))
            waits[key] = (*waits[key][1:], other)
        case _:
            order.append(order.pop(order.index(name)))
    return Schedule(tuple(order), stream, waits, schedule.makespan)


def test_no_broken_schedule_is_accepted_and_no_sound_one_refused(mutations: int) -> None:
    rng = random.Random(11)
    broken = 0
    for _ in range(mutations // 10):
        graph, schedule = random_case(rng)
        for _ in range(10):
            other = mutated(rng, schedule)
            complete = sorted(other.order) == sorted(graph.nodes)
            place = {name: index for index, name in enumerate(other.order)}
            # A wait for something that comes later is refused although streams might still get through it.
            forward = complete and all(place[o] < place[n] for n, others in other.waits.items() for o in others)
            sound = forward and is_safe(graph, other)
            assert accepted(graph, other) == sound, (graph.edges, other)
            broken += not sound
    assert broken > mutations // 4


@pytest.mark.parametrize(
    "change",
    [
        {"order": ("a",)},
        {"order": ("a", "a")},
        {"stream": {"a": "x"}},
        {"stream": {"a": "x", "b": "x", "c": "x"}},
        {"waits": {"b": ("nobody",)}},
        {"waits": {"nobody": ("a",)}},
        {"waits": {"a": ("a",)}},
        {"waits": {"a": ("b",)}},
    ],
)
def test_malformed_schedules_are_refused(change: dict[str, object]) -> None:
    graph = nx.DiGraph([("a", "b")])
    schedule = schedule_graph(graph, {"a": 1.0, "b": 1.0}, {"a": "x", "b": "y"})
    assert accepted(graph, schedule)
    assert not accepted(graph, replace(schedule, **change))  # pyright: ignore[reportArgumentType]


def test_a_layers_state_is_written_before_it_is_read_and_layers_are_apart() -> None:
    program, _ = planned("qwen3")
    graph = dependences(program)
    writes = [f"layers_{layer}_self_attn_qk_norm_rope_write" for layer in range(3)]
    reads = [f"layers_{layer}_self_attn_attention" for layer in range(3)]
    for index, read in enumerate(reads):
        assert [write for write in writes if graph.has_edge(write, read)] == [writes[index]]
