"""Refuses a plan whose calls would reach outside the memory they name.

A plan comes from a file: its digests say that it is whole, not that it is well meant, and kernels believe their ints.
What a kernel reads and writes is written down here once more, beside what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from xllm.plan import ELEMENT_BYTES as _BYTES_OF
from xllm.plan import Call, Plan
from xllm.targets.base import Extent
from xllm.targets.cpu import GROUP_TOKENS, REACH
from xllm.targets.cpu.rules import ELEMENT_BYTES, SUFFIX
from xllm.targets.cpu.views import ELEMENT_SIZE

INDICES = {
    "embedding": ("ids", ("$ids",)),
    "rows": ("index", ("$positions", "$last")),
    "first_rows": ("index", ("$last",)),
    "mean_rows": ("index", ("$last",)),
}
LARGEST = 1 << 47  # of an int: products of a few stay far from where 64 bits end only in Python
_BYTES = {suffix: ELEMENT_BYTES[dtype] for dtype, suffix in SUFFIX.items()} | ELEMENT_SIZE


class Place(NamedTuple):
    """The sizes of a bucket's dims, and the bytes each buffer then has."""

    sizes: Mapping[str, int]
    buffers: Mapping[str, int]


def check_bounds(plan: Plan, width: int, max_len: int) -> None:
    """Raises ValueError naming the first call that reads or writes beyond a buffer, a weight or the KV state.

    `plan` has passed `Plan.check`. width: of a row that will be read, the vocabulary where it is sampled; max_len:
    positions a step may have.
    """
    _require(
        plan.kv.group_tokens == GROUP_TOKENS, f"kv has groups of {plan.kv.group_tokens}, not {GROUP_TOKENS} tokens"
    )
    _require(not plan.is_function, "it is a function, not a step")
    planned = plan.buffers[plan.result].shape[1]
    _require(planned == width, f"rows are {planned} wide, {width} are read of each")
    _check_calls(plan, [bucket.sizes for bucket in plan.buckets], max_len)


def check_function(plan: Plan, sizes: Mapping[str, int]) -> None:
    """The same of a function whose dims have these sizes; checked for all sizes it is run at."""
    _require(plan.is_function, "it is a step, not a function")
    _check_calls(plan, [sizes], 0)


def _check_calls(plan: Plan, buckets: Sequence[Mapping[str, int]], max_len: int) -> None:
    places = [
        Place(sizes, {name: buffer.bytes.at(sizes) for name, buffer in plan.buffers.items()}) for sizes in buckets
    ]
    for call in plan.calls:
        if call.kernel == "torch":
            continue
        try:
            if ":" in call.kernel:
                _check_arrays(plan, call, places)
            else:
                _check_call(plan, call, places, max_len)
        except KeyError as error:
            raise ValueError(f"call {call.node}: {call.kernel} has no {error}") from error
    _check_state_order(plan)


