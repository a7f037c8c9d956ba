"""Places every operation on a stream of the target and in an order, so that what is independent may overlap.

Adds `plans["streams"]`: order, stream of each node, and for each node the nodes of other streams it waits for. List
scheduling by longest remaining path under the target's predicted times; with one stream the program's own order stands.
`check_schedule` did not make the schedule: it replays it and looks for a dependence nothing enforces.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import networkx as nx
import torch.fx as fx

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.ir.effects import effects, named_arguments
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.operations import is_alias
from xllm.targets.base import StepSizes


@dataclass(frozen=True)
class Schedule:
    """`order` of node names; `stream` of each; `waits`: nodes of other streams that must have finished before.

    makespan: seconds the step takes under the target's predictions.
    """

    order: tuple[str, ...]
    stream: Mapping[str, str]
    waits: Mapping[str, tuple[str, ...]]
    makespan: float


@dataclass(frozen=True)
class ScheduleStreams(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "plan"

    def run(self, program: Program, context: Context) -> Outcome:
        choices = program.plans["kernels"]
        largest = program.plans["buckets"].sizes[-1]
        sizes = {dim.name: size for dim, size in zip(program.dims, largest, strict=True)}
        sizes = sizes if program.is_function else StepSizes.usual(sizes["T"], sizes["S"])
        graph = dependences(program)
        lowered = {name: choice.lowering for name, choice in choices.items()}
        seconds = {name: context.target.seconds(low.cost, sizes, low.kernel) for name, low in lowered.items()}
        stream = {name: context.target.stream_of(choice.operation) for name, choice in choices.items()}
        if unknown := set(stream.values()) - set(context.target.streams):
            raise CompileError(
                f"target {context.target.name} places work on stream {min(unknown)!r}, which it does not have",
                code="broken-target",
                pass_name=self.name(),
            )
        schedule = schedule_graph(graph, seconds, stream)
        check_schedule(graph, schedule)
        program.plans["streams"] = schedule
        return Outcome(program, tuple(sorted(set(stream.values()))))


def dependences(program: Program) -> nx.DiGraph:
    """Which call must wait for which: through values, and through state (a layer's KV is written, then read)."""
    graph = nx.DiGraph()
    states = program.states()
    touched: list[tuple[str, bool, object]] = []
    for node in program.calls():
        if is_alias(node) or node.name not in program.plans["kernels"]:
            continue
        graph.add_node(node.name)
        for source in node.all_input_nodes:
            if (maker := _maker(source)) is not None and maker.name in program.plans["kernels"]:
                graph.add_edge(maker.name, node.name)
        found = effects(node, states)
        if found.reads or found.writes:
            layer = named_arguments(node).get("layer")  # None: all layers
            for name, wrote, other in touched:
                if (wrote or found.writes) and (layer is None or other is None or layer == other):
                    graph.add_edge(name, node.name)
            touched.append((node.name, bool(found.writes), layer))
    return graph


def _maker(node: fx.Node) -> fx.Node | None:
    """The call that makes the bytes of a value; None for inputs and weights."""
    while node.op == "call_function" and is_alias(node):
        node = arguments(node)[0]
    return node if node.op == "call_function" else None


def schedule_graph(graph: nx.DiGraph, seconds: Mapping[str, float], stream: Mapping[str, str]) -> Schedule:
    """List scheduling of a dependence graph whose nodes have a time and a stream. Node order in `graph` breaks ties."""
    place = {name: index for index, name in enumerate(graph.nodes)}
    rest: dict[str, float] = {}
    for name in reversed(list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))):
        rest[name] = seconds[name] + max((rest[after] for after in graph.successors(name)), default=0.0)
    one_stream = len(set(stream.values())) <= 1
    missing = {name: graph.in_degree(name) for name in graph.nodes}
    ready = [(0 if one_stream else -rest[name], place[name], name) for name in graph.nodes if not missing[name]]
    heapq.heapify(ready)
    free: dict[str, float] = {}
    done: dict[str, float] = {}
    order: list[str] = []
    while ready:
        _, _, name = heapq.heappop(ready)
        start = max([free.get(stream[name], 0.0), *(done[before] for before in graph.predecessors(name))])
        done[name] = free[stream[name]] = start + seconds[name]
        order.append(name)
        for after in graph.successors(name):
            missing[after] -= 1
            if not missing[after]:
                heapq.heappush(ready, (0 if one_stream else -rest[after], place[after], after))
    waits = _waits(graph, order, stream)
    return Schedule(tuple(order), dict(stream), waits, max(done.values(), default=0.0))


def _waits(graph: nx.DiGraph, order: list[str], stream: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The fewest waits: only for what the stream, or another wait, does not imply."""
    place = {name: at for at, name in enumerate(order)}
    count: dict[str, int] = {}
    index: dict[str, int] = {}
    for name in order:
        index[name] = count.get(stream[name], 0)
        count[stream[name]] = index[name] + 1
    seen: dict[str, dict[str, int]] = {}
    clock: dict[str, dict[str, int]] = {lane: {} for lane in set(stream.values())}
    waits: dict[str, tuple[str, ...]] = {}
    for name in order:
        lane = stream[name]
        needed = []
        # The latest first: what it waited for itself need not be waited for again.
        for before in sorted(graph.predecessors(name), key=place.__getitem__, reverse=True):
            if index[before] > clock[lane].get(stream[before], -1):
                needed.insert(0, before)
                for other, reached in seen[before].items():
                    clock[lane][other] = max(clock[lane].get(other, -1), reached)
        if needed:
            waits[name] = tuple(needed)
        clock[lane][lane] = index[name]
        seen[name] = dict(clock[lane])
    return waits


def happens_before(schedule: Schedule) -> dict[str, int]:
    """For each node, the set (as a bit mask over the order) of nodes that have certainly finished when it starts.

    A stream runs its nodes in order, one at a time; a node starts when those it waits for have finished.
    """
    bit = {name: 1 << index for index, name in enumerate(schedule.order)}
    last: dict[str, str] = {}
    before: dict[str, int] = {}
    for name in schedule.order:
        lane = schedule.stream[name]
        mask = 0
        for earlier in (*schedule.waits.get(name, ()), *([last[lane]] if lane in last else [])):
            mask |= before[earlier] | bit[earlier]
        before[name] = mask
        last[lane] = name
    return before


def check_schedule(graph: nx.DiGraph, schedule: Schedule) -> None:
    """Raises CompileError naming a dependence the schedule does not enforce, or a node it lost, doubled or made up."""
    if sorted(schedule.order) != sorted(graph.nodes) or set(schedule.stream) != set(graph.nodes):
        raise _broken("the schedule loses, repeats or makes up operations")
    place = {name: index for index, name in enumerate(schedule.order)}
    for name, others in schedule.waits.items():
        for other in others:
            if name not in place or other not in place:
                raise _broken(f"{name} waits for {other}, but both must be operations of the schedule")
            if place[other] >= place[name]:
                raise _broken(f"{name} waits for {other}, which does not come before it")
    before = happens_before(schedule)
    for source, after in graph.edges:
        if not before[after] >> place[source] & 1:
            raise _broken(f"{after} may start before {source} has finished")


def _broken(why: str) -> CompileError:
    return CompileError(why, code="broken-plan", pass_name="schedule-streams")
