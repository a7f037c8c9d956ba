"""Plans: the text gives the plan back, malformed text is refused by field, unsound plans by what is unsound."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.artifacts import small_plan
from tests.passes.zoo import FAMILIES, planned
from xllm.passes.emit import emit_plan
from xllm.plan import ALIGN_BYTES, Bucket, Plan
from xllm.targets.base import Extent
from xllm.targets.cpu.rules import stored_bytes


def with_places(plan: Plan) -> Plan:
    """Weights one after the other, as an artifact lays them out."""
    placed, at = {}, 0
    for key, weight in sorted(plan.weights.items()):
        size = weight.bytes or stored_bytes(weight.shape, weight.layout)
        placed[key] = replace(weight, offset=at, bytes=size)
        at += -(-size // ALIGN_BYTES) * ALIGN_BYTES
    return replace(plan, weights=placed)


@pytest.fixture
def plan() -> Plan:
    return with_places(small_plan())


def test_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    plan.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_plans_are_sound_and_round_trip(family: str) -> None:
    plan = with_places(planned(family)[1])
    plan.check()
    assert Plan.from_json(plan.to_json()) == plan


# --- malformed text ---------------------------------------------------------------------------------------------------


def at(raw: Any, path: str) -> tuple[Any, Any]:
    """The container and key that "calls.0.rows" leads to."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        raw = raw[part]
    return raw, last


FIELDS = (
    "calls", "calls.0.kernel", "calls.0.node", "calls.1.cost.flops.terms.T", "buffers.x.bytes", "buffers.x.dtype",
    "buckets.0.sizes", "buckets.1.arena_bytes", "buckets.1.offsets", "weights.norm.layout.form", "weights.norm.shape",
    "kv.group_bytes", "kv.layer_offsets", "result",
)  # fmt: skip


