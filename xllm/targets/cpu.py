"""The CPU target: which kernel runs which operation, how weights and state are laid out, and what a call should cost.

Weights of products lie in panels of 16 outputs (see kernels/cpu/panel.h), so that every output accumulates along K in
one fixed order. State lies in groups of 16 tokens; inside a group, per layer and KV head, keys as [head_dim][16] and
values as [16][head_dim]. No torch: the serving process imports this file.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xllm.targets.base import Cost, Extent, KVLayout, Layout, Lowering, Operation, Refusal, Tensor

GROUP_TOKENS = 16
PANEL_ROWS = 16
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
SUFFIX = {"float32": "f32", "bfloat16": "bf16"}
PANELS = "panels16"


@dataclass(frozen=True)
class CpuTarget:
    """One instruction set level of one architecture. Predicted times use round figures of a desktop core pair."""

    level: str
    name: str = "cpu"
    streams: tuple[str, ...] = ("compute", "host")
    fuses: frozenset[str] = frozenset({"qk_norm_rope_write"})
    pads: bool = False
    read_bytes_per_second: float = 20e9
    flops_per_second: float = 150e9
    call_seconds: float = 3e-6

    def lower(self, operation: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        rule = _RULES.get(operation.op)
        if rule is None:
            return Refusal(f"no {self.name} kernel computes {operation.op}")
        if bad := [r.name for r in operation.results if r.dtype != "float32"]:
            return Refusal(f"result {bad[0]} is not float32")
        return rule(operation, kv, weights_dtype)

    def stream_of(self, operation: Operation) -> str:
        return "compute"

    def kv_layout(self, layers: tuple[tuple[int, int, int], ...], dtype: str) -> KVLayout:
        """Groups of 16 tokens, layer after layer, every layer a whole number of cache lines."""
        offsets, at = [], 0
        for heads, key_dim, value_dim in layers:
            offsets.append(at)
            at += -(-heads * (key_dim + value_dim) * GROUP_TOKENS * ELEMENT_BYTES[dtype] // 64) * 64
        return KVLayout(dtype, GROUP_TOKENS, at, tuple(offsets))

    def seconds(self, cost: Cost, T: int, S: int) -> float:
        moved, computed = cost.bytes.at(T, S), cost.flops.at(T, S)
        return self.call_seconds + max(moved / self.read_bytes_per_second, computed / self.flops_per_second)


def host_target() -> CpuTarget:
    """The target of this machine: its best instruction set level."""
    from xllm.kernels import cpu

    return CpuTarget(cpu.level())


def host_threads() -> int:
    """Threads to use unless told otherwise: the cores this process may run on, within its control group's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def architecture() -> str:
    """The processor family, x86_64 or aarch64, spelled alike on every system."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


# --- rules: one per operator, a Lowering or the reason there is none --------------------------------------------------

Rule = Callable[[Operation, KVLayout, str], Lowering | Refusal]


def _linear(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight, bias = op.args["x"], op.args["weight"], op.args["bias"]
    if weight.kind != "weight" or (bias is not None and bias.kind != "weight"):
        return Refusal("its weight is not a weight of the program")
    if (rows := _step_rows(op, x)) is None:
        return Refusal("its rows are not the step's tokens or logit rows")
    n, k = _ints(weight.shape)
    return Lowering(
        f"linear.{SUFFIX[weights_dtype]}",
        {"x": x, "weight": weight, "bias": bias, "out": op.results[0]},
        {"k": k, "n": n},
        rows=rows,
        layouts={weight.name: Layout(PANELS, weights_dtype), **({bias.name: _PLAIN} if bias else {})},
        cost=Cost(_per(rows, 2 * n * k), _plus(_per(rows, 4 * (n + k)), n * k * ELEMENT_BYTES[weights_dtype])),
    )


def _embedding(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    ids, weight = op.args["ids"], op.args["weight"]
    if ids.kind != "input" or ids.name != "ids" or weight.kind != "weight":
        return Refusal("it gathers by something other than the step's ids")
    vocab, width = _ints(weight.shape)
    return Lowering(
        f"embedding.{SUFFIX[weights_dtype]}",
        {"ids": ids, "weight": weight, "out": op.results[0]},
        {"vocab": vocab, "width": width},
        layouts={weight.name: Layout(PANELS, weights_dtype)},
        cost=Cost(bytes=_per("T", width * (4 + 64))),
    )


def _rows(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    table, index = op.args["table"], op.args["index"]
    if (
        index.kind != "input"
        or index.name not in ("last", "positions")
        or len(table.shape) != 2
        or table.dtype != "float32"
    ):
        return Refusal("it is not a gather of rows of [R, W] by positions or last")
    rows = "S" if index.name == "last" else "T"
    return Lowering(
        "rows.f32",
        {"index": index, "table": table, "out": op.results[0]},
        {"width": table.width},
        rows=rows,
        layouts={table.name: _PLAIN} if table.kind == "weight" else {},
        cost=Cost(bytes=_per(rows, 8 * table.width)),
    )


def _rms_norm(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight = op.args["x"], op.args["weight"]
    rows = _normed_rows(op, x, weight)
    if isinstance(rows, Refusal):
        return rows
    return Lowering(
        "rms_norm.f32",
        {"x": x, "weight": weight, "out": op.results[0]},
        {"width": x.width},
        {"eps": op.args["eps"]},
        rows,
        {weight.name: _PLAIN},
        Cost(_per(rows, 4 * x.width), _per(rows, 8 * x.width)),
    )


def _add_rms_norm(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight = op.args["x"], op.args["weight"]
    rows = _normed_rows(op, x, weight)
    if isinstance(rows, Refusal):
        return rows
    normed, total = op.results
    return Lowering(
        "add_rms_norm.f32",
        {"x": x, "residual": op.args["residual"], "weight": weight, "out": normed, "sum": total},
        {"width": x.width},
        {"eps": op.args["eps"]},
        rows,
        {weight.name: _PLAIN},
        Cost(_per(rows, 5 * x.width), _per(rows, 16 * x.width)),
    )


def _rope(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["x"]
    if x.rows != "T" or len(x.shape) != 3:
        return Refusal("it does not rotate [T, H, D]")
    heads, head_dim = _ints(x.shape[1:])
    return Lowering(
        "rope.f32",
        {"x": x, "cos": op.args["cos"], "sin": op.args["sin"], "out": op.results[0]},
        {
            "heads": heads,
            "head_dim": head_dim,
            "rotary_dim": op.args["rotary_dim"],
            "interleaved": int(op.args["interleaved"]),
        },
        cost=Cost(_per("T", 6 * x.width), _per("T", 8 * x.width)),
    )


def _kv_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    k, v = op.args["k"], op.args["v"]
    heads, key_dim = _ints(k.shape[1:])
    if v.shape[2] != key_dim:
        return Refusal(f"keys are {key_dim} wide and values {v.shape[2]}")
    return Lowering(
        f"kv_write.{SUFFIX[kv.dtype]}",
        {"k": k, "v": v},
        {**_kv_place(op, kv), "kv_heads": heads, "head_dim": key_dim},
        cost=Cost(bytes=_per("T", 2 * heads * key_dim * (4 + ELEMENT_BYTES[kv.dtype]))),
    )


def _qk_norm_rope_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    args, names = op.args, ("q_heads", "kv_heads", "head_dim", "rotary_dim")
    norms = {name: args[name] for name in ("q_norm", "k_norm")}
    width = args["qkv"].width
    return Lowering(
        f"qk_norm_rope_write.{SUFFIX[kv.dtype]}",
        {"qkv": args["qkv"], **norms, "cos": args["cos"], "sin": args["sin"], "q_out": op.results[0]},
        {**_kv_place(op, kv), **{name: args[name] for name in names}, "interleaved": int(args["interleaved"])},
        {"eps": args["eps"]},
        layouts={norm.name: _PLAIN for norm in norms.values() if norm is not None},
        cost=Cost(_per("T", 10 * width), _per("T", 8 * width)),
    )


def _attention(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    q, sinks = op.args["q"], op.args["sinks"]
    heads, head_dim = _ints(q.shape[1:])
    if op.args["value_dim"] != head_dim:
        return Refusal(f"keys are {head_dim} wide and values {op.args['value_dim']}")
    return Lowering(
        f"attention.{SUFFIX[kv.dtype]}",
        {"q": q, "sinks": sinks, "out": op.results[0]},
        {
            **_kv_place(op, kv),
            "q_heads": heads,
            "kv_heads": op.args["kv_heads"],
            "head_dim": head_dim,
            "window": op.args["window"],
        },
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        layouts={sinks.name: _PLAIN} if sinks is not None else {},
        # At a context of 256 tokens, a middle size: the plan does not know the context of a step.
        cost=Cost(_per("T", 4 * heads * head_dim * 256), _per("T", 2 * op.args["kv_heads"] * head_dim * 256)),
    )


def _gated_act(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, out = op.args["x"], op.results[0]
    if (rows := _step_rows(op, x)) is None:
        return Refusal("its rows are not the step's tokens or logit rows")
    kernel = f"gated_{op.args['act']}.f32"
    cost = Cost(_per(rows, 12 * out.width), _per(rows, 12 * out.width))
    return Lowering(kernel, {"x": x, "out": out}, {"width": out.width}, rows=rows, cost=cost)


def _unary(kernel: str) -> Rule:
    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        x = op.args["self"]
        spelled = kernel
        if op.op.startswith("aten.gelu") and op.args.get("approximate", "none") == "tanh":
            spelled = "gelu_tanh"
        if (rows := _step_rows(op, x)) is None:
            return Refusal("its rows are not the step's tokens or logit rows")
        cost = Cost(_per(rows, 10 * x.width), _per(rows, 8 * x.width))
        return Lowering(f"{spelled}.f32", {"x": x, "out": op.results[0]}, {"width": x.width}, rows=rows, cost=cost)

    return rule


def _binary(kernel: str) -> Rule:
    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        a, b = op.args["self"], op.args["other"]
        values = isinstance(a, Tensor) and isinstance(b, Tensor) and a.kind == b.kind == "value"
        if not values or a.shape != b.shape:
            return Refusal("its operands are not two values of one shape")
        if op.args.get("alpha", 1) != 1 or (rows := _step_rows(op, a)) is None:
            return Refusal("its rows are not the step's tokens or logit rows")
        cost = Cost(_per(rows, a.width), _per(rows, 12 * a.width))
        return Lowering(
            f"{kernel}.f32", {"a": a, "b": b, "out": op.results[0]}, {"width": a.width}, rows=rows, cost=cost
        )

    return rule


_RULES: Mapping[str, Rule] = {
    "xllm.linear": _linear,
    "xllm.embedding": _embedding,
    "xllm.rows": _rows,
    "xllm.rms_norm": _rms_norm,
    "xllm.add_rms_norm": _add_rms_norm,
    "xllm.rope": _rope,
    "xllm.kv_write": _kv_write,
    "xllm.qk_norm_rope_write": _qk_norm_rope_write,
    "xllm.attention": _attention,
    "xllm.gated_act": _gated_act,
    "aten.silu.default": _unary("silu"),
    "aten.gelu.default": _unary("gelu"),
    "aten.add.Tensor": _binary("add"),
    "aten.mul.Tensor": _binary("mul"),
}
_PLAIN = Layout("plain", "float32")


def _kv_place(op: Operation, kv: KVLayout) -> dict[str, int]:
    return {"layer_offset": kv.layer_offsets[op.args["layer"]], "group_bytes": kv.group_bytes}


def _step_rows(op: Operation, x: Any) -> str | None:
    """The step dimension that both the first operand and the first result run over."""
    if not isinstance(x, Tensor) or x.kind != "value" or x.rows is None or op.results[0].rows != x.rows:
        return None
    return x.rows


def _normed_rows(op: Operation, x: Tensor, weight: Tensor) -> str | Refusal:
    """The dimension a norm's rows run over, if it normalises whole rows by one weight for each number of a row."""
    rows = _step_rows(op, x)
    if len(x.shape) != 2 or rows is None:
        return Refusal("it does not normalise whole rows of the step")
    if weight.kind != "weight" or weight.shape != (x.width,):
        return Refusal("its weight is not one number for each of a row's")
    return rows


def _ints(shape: tuple[int | Extent, ...]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else size.const for size in shape)


def _per(rows: str, amount: int) -> Extent:
    return Extent(t=amount) if rows == "T" else Extent(s=amount)


def _plus(extent: Extent, const: int) -> Extent:
    return Extent(extent.t, extent.s, extent.const + const)
