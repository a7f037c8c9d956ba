"""A compiled plan on several streams, broken in every way that moves bytes or time: the checkers refuse each one, or it
changed nothing that matters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from tests.passes.test_plan_memory import is_safe as keeps_values_apart
from tests.passes.test_schedule_streams import started_without
from tests.passes.zoo import rewritten
from tests.test_plan import with_places
from xllm.frontend.stamp import stamp
from xllm.ir import Program
from xllm.passes import PLANS, Context, run_pipeline
from xllm.passes.emit import emit_plan
from xllm.passes.plan_memory import Arena, Value
from xllm.passes.schedule_streams import Schedule
from xllm.plan import Plan, references
from xllm.targets.base import Operation
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.bounds import check_bounds

VOCAB, MAX_LEN = 64, 64


class Spread(CpuTarget):
    """Writes of the state, away from its readers, and every third other operation go to the second stream."""

    def stream_of(self, operation: Operation) -> str:
        if operation.op in ("xllm.rope", "xllm.attention"):
            return "compute"
        return "host" if operation.op == "xllm.kv_write" or sum(operation.node.encode()) % 3 == 0 else "compute"


def before_write_is_fused() -> Program:
    stages, records = rewritten("qwen2")
    return stages[next(index for index, record in enumerate(records) if record.name == "fuse-qk-norm-rope")]


@cache
def compiled(weights: str = "float32") -> Plan:
    """Two layers without the fused write, so that state is ordered by nothing but its own dependence."""
    program = stamp(before_write_is_fused())
    program, _ = run_pipeline(program, PLANS, Context(Spread("x86-64-v3"), weights, weights))
    return with_places(emit_plan(program))


def accepted(raw: dict[str, Any]) -> Plan | None:
    try:
        plan = Plan.from_json(json.dumps(raw))
        plan.check()
        check_bounds(plan, VOCAB, MAX_LEN)
    except ValueError:
        return None
    return plan


def is_safe(plan: Plan) -> bool:
    """Simulated with any one call arbitrarily slow: what a call reads was written, and is not written over, before."""
    names = [call.node for call in plan.calls]
    waits = {call.node: tuple(names[other] for other in call.after) for call in plan.calls if call.after}
    schedule = Schedule(tuple(names), {call.node: call.stream for call in plan.calls}, waits, 0.0)
    writer = {reference: call.node for call in plan.calls for reference in call.results}
    readers: dict[str, list[str]] = {}
    pairs = []
    for call in plan.calls:
        for reference in set(references(call)) - set(call.results):
            if reference[0] == "%":
                pairs.append((writer[reference], call.node))
                readers.setdefault(reference, []).append(call.node)
    state: dict[int, list[str]] = {}
    for call in plan.calls:
        if "layer_offset" in call.ints:
            state.setdefault(call.ints["layer_offset"], []).append(call.node)
    pairs += [pair for calls in state.values() for pair in pairwise(calls)]
    late = {slow: started_without(schedule, slow) for slow in {before for before, _ in pairs}}
    if any(after in late[before] for before, after in pairs):
        return False
    values = [
        Value(name, buffer.bytes, writer["%" + name], tuple(readers.get("%" + name, ())), kept=name == plan.result)
        for name, buffer in plan.buffers.items()
    ]
    return all(
        keeps_values_apart(values, schedule, Arena(bucket.sizes, bucket.arena_bytes, bucket.offsets))
        for bucket in plan.buckets
    )


Mutation = Callable[[dict[str, Any], random.Random], bool]  # whether it must be refused, whatever a simulation says


def move_buffer(raw: dict[str, Any], rng: random.Random) -> bool:
    offsets = rng.choice(raw["buckets"])["offsets"]
    name, other = rng.sample(sorted(offsets), 2)
    offsets[name] = rng.choice((offsets[other], offsets[other] + 64, offsets[name] + 64, max(offsets[name] - 64, 0)))
    return False


def misalign_buffer(raw: dict[str, Any], rng: random.Random) -> bool:
    offsets = rng.choice(raw["buckets"])["offsets"]
    offsets[rng.choice(sorted(offsets))] += rng.choice((1, 4, -4, 8))
    return True


def swap_stream(raw: dict[str, Any], rng: random.Random) -> bool:
    call = rng.choice(raw["calls"])
    call["stream"] = {"host": "compute", "compute": "host"}[call["stream"]]
    return False


def drop_wait(raw: dict[str, Any], rng: random.Random) -> bool:
    call = rng.choice([call for call in raw["calls"] if call["after"]])
    call["after"].remove(rng.choice(call["after"]))
    return True  # the scheduler makes no wait that is not needed


def drop_state_wait(raw: dict[str, Any], rng: random.Random) -> bool:
    """With every value in bytes of its own, only the state itself says that its reader must wait."""
    for bucket in raw["buckets"]:
        at = 0
        for name in sorted(bucket["offsets"]):
            bucket["offsets"][name] = at
            terms = raw["buffers"][name]["bytes"]["terms"]
            at += -(-sum(size * bucket["sizes"].get(dim, 1) for dim, size in terms.items()) // 64) * 64
        bucket["arena_bytes"] = at
    call = rng.choice([call for call in raw["calls"] if call["kernel"].startswith("attention.")])
    assert call["after"], "the scheduler lets it wait for the write"
    call["after"].clear()
    return True


def redirect_wait(raw: dict[str, Any], rng: random.Random) -> bool:
    call = rng.choice([call for call in raw["calls"] if call["after"]])
    call["after"][rng.randrange(len(call["after"]))] = rng.randrange(len(raw["calls"]))
    return False


def shrink_buffer(raw: dict[str, Any], rng: random.Random) -> bool:
    """One row element less, in shape and bytes alike: a kernel would reach beyond it."""
    buffer = raw["buffers"][rng.choice(sorted(raw["buffers"]))]
    width = buffer["shape"][-1]
    buffer["shape"][-1] = width - 1
    buffer["bytes"]["terms"] = {dim: size // width * (width - 1) for dim, size in buffer["bytes"]["terms"].items()}
    return True


def is_size(name: str, ints: dict[str, int]) -> bool:
    """Whether a kernel reaches further when this int grows. A stride of an axis of one index is never stepped, an axis
    without strides stays where it is, and a view that begins later may still end inside."""
    axis = name[-1]
    if "scaled" in ints and axis.isdigit():
        moves = any(ints.get(f"{view}_{axis}") for view in ("x", "a", "b", "out"))
        return moves if name == f"n{axis}" else ints[f"n{axis}"] > 1
    return name not in ("interleaved", "window", "layer_offset", "group_bytes", "scaled", "offset")


def grow_size(raw: dict[str, Any], rng: random.Random) -> bool:
    call = rng.choice([call for call in raw["calls"] if call["ints"]])
    names = [name for name in call["ints"] if is_size(name, call["ints"])]
    call["ints"][rng.choice(names)] += rng.choice((16, 64, 1 << 20))
    return True


def alias_results(raw: dict[str, Any], rng: random.Random) -> bool:
    one, other = rng.sample([call for call in raw["calls"] if call["results"] and call["kernel"] != "torch"], 2)
    output = next(name for name, reference in one["args"].items() if reference == one["results"][0])
    one["results"][0] = one["args"][output] = other["results"][0]
    return True


def swap_calls(raw: dict[str, Any], rng: random.Random) -> bool:
    one, other = rng.sample(range(len(raw["calls"])), 2)
    raw["calls"][one], raw["calls"][other] = raw["calls"][other], raw["calls"][one]
    return False


def move_weight(raw: dict[str, Any], rng: random.Random) -> bool:
    one, other = rng.sample(sorted(raw["weights"]), 2)
    raw["weights"][one]["offset"] = raw["weights"][other]["offset"]
    return True


MUTATIONS: tuple[Mutation, ...] = (
    move_buffer, misalign_buffer, swap_stream, drop_wait, drop_state_wait, redirect_wait, shrink_buffer, grow_size,
    alias_results, swap_calls, move_weight,
)  # fmt: skip


def test_the_plan_uses_both_streams_and_is_sound() -> None:
    plan = compiled()
    assert plan.streams == ("compute", "host") and any(call.after for call in plan.calls)
    assert accepted(json.loads(plan.to_json())) is not None and is_safe(plan)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_no_broken_plan_is_accepted(mutate: Mutation, mutations: int) -> None:
    rng, text = random.Random(mutate.__name__), compiled().to_json()
    tried = max(mutations // len(MUTATIONS), 10)
    refused = 0
    for _ in range(tried):
        raw = json.loads(text)
        hopeless = mutate(raw, rng)
        if raw == json.loads(text):
            continue
        plan = accepted(raw)
        refused += plan is None
        assert plan is None or (not hopeless and is_safe(plan)), (mutate.__name__, raw)
    assert refused > tried // 10


@pytest.mark.parametrize("weights", ["float32", "int8.row", "int4.32"])
def test_whatever_the_ints_of_a_call_are_the_check_says_so(weights: str) -> None:
    """Sizes of nothing, below it and beyond memory: an error of the plan, never another."""
    text = compiled(weights).to_json()
    refused = tried = 0
    kinds = {call["kernel"]: index for index, call in enumerate(json.loads(text)["calls"])}
    for index in kinds.values():
        for name in json.loads(text)["calls"][index]["ints"]:
            for value in (0, -1, 33, 1 << 62):
                raw = json.loads(text)
                raw["calls"][index]["ints"][name] = value
                tried += 1
                refused += accepted(raw) is None
    assert refused > tried // 2
