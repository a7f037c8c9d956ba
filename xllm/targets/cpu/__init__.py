"""The CPU target: which kernel runs which operation, how weights and state are laid out, and what a call should cost.

Weights of products lie in panels of 16 outputs (see kernels/cpu/panel.h), so that every output accumulates along K in
one fixed order. State lies in groups of 16 tokens; inside a group, per layer and KV head, keys as [key_dim][16] and
values as [16][value_dim] (latent layers keep no values), those of int8 behind their scales. No torch: the serving
process imports this file.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

from xllm.storage import rounds
from xllm.targets.base import Cost, KVLayout, LayerState, Lowering, Operation, Refusal
from xllm.targets.cpu import (
    attention,
    elementwise,
    encode,
    experts,
    gather,
    linear,
    norm,
    recurrent,
    sdpa,
    strided,
    typed,
)
from xllm.targets.cpu.rates import usual
from xllm.targets.cpu.rules import ELEMENT_BYTES, GROUP_TOKENS, PANEL_ROWS, Reach, Rule, kv_bytes
from xllm.targets.cpu.tuning import Tuning

FAMILIES = (linear, gather, norm, attention, elementwise, encode, sdpa, strided, typed, recurrent, experts)
RULES: Mapping[str, Rule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}
# Before RULES, for weights beside which activations are rounded.
ROUNDED: Mapping[str, Rule] = {**linear.ROUNDED, **attention.ROUNDED}
REACH: Mapping[str, Reach] = {name: reach for family in FAMILIES for name, reach in family.REACH.items()}
ANY_TYPE = frozenset({*strided.RULES, *typed.RULES, *elementwise.ANY_TYPE})  # operators whose rules look at types
LINE_BYTES = 64


@dataclass(frozen=True)
class CpuTarget:
    """One instruction set level of one architecture. Times are predicted from `tuning`, by default from what is usual
    at that level."""

    level: str
    name: str = "cpu"
    streams: tuple[str, ...] = ("compute", "host")
    fuses: frozenset[str] = frozenset({"gated_delta_mixed", "gated_linear", "qk_norm_rope_write"})
    pads: bool = False
    tuning: Tuning | None = None

    def lower(
        self, operation: Operation, kv: KVLayout, weights_dtype: str, activations: str = ""
    ) -> Lowering | Refusal:
        rounded = ROUNDED if rounds(activations, weights_dtype) else RULES
        rule = rounded.get(operation.op) or RULES.get(operation.op)
        if rule is None:
            return Refusal(f"no {self.name} kernel computes {operation.op}")
        bad = [result.name for result in operation.results if result.dtype != "float32"]
        if bad and operation.op not in ANY_TYPE:
            return Refusal(f"result {bad[0]} is not float32")
        found = rule(operation, kv, weights_dtype)
        if isinstance(found, Lowering) and not _fits_plans(found):
            return Refusal("its rows may be fewer than none, or it is given numbers that no size is")
        return found

    def stream_of(self, operation: Operation) -> str:
        return "compute"

    def kv_layout(self, layers: tuple[LayerState, ...], dtype: str) -> KVLayout:
        """What does not grow, then groups of 16 tokens; layer after layer, each a whole number of cache lines."""
        offsets, fixed_offsets, at, fixed = [], [], 0, 0
        for layer in layers:
            offsets.append(at)
            fixed_offsets.append(fixed)
            width = layer.key_dim + (0 if layer.latent else layer.value_dim)
            at += _lines(kv_bytes(layer.kv_heads, width, ELEMENT_BYTES[dtype]))
            fixed += _lines(layer.fixed_floats * 4)
        fixed_offsets = fixed_offsets if fixed else []
        return KVLayout(dtype, GROUP_TOKENS, at or LINE_BYTES, tuple(offsets), fixed, tuple(fixed_offsets))

    def seconds(self, cost: Cost, sizes: Mapping[str, int], kernel: str = "") -> float:
        return (self.tuning or usual(self.level)).seconds(kernel, cost.bytes.at(sizes), cost.flops.at(sizes))


def _fits_plans(found: Lowering) -> bool:
    """Whether a plan may hold the call: polynomials of rows without minus, whole numbers as sizes are."""
    return min(found.rows.terms.values(), default=0) >= 0 and all(0 <= held < 1 << 40 for held in found.ints.values())


def _lines(size: int) -> int:
    return -(-size // LINE_BYTES) * LINE_BYTES


def host_target(tuning: Tuning | None = None) -> CpuTarget:
    """The target of this machine: its best instruction set level, or that of a table. Raises ValueError for a table of
    a level that does not run here."""
    from xllm.kernels import cpu

    if tuning is None:
        return CpuTarget(cpu.level())
    if tuning.level not in cpu.levels():
        raise ValueError(f"the tuning table is for CPU level {tuning.level}, here run {', '.join(cpu.levels())}")
    return CpuTarget(tuning.level, tuning=tuning)


def architecture() -> str:
    """The processor family, x86_64 or aarch64, spelled alike on every system."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


__all__ = ["GROUP_TOKENS", "PANEL_ROWS", "REACH", "RULES", "CpuTarget", "architecture", "host_target"]
