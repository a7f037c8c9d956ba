"""The plan: what the runtime executes, as plain data. Written by the compiler, read without torch.

Calls are the same for every bucket; a bucket adds sizes and offsets into the one arena all buckets share. References
are short strings: "%value" (arena; a function's inputs too), "@weight", "$input" (of a step: ids, positions, last), ""
(absent). `check` did not make the plan; how far into them a kernel reaches is for the target to check
(`targets/cpu/bounds.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import msgspec

from xllm import typed
from xllm.targets.base import LOGIT_ROWS, TOKENS, Cost, Extent, KVLayout, Layout, is_meeting

SCHEMA = 5
ALIGN_BYTES = 64
INPUTS = ("ids", "positions", "last")
ELEMENT_BYTES = {"float32": 4, "int32": 4, "int64": 8, "bool": 1, "bfloat16": 2}


@dataclass(frozen=True)
class Call:
    """One kernel call: named arguments as references, attributes, the number of its rows, its stream.

    results: the arena values it writes, its scratch among them. after: indices of calls on other streams that must
    have finished before. kernel "torch" marks an operator without a native kernel: `op` is run by the fallback provider
    on `operands` (JSON encoding of its arguments) and what it gives is copied to `results`. "module:name" is a
    kernel of a module of others: it gets `operands` as arrays, and writes to those that are `results`.
    """

    node: str
    op: str
    kernel: str
    args: Mapping[str, str] = field(default_factory=dict)
    ints: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, float] = field(default_factory=dict)
    rows: Extent = TOKENS
    stream: str = ""
    after: tuple[int, ...] = ()
    operands: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    results: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)
    extents: Mapping[str, Extent] = field(default_factory=dict)

    def ints_at(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Every int of the kernel, when each dim has its size: `extents` are those that depend on one."""
        return {**self.ints, **{name: size.at(sizes) for name, size in self.extents.items()}}


@dataclass(frozen=True)
class Buffer:
    """A value in the arena: bytes, and dtype and shape for providers that need them."""

    bytes: Extent
    dtype: str
    shape: tuple[int | Extent, ...]


@dataclass(frozen=True)
class Port:
    """An input or a result of a function: the buffer it lies in, and the shape it is seen in there."""

    buffer: str
    shape: tuple[int | Extent, ...]


