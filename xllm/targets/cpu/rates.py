"""What is predicted from where no machine was measured: what two cores reached at each instruction set level.

A kernel has two limits: bytes per second while it waits for memory or caches, operations per second while it
multiplies. They are near the curves that `xllm tune --level LEVEL` measured on two cores of a Xeon of 2.4 GHz that has
every level, those of x86-64-v4-bf16 on two of a Zen 4, which is what stops there; rows of bytes under one scale were
measured on the Zen 4 alone, by which the other levels are scaled. Between few rows and many a call may be off by half.
A level that is not here, aarch64, has the round figures of `tuning.ROUND`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from xllm.targets.cpu.tuning import ROUND, Curve, Tuning, ungated

CALL_SECONDS = 3e-6
# Kernels that multiply, and GFLOP/s of each, in this order, at each level. Experts and heads go as products of rows do.
MULTIPLIED = (
    "linear.f32", "linear.bf16", "linear.i8", "linear.i4", "linear_rounded.bf16", "linear_rounded.i8",
    "linear_rounded_row.i8", "linear_rounded.i4", "attention.f32", "attention.bf16", "attention.i8",
)  # fmt: skip
GFLOPS: Mapping[str, tuple[int, ...]] = {
    "x86-64-v2": (33, 33, 44, 26, 24, 18, 18, 25, 12, 10, 14),
    "x86-64-v3": (90, 90, 120, 200, 110, 100, 95, 170, 46, 52, 60),
    "x86-64-v4": (140, 170, 300, 390, 190, 340, 430, 445, 120, 140, 160),
    "x86-64-v4-bf16": (190, 190, 370, 610, 380, 560, 780, 680, 120, 130, 120),
    "x86-64-v4-amx": (180, 370, 380, 570, 900, 490, 430, 445, 160, 220, 150),
}
ALIKE = ("heads_linear", "moe", "experts")
# GB/s of weights and state, which come from memory, and of values, which caches hold, by kernel. Half at v2.
MEMORY_GBPS: Mapping[str, int] = {"x86-64-v4-bf16": 30}  # 20 elsewhere
CACHE_GBPS = 40
MOVED: Mapping[str, int] = {
    **dict.fromkeys(("rms_norm.f32", "add_rms_norm.f32", "add.f32"), 42),
    **dict.fromkeys(("gated_silu.f32", "gated_gelu.f32", "gated_gelu_tanh.f32"), 30),
    **dict.fromkeys((f"qk_norm_rope_write.{kind}" for kind in ("f32", "bf16", "i8")), 20),
    **dict.fromkeys(("rows.f32", *(f"embedding.{kind}" for kind in ("f32", "bf16", "i8", "i4"))), 55),
}
# Operations of the unit that multiplies, for one of float32 vectors in the same time, less what the kernel does again:
# rows in three parts of bf16 or two planes of bytes on the matrix unit, pairs of int16 or fours of bytes elsewhere.
_VECTORS = {
    "linear.i8": 2.0,
    "linear.i4": 4.0,
    "linear_rounded.i8": 4.0,
    "linear_rounded_row.i8": 4.0,
    "linear_rounded.i4": 4.0,
}
UNITS: dict[str, Mapping[str, float]] = {
    "x86-64-v4": _VECTORS,
    "x86-64-v4-bf16": {**_VECTORS, "linear_rounded.bf16": 2.0},
    "x86-64-v4-amx": {
        "linear.bf16": 16 / 3, "linear_rounded.bf16": 16.0, "linear.i8": 16.0, "linear.i4": 32.0,
        "linear_rounded.i8": 32.0, "linear_rounded_row.i8": 4.0, "linear_rounded.i4": 4.0,
    },
}  # fmt: skip


def unit_of(level: str, kernel: str) -> float:
    """By how many times the operations of `kernel` may be faster than multiply-adds of float32 vectors."""
    stem, _, kind = ungated(kernel).partition(".")
    return UNITS.get(level, {}).get(f"{'linear' if stem in ALIKE else stem}.{kind}", 1.0)


@cache
def usual(level: str) -> Tuning:
    """The table of a level for a machine that was not measured."""
    if level not in GFLOPS:
        return ROUND
    slow = 0.5 if level == "x86-64-v2" else 1.0
    memory = MEMORY_GBPS.get(level, 20)
    kernels = {name: _limits(slow * memory, rate) for name, rate in _multiplied(level)}
    kernels |= {name: _limits(slow * rate, GFLOPS[level][0]) for name, rate in MOVED.items()}
    read, flops = slow * CACHE_GBPS * 1e9, GFLOPS[level][0] * 1e9
    return Tuning("", level, 2, {}, read, flops, CALL_SECONDS, kernels)


def _multiplied(level: str) -> Iterator[tuple[str, int]]:
    for name, rate in zip(MULTIPLIED, GFLOPS[level], strict=True):
        yield name, rate
        if name.startswith("linear."):
            yield from ((name.replace("linear", other), rate) for other in ALIKE)
        if name.startswith("attention."):  # rounded, it has half as many products where the machine multiplies bf16
            gain = 2.0 if level.endswith("-amx") else 1.7 if level.endswith("-bf16") else 1.0
            yield name.replace("attention", "attention_rounded"), round(gain * rate)


def _limits(gigabytes: float, gigaflops: float) -> Curve:
    """Flat up to where both limits take as long, growing with the operations from there."""
    return Curve(CALL_SECONDS, ((gigaflops / gigabytes, 1e-9 / gigabytes),))
