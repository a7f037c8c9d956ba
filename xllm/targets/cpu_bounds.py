"""Refuses a plan whose calls would reach outside the memory they name.

A plan comes from a file: its digests say that it is whole, not that it is well meant, and kernels believe their ints.
What a kernel reads and writes is written down here once more, beside what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping

from xllm.plan import Bucket, Call, Plan
from xllm.targets.cpu import ELEMENT_BYTES, GROUP_TOKENS, PANEL_ROWS, SUFFIX

OUTPUTS = ("out", "sum", "q_out")
INDICES = {"embedding": ("ids", ("$ids",)), "rows": ("index", ("$positions", "$last"))}
_BYTES = {suffix: ELEMENT_BYTES[dtype] for dtype, suffix in SUFFIX.items()}


def check_bounds(plan: Plan, vocab: int, max_len: int) -> None:
    """Raises ValueError naming the first call that reads or writes beyond a buffer, a weight or the KV state.

    `plan` has passed `Plan.check`. vocab: logits of a row that will be sampled; max_len: positions a step may have.
    """
    _require(
        plan.kv.group_tokens == GROUP_TOKENS, f"kv has groups of {plan.kv.group_tokens}, not {GROUP_TOKENS} tokens"
    )
    width = plan.buffers[plan.logits].shape[1]
    _require(width == vocab, f"logits are {width} wide, the vocabulary is {vocab}")
    for call in plan.calls:
        if call.kernel == "torch":
            continue
        try:
            _check_call(plan, call, max_len)
        except KeyError as error:
            raise ValueError(f"call {call.node}: {call.kernel} has no {error}") from error


def reach(kernel: str, ints: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that `kernel` ("linear.bf16") touches of each argument: per row of the step, and once.

    Indices, and the table of `rows`, are not among them. Raises KeyError for an unknown kernel or a missing int.
    """
    name, _, suffix = kernel.partition(".")
    element = _BYTES[suffix]
    match name:
        case "embedding":
            table = _panels(ints["vocab"], ints["width"], element)
            return {"out": 4 * ints["width"]}, {"weight": table}
        case "rows":
            return {"out": 4 * ints["width"]}, {}
        case "linear":
            once = {"weight": _panels(ints["n"], ints["k"], element), "bias": 4 * ints["n"]}
            return {"x": 4 * ints["k"], "out": 4 * ints["n"]}, once
        case "rms_norm" | "add_rms_norm":
            row = 4 * ints["width"]
            return dict.fromkeys(("x", "residual", "out", "sum"), row), {"weight": row}
        case "rope":
            row, turned = 4 * ints["heads"] * ints["head_dim"], 4 * ints["rotary_dim"]
            return {"x": row, "out": row, "cos": turned, "sin": turned}, {}
        case "kv_write":
            return dict.fromkeys(("k", "v"), 4 * ints["kv_heads"] * ints["head_dim"]), {}
        case "qk_norm_rope_write":
            head, turned = 4 * ints["head_dim"], 4 * ints["rotary_dim"]
            rows = {"qkv": (ints["q_heads"] + 2 * ints["kv_heads"]) * head, "q_out": ints["q_heads"] * head}
            return {**rows, "cos": turned, "sin": turned}, {"q_norm": head, "k_norm": head}
        case "attention":
            return dict.fromkeys(("q", "out"), 4 * ints["q_heads"] * ints["head_dim"]), {"sinks": 4 * ints["q_heads"]}
        case "gated_silu" | "gated_gelu" | "gated_gelu_tanh":
            return {"x": 8 * ints["width"], "out": 4 * ints["width"]}, {}
        case "silu" | "gelu" | "gelu_tanh" | "add" | "mul":
            return dict.fromkeys(("x", "a", "b", "out"), 4 * ints["width"]), {}
    raise KeyError(kernel)


def _panels(n: int, k: int, element: int) -> int:
    return -(-n // PANEL_ROWS) * PANEL_ROWS * k * element


def _check_call(plan: Plan, call: Call, max_len: int) -> None:
    where = f"call {call.node}"
    _require(all(value >= 0 for value in call.ints.values()), f"{where}: a size is negative")
    written = [call.args[name] for name in OUTPUTS if name in call.args]
    _require(sorted(written) == sorted(call.results), f"{where} writes {written}, its results are {call.results}")
    rows, once = reach(call.kernel, call.ints)
    index, allowed = INDICES.get(call.kernel.partition(".")[0], ("", ()))
    for bucket in plan.buckets:
        count = bucket.T if call.rows == "T" else bucket.S
        needs = {name: count * row for name, row in rows.items()} | once
        if "table" in call.args:
            last = bucket.T if call.args["index"] == "$last" else max_len
            needs["table"] = last * rows["out"]
        for name, reference in call.args.items():
            if name == index:
                _require(reference in allowed, f"{where}: {name} is {reference!r}, not one of {', '.join(allowed)}")
            elif reference:
                held = _held(plan, reference, bucket)
                if needs[name] > held:
                    raise ValueError(f"{where}: {name} needs {needs[name]} bytes, {reference!r} has {held}")
    if "group_bytes" in call.ints:
        _check_state(plan, call, where)


def _check_state(plan: Plan, call: Call, where: str) -> None:
    kv, ints = plan.kv, call.ints
    _require(call.kernel.endswith(f".{SUFFIX[kv.dtype]}"), f"{where}: {call.kernel} does not work on {kv.dtype} state")
    _require(ints["group_bytes"] == kv.group_bytes, f"{where}: groups have {kv.group_bytes} bytes, not group_bytes")
    end = ints["layer_offset"] + 2 * ints["kv_heads"] * ints["head_dim"] * GROUP_TOKENS * ELEMENT_BYTES[kv.dtype]
    _require(end <= kv.group_bytes, f"{where}: its layer ends at {end} in a group of {kv.group_bytes} bytes")


def _held(plan: Plan, reference: str, bucket: Bucket) -> int:
    """Bytes behind a reference that are there to be read; an input of the step is nothing but an index."""
    kind, name = reference[:1], reference[1:]
    if kind == "%":
        return plan.buffers[name].bytes.at(bucket.T, bucket.S)
    return plan.weights[name].bytes if kind == "@" else 0


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
