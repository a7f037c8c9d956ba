"""Gives every value an address in one arena. Two values share bytes only if, under the schedule, every use of one has
finished before the other is made.

Adds `plans["memory"]`: per bucket the offset of each value. The largest bucket is planned first and the others must
fit inside its arena, so memory is max over shapes, not their sum. Largest values are placed first, each at the lowest
offset that no conflicting value covers. `check_memory` did not make the plan: it recomputes lifetimes and looks for an
overlap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.operations import Reader, bytes_of, is_alias
from xllm.passes.schedule_streams import Schedule, happens_before
from xllm.targets.base import Extent

ALIGN_BYTES = 64


@dataclass(frozen=True)
class Value:
    """Something that needs bytes: made by one call, read by others, kept to the end if it is a result of the program.

    made_by is empty for the inputs of a function, which are there before the first call.
    """

    name: str
    bytes: Extent
    made_by: str
    used_by: tuple[str, ...]
    kept: bool = False


@dataclass(frozen=True)
class Arena:
    """One bucket's addresses."""

    sizes: Mapping[str, int]
    bytes: int
    offsets: Mapping[str, int]


@dataclass(frozen=True)
class PlanMemory(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "plan"

    def run(self, program: Program, context: Context) -> Outcome:
        schedule: Schedule = program.plans["streams"]
        values = find_values(program)
        conflicts = find_conflicts(values, schedule)
        arenas: list[Arena] = []
        names = [dim.name for dim in program.dims]
        for sizes in reversed(program.plans["buckets"].sizes):
            arena = place(values, conflicts, dict(zip(names, sizes, strict=True)))
            check_memory(values, schedule, arena)
            arenas.insert(0, arena)
        if any(arena.bytes > arenas[-1].bytes for arena in arenas):
            raise CompileError("a smaller bucket needs a larger arena", code="broken-plan", pass_name=self.name())
        program.plans["memory"] = tuple(arenas)
        return Outcome(program, tuple(value.name for value in values))


def find_values(program: Program) -> list[Value]:
    """Every value of the program with its maker and its readers, views resolved."""
    reader = Reader(program)
    kept = {reader.owner(node) for node in program.output().all_input_nodes}
    makers: dict[str, tuple[Extent, str]] = {}
    users: dict[str, list[str]] = {}
    for node in program.inputs() if program.is_function else ():
        makers[node.name] = (bytes_of(reader.tensor(node)), "")
    for node in program.calls():
        if is_alias(node) or node.name not in program.plans["kernels"]:
            continue
        for result in (*reader.results(node), *program.plans["kernels"][node.name].lowering.scratch):
            makers[result.name] = (bytes_of(result), node.name)
        for source in node.all_input_nodes:
            if source.op == "call_function" or reader.owner(source) in makers:
                users.setdefault(reader.owner(source), []).append(node.name)
    return [
        Value(name, size, maker, tuple(users.get(name, ())), name in kept) for name, (size, maker) in makers.items()
    ]


def find_conflicts(values: list[Value], schedule: Schedule) -> list[list[int]]:
    """For each value, the indices of those it may not share bytes with."""
    before = {**happens_before(schedule), "": 0}
    bit = {"": 0, **{name: 1 << index for index, name in enumerate(schedule.order)}}
    needs = [_mask(value, bit) for value in values]

    def over(one: int, other: int) -> bool:
        """All of `one` has finished when `other` is made."""
        return values[other].made_by != "" and not values[one].kept and needs[one] & ~before[values[other].made_by] == 0

    conflicts: list[list[int]] = [[] for _ in values]
    held: list[int] = []
    in_order = len(set(schedule.stream.values())) == 1
    place_of = {"": -1, **{name: index for index, name in enumerate(schedule.order)}}
    for one in sorted(range(len(values)), key=lambda index: place_of[values[index].made_by]):
        alive = [other for other in held if not over(other, one)]
        for other in alive:
            conflicts[one].append(other)
            conflicts[other].append(one)
        # On one stream what is over stays over, so that the work is linear in the number of layers.
        held = [*(alive if in_order else held), one]
    return conflicts


def _mask(value: Value, bit: Mapping[str, int]) -> int:
    mask = bit[value.made_by]
    for user in value.used_by:
        mask |= bit[user]
    return mask


def place(values: list[Value], conflicts: list[list[int]], dims: Mapping[str, int]) -> Arena:
    """Greedy by size: each value at the lowest aligned offset free of conflicting values."""
    sizes = [-(-value.bytes.at(dims) // ALIGN_BYTES) * ALIGN_BYTES for value in values]
    offsets: dict[int, int] = {}
    for index in sorted(range(len(values)), key=lambda i: (-sizes[i], i)):
        placed = (other for other in conflicts[index] if other in offsets)
        taken = sorted((offsets[other], offsets[other] + sizes[other]) for other in placed)
        offset = 0
        for start, stop in taken:
            if offset + sizes[index] <= start:
                break
            offset = max(offset, stop)
        offsets[index] = offset
    total = max((offset + sizes[index] for index, offset in offsets.items()), default=0)
    return Arena(dims, total, {values[index].name: offset for index, offset in sorted(offsets.items())})


def check_memory(values: list[Value], schedule: Schedule, arena: Arena) -> None:
    """Replays the schedule: raises CompileError when bytes are reused while a value in them is still needed.

    Independent of `find_conflicts` and of where `place` looked: of two values that overlap in memory, the one made
    first must be dead (all its users happened before) when the other is made.
    """
    before = {**happens_before(schedule), "": 0}
    place_of = {"": -1, **{name: index for index, name in enumerate(schedule.order)}}
    in_order = len(set(schedule.stream.values())) == 1
    inside: list[tuple[int, int, Value, int]] = []  # what earlier calls left in the arena, and the calls it is for
    for value in sorted(values, key=lambda item: place_of[item.made_by]):
        start = arena.offsets[value.name]
        stop = start + value.bytes.at(arena.sizes)
        if start % ALIGN_BYTES or start < 0 or stop > arena.bytes:
            raise _broken(f"{value.name} lies at {start}..{stop} in an arena of {arena.bytes} bytes")
        finished, needed = before[value.made_by], []
        for span in inside:
            first = span[2]
            dead = value.made_by != "" and finished & span[3] == span[3]
            if first.kept or not dead:
                if span[0] < stop and start < span[1]:
                    raise _broken(f"{value.name} overwrites {first.name} before its last use")
                needed.append(span)
        # What is dead for one call of a stream is dead for those behind it; another stream may still come to it.
        users = sum(1 << place_of[user] for user in {value.made_by, *value.used_by} - {""})
        inside = [*(needed if in_order else inside), (start, stop, value, users)]


def _broken(why: str) -> CompileError:
    return CompileError(why, code="broken-plan", pass_name="plan-memory")