@pytest.mark.parametrize("path", [f for f in FIELDS if "cost" not in f])
def test_a_missing_field_is_named(plan: Plan, path: str) -> None:
    raw = json.loads(plan.to_json())
    holder, key = at(raw, path)
    del holder[key]
    with pytest.raises(ValueError, match=f"required field `{key}`"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("wrong", [None, 1.5, [[]], {"x": {}}], ids=["null", "fraction", "list", "object"])
def test_a_wrong_type_is_named(plan: Plan, path: str, wrong: object) -> None:
    raw = json.loads(plan.to_json())
    holder, key = at(raw, path)
    holder[key] = wrong
    with pytest.raises(ValueError, match=r"plan is malformed: .*\$\." + path.split(".")[0]):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("wrong", [[5], [["x", 7]], [["x"]], [[1, {}]], 7])
def test_what_is_no_operand_is_named(plan: Plan, wrong: object) -> None:
    raw = json.loads(plan.to_json())
    raw["calls"][3]["operands"] = wrong
    with pytest.raises(ValueError, match=r"plan is malformed: .*operands"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize("path", ["novelty", "calls.1.novelty", "buffers.x.bytes.u", "kv.novelty"])
def test_a_field_of_the_future_is_refused(plan: Plan, path: str) -> None:
    raw = json.loads(plan.to_json())
    holder, key = at(raw, path)
    holder[key] = 1
    with pytest.raises(ValueError, match=f"{key} says is unknown here"):
        Plan.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", "{}", '{"schema":1}', '{"schema":"2"}', "[" * 100000, b"\xff\xfe\x00"]
)
def test_what_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        Plan.from_json(text)


def test_numbers_json_cannot_spell_are_refused(plan: Plan) -> None:
    call = replace(plan.calls[1], floats={"eps": math.inf})
    with pytest.raises(ValueError):
        replace(plan, calls=(call,)).to_json()


# --- unsound plans ----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def put(path: str, value: Any) -> Change:
    def change(raw: dict[str, Any]) -> None:
        holder, key = at(raw, path)
        holder[key] = value

    change.__name__ = f"{path}={value}"
    return change


def swap_calls(raw: dict[str, Any]) -> None:
    raw["calls"][0], raw["calls"][1] = raw["calls"][1], raw["calls"][0]


def write_twice(raw: dict[str, Any]) -> None:
    raw["calls"].append(raw["calls"][0])


def drop_call(raw: dict[str, Any]) -> None:
    del raw["calls"][0]


def add_buffer(raw: dict[str, Any]) -> None:
    raw["buffers"]["y"] = raw["buffers"]["x"]
    for bucket in raw["buckets"]:
        bucket["offsets"]["y"] = 0


UNSOUND: list[tuple[Change, str]] = [
    (put("calls.0.args.ids", "$tokens"), "call embed refers to '\\$tokens', which does not exist"),
    (put("calls.0.args.weight", "@lost"), "call embed refers to '@lost'"),
    (put("calls.1.args.x", "%lost"), "call norm refers to '%lost'"),
    (put("calls.1.args.x", "x"), "call norm refers to 'x'"),
    (put("calls.3.operands.0.1.ref", "%lost"), "call head refers to '%lost'"),
    (
        put("calls.3.operands.0.1", {"list": [{"ref": "@lost", "shape": [], "dtype": "float32"}]}),
        "call head refers to '@lost'",
    ),
    (put("calls.3.operands.0.1", {}), "call head: self is no operand"),
    (put("calls.3.operands.0.1", {"ref": []}), "call head: self is no operand"),
    (put("calls.3.operands.0.1", {"list": [7]}), "call head: self is no operand: 7"),
    (put("calls.3.operands.0.1.shape", [[2]]), "call head: self is no operand"),
    (put("calls.3.operands.0.1.shape", [{"S": "2"}]), "call head: self is no operand"),
    (put("calls.1.results.0", "@norm"), "call norm writes '@norm'"),
    (put("calls.1.args.x", "%n"), "call norm reads 'n', which it writes"),
    (put("calls.1.args.out", "%x"), "call norm reads 'n', which it writes"),
    (put("calls.3.operands.0.1.ref", "%logits"), "call head reads 'logits', which it writes"),
    (put("calls.0.stream", "copy"), "call embed is on stream 'copy', which does not exist"),
    (put("calls.0.rows.terms", {"U": 1}), "call embed runs over"),
    (put("calls.0.rows.terms", {"T": -1}), "call embed has negative rows"),
    (put("calls.1.cost.flops.terms", {"X": 1}), "the cost of call norm depends on \\['X'\\]"),
    (put("calls.1.cost.bytes.terms", {"P²": 1}), "the cost of call norm depends on \\['P²'\\]"),
    (put("calls.1.cost.bytes.terms", {"P" + "9" * 5000: 1}), "the cost of call norm depends on"),
    (put("calls.1.after", [1]), "call norm waits for call 1, which does not come before it"),
    (put("calls.1.after", [-1]), "call norm waits for call -1"),
    (swap_calls, "call norm reads 'x' before it is written"),
    (write_twice, "call embed writes '%x' again"),
    (drop_call, "call norm reads 'x' before it is written"),
    (add_buffer, "buffer \\['y'\\] is never written"),
    (put("buckets", []), "buckets are \\[\\]"),
    (put("buckets.0.sizes.T", 0), "buckets are"),
    (put("buckets.0.sizes.T", 16), "do not grow"),
    (put("buckets.0.offsets", {"x": 0}), "bucket S=2, T=4 places other buffers"),
    (put("buckets.0.offsets.x", 8), "bucket S=2, T=4: buffer x lies at 8"),
    (put("buckets.0.offsets.x", -64), "bucket S=2, T=4: buffer x lies at -64"),
    (put("buckets.1.offsets.x", 960), "bucket S=2, T=16: buffer x lies at 960..1472 in an arena of 1024 bytes"),
    (put("buckets.1.arena_bytes", 1000), "bucket S=2, T=16: buffer n lies at"),
    (
        put("buckets.1.arena_bytes", 1 << 70),
        "bucket S=2, T=16: an arena of 1180591620717411303424 bytes, its buffers end",
    ),
    (put("buckets.1.offsets.n", 448), "bucket S=2, T=16: n overwrites x before its last use"),
    (put("buckets.0.offsets.logits", 0), "bucket S=2, T=4: logits overwrites r before its last use"),
    (put("buffers.x.bytes.terms.T", 31), "buffer x takes 128 bytes, 124 are planned"),
    (put("buffers.x.dtype", "float8"), "buffer x is of float8"),
    (put("result", "lost"), "result 'lost' is no \\[S, N\\]"),
    (put("result", "x"), "result 'x' is no \\[S, N\\]"),
    (put("kv.group_bytes", 0), "kv has groups of 0 bytes"),
    (put("kv.group_bytes", 2047), "layer_offsets leave their 2047 bytes"),
    (put("kv.layer_offsets", [2048, 0]), "layer_offsets do not grow"),
    (put("weights.norm.offset", 0), "overlaps weight"),
    (put("weights.norm.offset", 7), "not at a cache line"),
    (put("weights.norm.bytes", 0), "weight norm has 0 bytes"),
    (put("weights.norm.offset", -64), "weight norm has 32 bytes at -64"),
]


@pytest.mark.parametrize(("change", "why"), UNSOUND, ids=lambda part: getattr(part, "__name__", ""))
def test_unsound_plans_are_refused(plan: Plan, change: Change, why: str) -> None:
    raw = json.loads(plan.to_json())
    change(raw)
    with pytest.raises(ValueError, match=why):
        Plan.from_json(json.dumps(raw)).check()


def test_streams_are_checked_by_what_has_certainly_finished(plan: Plan) -> None:
    calls = list(plan.calls)
    calls[1] = replace(calls[1], stream="host")
    apart = replace(plan, calls=tuple(calls), streams=("compute", "host"))
    with pytest.raises(ValueError, match="call norm reads 'x' before it is written"):
        apart.check()
    calls[1] = replace(calls[1], after=(0,))
    calls[2] = replace(calls[2], after=(1,))
    replace(apart, calls=tuple(calls)).check()


def test_a_moved_buffer_is_refused_or_harmless(mutations: int) -> None:
    """Whatever offset a buffer of a compiled plan is given: a plan that is accepted keeps live values apart."""
    rng = random.Random(3)
    plan = with_places(emit_plan(planned("qwen2")[0]))
    bucket = plan.buckets[-1]
    refused = 0
    for _ in range(mutations // 10):
        name, other = rng.choice(sorted(bucket.offsets)), rng.choice(sorted(bucket.offsets))
        moved = replace(bucket, offsets={**bucket.offsets, name: bucket.offsets[other]})
        try:
            replace(plan, buckets=(moved,)).check()
        except ValueError:
            refused += 1
        else:
            assert keeps_values_apart(plan, moved), (name, other)
    assert refused > mutations // 40


def keeps_values_apart(plan: Plan, bucket: Bucket) -> bool:
    """Runs the plan on an arena of bytes that remember who wrote them (calls in order, as on one stream)."""
    owner: list[str] = [""] * bucket.arena_bytes
    for call in plan.calls:
        reads = [r[1:] for r in call.args.values() if r[:1] == "%" and r not in call.results]
        for name in reads:
            start, stop = span(plan, bucket, name)
            if set(owner[start:stop]) != {name}:
                return False
        for reference in call.results:
            start, stop = span(plan, bucket, reference[1:])
            if any(name in owner[start:stop] for name in reads):
                return False
            owner[start:stop] = [reference[1:]] * (stop - start)
        if len({r[1:] for r in call.results} - set(owner)) > 0:
            return False
    start, stop = span(plan, bucket, plan.result)
    return set(owner[start:stop]) == {plan.result}


def span(plan: Plan, bucket: Bucket, name: str) -> tuple[int, int]:
    start = bucket.offsets[name]
    size: Extent = plan.buffers[name].bytes
    return start, start + size.at(bucket.sizes)