def reach(kernel: str, ints: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that `kernel` ("linear.bf16") touches of each argument: per row, and once ("state": of a group of tokens;
    "fixed": where its part of what does not grow ends).

    Raises KeyError for an unknown kernel or a missing int.
    """
    name, _, suffix = kernel.partition(".")
    return REACH[name](ints, _BYTES[suffix])


def is_output(name: str) -> bool:
    """Whether an argument of this name is written: kernels call what they write out, …_out, sum or scratch…"""
    return name in ("out", "sum") or name.endswith("_out") or name.startswith("scratch")


def _check_call(plan: Plan, call: Call, places: Sequence[Place], max_len: int) -> None:
    """Of several places the ints are the same: only a function, which has one, has ints that depend on dims."""
    where, ints = f"call {call.node}", call.ints_at(places[0].sizes)
    _require(all(value >= 0 for value in ints.values()), f"{where}: a size is negative")
    _require(all(value < LARGEST for value in ints.values()), f"{where}: a size is beyond any memory")
    written = [call.args[name] for name in call.args if is_output(name)]
    _require(sorted(written) == sorted(call.results), f"{where} writes {written}, its results are {call.results}")
    rows, once = reach(call.kernel, ints)
    index, allowed = INDICES.get(call.kernel.partition(".")[0], ("", ()))
    if index in call.args:
        reference = call.args[index]
        _require(reference in allowed, f"{where}: {index} is {reference!r}, not one of {', '.join(allowed)}")
    touched = []
    for name, reference in call.args.items():
        if reference and name not in (index, "table"):
            if name not in rows and name not in once:
                raise KeyError(name)
            touched.append((name, reference, rows.get(name, 0), once.get(name, 0)))
    for sizes, buffers in places:
        count = call.rows.at(sizes)
        if count < 0:
            raise ValueError(f"{where}: it has {count} rows")
        if plan.is_function and count == 0:
            return  # it has no rows, and touches nothing
        if call.args.get("table"):
            last = sizes["T"] if call.args["index"] == "$last" else max_len
            _check_held(plan, where, "table", call.args["table"], last * rows["out"], buffers)
        for name, reference, each, fixed in touched:
            _check_held(plan, where, name, reference, count * each + fixed, buffers)
    if "state" in once:
        _check_state(plan, call, ints, once["state"], where)
    if "fixed" in once:
        _check_fixed(plan, call, once["fixed"], where)


def _check_arrays(plan: Plan, call: Call, places: Sequence[Place]) -> None:
    """A kernel of a module gets whole arrays: each must lie inside what it is a view of."""
    for name, operand in call.operands:
        reference = operand.get("ref", "")
        if reference[:1] not in ("%", "@"):
            continue  # inputs have the size of the step
        for sizes, buffers in places:
            needed = _BYTES_OF[operand["dtype"]]
            for size in operand["shape"]:
                needed *= size if isinstance(size, int) else Extent(size).at(sizes)
            held = _held(plan, reference, buffers)
            _require(needed <= held, f"call {call.node}: {name} needs {needed} bytes, {reference!r} has {held}")


def _check_state(plan: Plan, call: Call, ints: Mapping[str, int], size: int, where: str) -> None:
    kv = plan.kv
    _require(call.kernel.endswith(f".{SUFFIX[kv.dtype]}"), f"{where}: {call.kernel} does not work on {kv.dtype} state")
    _require(ints["group_bytes"] == kv.group_bytes, f"{where}: groups have {kv.group_bytes} bytes, not group_bytes")
    end = ints["layer_offset"] + size
    _require(end <= kv.group_bytes, f"{where}: its layer ends at {end} in a group of {kv.group_bytes} bytes")


def _check_fixed(plan: Plan, call: Call, end: int, where: str) -> None:
    """What does not grow lies `back` bytes before the groups: it must begin in the span, and end before they do."""
    back, size = call.ints["back"], plan.kv.fixed_bytes
    _require(back <= size and back % 4 == 0, f"{where}: it goes back {back} bytes, {size} do not grow")
    _require(end <= back, f"{where}: its state ends at {end}, {back} bytes lie before the groups")


def _check_held(plan: Plan, where: str, name: str, reference: str, needed: int, buffers: Mapping[str, int]) -> None:
    if needed > (held := _held(plan, reference, buffers)):
        raise ValueError(f"{where}: {name} needs {needed} bytes, {reference!r} has {held}")


def _held(plan: Plan, reference: str, buffers: Mapping[str, int]) -> int:
    """Bytes behind a reference that are there to be read; an input of the step is nothing but an index."""
    kind, name = reference[:1], reference[1:]
    if kind == "%":
        return buffers[name]
    return plan.weights[name].bytes if kind == "@" else 0


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)


def _check_state_order(plan: Plan) -> None:
    """Calls on the state of one layer run one after the other: no reference between them says so."""
    before, last = plan.finished_before(), {}
    for index, call in enumerate(plan.calls):
        for place in ("layer_offset", "back"):
            if place in call.ints:
                key = place, call.ints[place]
                ordered = key not in last or before[index] >> last[key] & 1
                _require(bool(ordered), f"call {call.node} may start before the state of its layer is ready")
                last[key] = index