@dataclass(frozen=True)
class Bucket:
    """The most each dim may be (of a step: T tokens, S logit rows) and where each buffer then lies."""

    sizes: Mapping[str, int]
    arena_bytes: int
    offsets: Mapping[str, int]

    @property
    def T(self) -> int:
        return self.sizes["T"]

    @property
    def S(self) -> int:
        return self.sizes["S"]


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it lies in the artifact: the program's name and shape, storage layout, file, byte range, digest."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    file: str = ""
    offset: int = 0
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Plan:
    """One compiled step: `result` names the buffer of its rows [S, N], float32: logits, embeddings or
    scores. Or one function, which has `outputs` in its place: its `inputs` are written before the first call.
    """

    calls: tuple[Call, ...]
    buffers: Mapping[str, Buffer]
    buckets: tuple[Bucket, ...]
    weights: Mapping[str, StoredWeight]
    kv: KVLayout
    result: str
    streams: tuple[str, ...] = ("compute",)
    inputs: Mapping[str, Port] = field(default_factory=dict)
    outputs: Mapping[str, Port] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        return bool(self.outputs)

    @property
    def arena_bytes(self) -> int:
        """The one arena all buckets fit in: max over shapes, not the sum."""
        return max(bucket.arena_bytes for bucket in self.buckets)

    def finished_before(self) -> list[int]:
        """For each call, the calls (as a bit mask) that have certainly finished when it starts. Raises ValueError."""
        return _finished_before(self)

    def to_json(self) -> str:
        """One line, keys sorted: equal plans give equal text. Raises ValueError for a number JSON has no word for."""
        return json.dumps(
            {"schema": SCHEMA, **msgspec.to_builtins(self)}, separators=(",", ":"), sort_keys=True, allow_nan=False
        )

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Raises ValueError naming the field that is missing or wrong. What the fields say is for `check` to judge."""
        try:
            raw = json.loads(text)
            schema = raw.pop("schema", None) if isinstance(raw, dict) else None
            if schema != SCHEMA:
                raise ValueError(f"plan schema {schema!r} is not {SCHEMA}")
            plan = typed.convert(raw, Plan)
            known = msgspec.to_builtins(plan)
            if msgspec.json.encode(known, order="sorted") != msgspec.json.encode(raw, order="sorted"):
                for place in _differences(known, raw, "$"):
                    raise ValueError(f"plan is malformed: what {place} says is unknown here, or left out")
        except msgspec.ValidationError as error:
            raise ValueError(f"plan is malformed: {error}") from error
        except RecursionError as error:
            raise ValueError("plan is malformed: it nests too deeply") from error
        return plan

    def check(self) -> None:
        """Raises ValueError naming the first call, buffer, bucket or weight that is not sound.

        Every reference exists, every buffer is written once and read after that, lies inside the arena, and shares
        bytes only with buffers whose last use has certainly finished; weights lie apart from each other.
        """
        _check_sizes(self)
        _check_weights(self)
        for call in self.calls:
            _require(all(map(math.isfinite, call.floats.values())), f"call {call.node} has floats {dict(call.floats)}")
            for name, operand in call.operands:
                _check_operand(f"call {call.node}: {name}", operand)
        before = self.finished_before()
        accesses = _check_references(self, before)
        for bucket in self.buckets:
            _check_bytes(self, bucket, before, accesses)


def references(call: Call) -> Iterator[str]:
    """Everything a call reads or writes, absent arguments left out."""
    yield from filter(None, call.args.values())
    yield from call.results
    for _, operand in call.operands:
        yield from _operand_references(operand)


def _operand_references(operand: Mapping[str, Any]) -> Iterator[str]:
    if "ref" in operand:
        yield operand["ref"]
    for item in operand.get("list", ()):
        yield from _operand_references(item)


def _differences(known: Any, raw: Any, place: str) -> Iterator[str]:
    """Where the text says more, or less, than what was understood."""
    if isinstance(known, dict) and isinstance(raw, dict):
        for key in sorted(known.keys() | raw.keys()):
            if key in known and key in raw:
                yield from _differences(known[key], raw[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(known, list | tuple) and isinstance(raw, list) and len(known) == len(raw):
        for index, pair in enumerate(zip(known, raw, strict=True)):
            yield from _differences(*pair, f"{place}[{index}]")
    elif known != raw:
        yield place


# --- what a plan must be ----------------------------------------------------------------------------------------------


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _check_sizes(plan: Plan) -> None:
    sizes = [dict(bucket.sizes) for bucket in plan.buckets]
    _require(bool(sizes) and all(size >= 1 for bucket in sizes for size in bucket.values()), f"buckets are {sizes}")
    if plan.is_function:
        _require(len(sizes) == 1, "a function has one bucket")
    else:
        _require(all(set(bucket) == {"T", "S"} for bucket in sizes), f"buckets {sizes} are not of T and S")
        _require(not plan.inputs, "a step has no named inputs")
    for one, other in pairwise(sizes):
        grows = all(one[dim] <= other[dim] for dim in one) and one["T"] < other["T"]
        _require(grows, f"buckets {sizes} do not grow")
    _check_state(plan.kv)
    for name, buffer in plan.buffers.items():
        _require(buffer.dtype in ELEMENT_BYTES, f"buffer {name} is of {buffer.dtype}")
        _check_dims(
            plan.buckets[0], f"buffer {name}", buffer.bytes, *(s for s in buffer.shape if isinstance(s, Extent))
        )
        for bucket in plan.buckets:
            total = ELEMENT_BYTES[buffer.dtype]
            for size in buffer.shape:
                total *= size.at(bucket.sizes) if isinstance(size, Extent) else size
            planned = buffer.bytes.at(bucket.sizes)
            if not planned == total >= 0:
                raise ValueError(f"buffer {name} takes {total} bytes, {planned} are planned")
    for name, port in (*plan.inputs.items(), *plan.outputs.items()):
        _check_port(plan, name, port)
    if plan.is_function:
        return _require(plan.result == "", "a function has outputs, not a result")
    result = plan.buffers.get(plan.result)
    fits = result is not None and result.dtype == "float32" and len(result.shape) == 2
    _require(fits and result is not None and result.shape[0] == LOGIT_ROWS, f"result {plan.result!r} is no [S, N]")


def _check_port(plan: Plan, name: str, port: Port) -> None:
    """A port lies in a buffer and is as large as it, whatever the dims are."""
    buffer = plan.buffers.get(port.buffer)
    _require(buffer is not None, f"{name!r} lies in buffer {port.buffer!r}, which does not exist")
    assert buffer is not None
    _check_dims(plan.buckets[-1], f"port {name}", *(size for size in port.shape if isinstance(size, Extent)))
    total = Extent({"": ELEMENT_BYTES[buffer.dtype]})
    for size in port.shape:
        total = total.times(size)
    _require(
        total == buffer.bytes, f"{name!r} takes {dict(total.terms)} bytes of buffer {port.buffer}, which has others"
    )


def _check_dims(bucket: Bucket, what: str, *extents: Extent, known: Callable[[str], bool] = lambda dim: False) -> None:
    dims = {dim for extent in extents for name in extent.terms for dim in name.split("*")} - {"", *bucket.sizes}
    unknown = {dim for dim in dims if not known(dim)}
    _require(not unknown, f"{what} depends on {sorted(unknown)}, which is no dim of the plan")


def _check_operand(where: str, operand: Any) -> None:
    """One of the forms an argument is written in, and its fields of the types readers expect."""
    match operand:
        case {"ref": str(), "shape": list() | tuple() as shape, "dtype": str(), **rest}:
            known = not rest and all(_is_size(size) for size in shape)
        case {"size": size, **rest}:
            known = not rest and _is_size(size)
        case {"list": list() as items, **rest}:
            known = not rest
            for item in items:
                _check_operand(where, item)
        case {"float": str(), **rest} | {"torch": str(), **rest}:
            known = not rest
        case {"value": None | bool() | int() | float() | str() as value, **rest}:
            known = not rest and (not isinstance(value, float) or math.isfinite(value))
        case _:
            known = False
    _require(known, f"{where} is no operand: {str(operand)[:80]}")


def _is_size(size: Any) -> bool:
    if isinstance(size, dict):
        return all(isinstance(dim, str) and type(factor) is int for dim, factor in size.items())
    return type(size) is int


def _check_state(kv: KVLayout) -> None:
    _require(kv.group_tokens >= 1 and kv.group_bytes >= 1, f"kv has groups of {kv.group_bytes} bytes")
    for name, offsets, end in (
        ("layer_offsets", kv.layer_offsets, kv.group_bytes),
        ("fixed_offsets", kv.fixed_offsets, kv.fixed_bytes),
    ):
        _require(list(offsets) == sorted(offsets), f"kv: {name} do not grow")
        _require(all(0 <= offset <= end for offset in offsets), f"kv: {name} leave their {end} bytes")
    _require(kv.fixed_bytes % ALIGN_BYTES == 0, f"kv: fixed_bytes are {kv.fixed_bytes}, not whole cache lines")


def _check_weights(plan: Plan) -> None:
    end, last = 0, ""
    for key, weight in sorted(plan.weights.items(), key=lambda item: item[1].offset):
        _require(weight.bytes > 0 and weight.offset >= 0, f"weight {key} has {weight.bytes} bytes at {weight.offset}")
        _require(weight.offset % ALIGN_BYTES == 0, f"weight {key} starts at {weight.offset}, not at a cache line")
        _require(weight.offset >= end, f"weight {key} overlaps weight {last}")
        end, last = weight.offset + weight.bytes, key


def _finished_before(plan: Plan) -> list[int]:
    last: dict[str, int] = {}
    before: list[int] = []
    for index, call in enumerate(plan.calls):
        _require(call.stream in plan.streams, f"call {call.node} is on stream {call.stream!r}, which does not exist")
        mask = 0
        for earlier in (*call.after, *([last[call.stream]] if call.stream in last else [])):
            _require(0 <= earlier < index, f"call {call.node} waits for call {earlier}, which does not come before it")
            mask |= before[earlier] | 1 << earlier
        before.append(mask)
        last[call.stream] = index
    return before


def _check_references(plan: Plan, before: list[int]) -> dict[str, int]:
    """For each buffer, the calls that touch it, as a bit mask."""
    known = {"%": plan.buffers, "@": plan.weights, "$": INPUTS}
    writer: dict[str, int] = {port.buffer: -1 for port in plan.inputs.values()}
    accesses: dict[str, int] = dict.fromkeys(writer, 0)
    _require(len(writer) == len(plan.inputs), "two inputs lie in one buffer")
    for index, call in enumerate(plan.calls):
        if plan.is_function:
            _check_dims(plan.buckets[-1], f"call {call.node}", call.rows, *call.extents.values())
        else:
            _require(set(call.rows.terms) <= {"", "T", "S"}, f"call {call.node} runs over {dict(call.rows.terms)}")
            _require(not call.extents, f"call {call.node} has ints that depend on dims")
        cost = call.cost.flops, call.cost.bytes
        _check_dims(plan.buckets[-1], f"the cost of call {call.node}", *cost, known=is_meeting)
        _require(all(factor >= 0 for factor in call.rows.terms.values()), f"call {call.node} has negative rows")
        named = list(references(call))
        for reference in named:
            if reference[1:] not in known.get(reference[:1], ()):
                raise ValueError(f"call {call.node} refers to {reference!r}, which does not exist")
        for reference in call.results:
            name = reference[1:]
            _require(reference[:1] == "%" and name not in writer, f"call {call.node} writes {reference!r} again")
            writer[name] = index
            used = named.count(reference)
            _require(used == (1 if call.kernel == "torch" else 2), f"call {call.node} reads {name!r}, which it writes")
        for name in {reference[1:] for reference in named if reference[:1] == "%"}:
            made = writer.get(name)
            ready = made is not None and (made in (-1, index) or before[index] >> made & 1)
            _require(bool(ready), f"call {call.node} reads {name!r} before it is written")
            accesses[name] = accesses.get(name, 0) | 1 << index
    missing = [name for name in plan.buffers if name not in writer]
    _require(not missing, f"buffer {missing[:1]} is never written")
    return accesses


def _check_bytes(plan: Plan, bucket: Bucket, before: list[int], accesses: Mapping[str, int]) -> None:
    where = "bucket " + ", ".join(f"{dim}={size}" for dim, size in sorted(bucket.sizes.items()))
    _require(set(bucket.offsets) == set(plan.buffers), f"{where} places other buffers than the plan has")
    spans = {name: (at, at + plan.buffers[name].bytes.at(bucket.sizes)) for name, at in bucket.offsets.items()}
    for name, (start, stop) in spans.items():
        if start % ALIGN_BYTES or not 0 <= start <= stop <= bucket.arena_bytes:
            raise ValueError(
                f"{where}: buffer {name} lies at {start}..{stop} in an arena of {bucket.arena_bytes} bytes"
            )
    in_order = len({call.stream for call in plan.calls}) == 1
    kept = {plan.result, *(port.buffer for port in plan.outputs.values())}
    given = [port.buffer for port in plan.inputs.values()]
    for one, other in combinations(given, 2):
        apart = spans[one][1] <= spans[other][0] or spans[other][1] <= spans[one][0]
        _require(apart, f"{where}: inputs {one} and {other} share bytes")
    held = given
    for index, call in enumerate(plan.calls):
        made = [reference[1:] for reference in call.results]
        for name in made:
            start, stop = spans[name]
            for other in (*held, *made[: made.index(name)]):
                low, high = spans[other]
                if stop <= low or high <= start:  # almost all: what a start takes hangs on this line
                    continue
                over = other not in kept and accesses[other] & ~before[index] == 0
                _require(over, f"{where}: {name} overwrites {other} before its last use")
        if in_order:  # what is over stays over, so that long plans are checked in linear time
            held = [name for name in held if name in kept or accesses[name] >> index]
        held += made
    end = -(-max((stop for _, stop in spans.values()), default=0) // ALIGN_BYTES) * ALIGN_BYTES
    _require(bucket.arena_bytes <= end, f"{where}: an arena of {bucket.arena_bytes} bytes, its buffers end at {end}")
