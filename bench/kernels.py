"""Kernel speed: one table, each row a share of the ceiling (read bandwidth, multiply-add peak) taken in the same run.

    python bench/kernels.py [--quick] [--threads N] [--level L] [--only TEXT]

Shapes are those of Qwen3-0.6B. Few rows are bound by the bytes of weights or KV cache, many rows by arithmetic.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xllm.kernels import cpu
from xllm.targets.base import LayerState
from xllm.targets.cpu import CpuTarget

HIDDEN, INTERMEDIATE, VOCAB = 1024, 3072, 151_936
# Query heads, KV heads, and the dims of a head; of Llama-3.2-1B too, where four query heads share the keys.
HEADS, WIDER = (16, 8, 128), (32, 8, 64)
PARTS = 128  # chunks of attention that a step may hand out as units
LINEARS = {
    "qkv": (HIDDEN, 4096),
    "o": (2048, HIDDEN),
    "gate-up": (HIDDEN, 2 * INTERMEDIATE),
    "down": (INTERMEDIATE, HIDDEN),
}
# Copies of a weight, so that consecutive repeats cannot find it in a cache.
COLD_BYTES = 1 << 29


@dataclass(frozen=True)
class Case:
    name: str
    calls: list[cpu.Call]  # run in turn, each on cold data where the case is bound by bandwidth
    batch: cpu.Batch
    bytes: float = 0  # of one call; a case counts either bytes or operations
    operations: float = 0
    keep: tuple = ()


def aligned(size: int) -> np.ndarray:
    raw = np.zeros(size + 4096, np.uint8)
    raw[::4096] = 0  # touched now, not while it is measured
    return raw[-raw.ctypes.data % 4096 :][:size]


def tokens(count: int, start: int = 0, span: np.ndarray | None = None) -> cpu.Batch:
    span = aligned(64) if span is None else span
    return cpu.Batch(
        np.zeros(count, np.int32),
        np.arange(start, start + count, dtype=np.int32),
        np.zeros(0, np.int32),
        np.array([0, count], np.int32),
        np.array([span.ctypes.data], np.uint64),
    )


def floats(*shape: int) -> np.ndarray:
    return np.full(shape, 0.01, np.float32)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


STORAGE = {
    "linear.bf16": "bfloat16",
    "linear_rounded.bf16": "bfloat16",
    "linear.f32": "float32",
    "linear.i8": "int8.32",
    "linear_rounded.i8": "int8.32",
    "linear_rounded_row.i8": "int8.row",
    "linear.i4": "int4.32",
    "linear_rounded.i4": "int4.128",
}


def linear(name: str, k: int, n: int, rows: int, kernel: str) -> Case:
    storage = STORAGE[kernel]
    size, kind = cpu.packed_bytes(n, k, storage), cpu.quantised(storage)
    size = -(-size // 64) * 64
    copies = max(1, min(16, COLD_BYTES // size)) if rows <= 8 else 1
    weights, x, out = aligned(size * copies), floats(rows, k), floats(rows, n)
    weights.view(np.uint32)[:] = 0x3C003C00  # small and the same in every type
    args = {"x": address(x), "bias": None, "out": address(out)}
    ints = {"k": k, "n": n}
    if name == "gate-up":
        kernel, ints = f"gated_{kernel}", {"k": k, "n": n // 2, "act": 0}
    scratch = aligned(cpu.rows_bytes(k, storage, "rounded" in kernel) * rows)
    if storage != "float32":
        args |= {"scratch_rows": address(scratch)}
    if kind:
        ints |= {"group": kind.group}
    calls = [cpu.Call(kernel, args | {"weight": address(weights) + i * size}, ints) for i in range(copies)]
    work = {"bytes": float(size)} if rows <= 8 else {"operations": 2.0 * rows * k * n}
    return Case(f"{kernel} {name} {k}x{n}, {rows} rows", calls, tokens(rows), keep=(weights, x, out, scratch), **work)


def kv_group(kv_heads: int, dim: int, suffix: str) -> int:
    """Bytes of 16 tokens of a layer."""
    layer = LayerState(kv_heads, dim, dim)
    return CpuTarget(cpu.level()).kv_layout((layer,), STORAGE[f"linear.{suffix}"].partition(".")[0]).group_bytes


def attention(rows: int, context: int, kernel: str, heads: tuple[int, int, int]) -> Case:
    """heads: query heads, KV heads, and the dims of a head."""
    suffix = kernel.partition(".")[2]
    q_heads, kv_heads, dim = heads
    group = kv_group(kv_heads, dim, suffix)
    copies = max(1, min(16, COLD_BYTES // (group * context // 16))) if rows == 1 else 1
    span = aligned(group * copies * (context // 16 + 1))
    q, out, parts = floats(rows, q_heads * dim), floats(rows, q_heads * dim), floats(PARTS, q_heads * (dim + 16))
    ints = {"group_bytes": group * copies, "q_heads": q_heads, "kv_heads": kv_heads, "window": 0, "parts": PARTS}
    ints |= dict.fromkeys(("key_dim", "value_dim"), dim)
    args = {"q": address(q), "sinks": None, "out": address(out), "scratch_parts": address(parts)}
    scale = {"scale": dim**-0.5, "softcap": 0.0}
    calls = [cpu.Call(kernel, args, ints | {"layer_offset": group * i}, scale) for i in range(copies)]
    start = context - rows
    seen = rows * start + rows * (rows + 1) / 2
    work = {"bytes": float(group * context / 16)} if rows == 1 else {"operations": 4.0 * seen * q_heads * dim}
    name = f"{kernel} {q_heads}/{kv_heads} x {dim}, {rows} of {context} tokens"
    return Case(name, calls, tokens(rows, start, span), keep=(span, q, out, parts), **work)


def rowwise(kernel: str, args: dict[str, tuple[int, ...]], ints: dict[str, int], rows: int) -> Case:
    """Every argument is read or written once: the bytes moved are the bytes of the arguments."""
    size = 4 * sum(int(np.prod(shape)) for shape in args.values())
    count = min(64, max(1, COLD_BYTES // size))  # of one row, what a step works on is in a cache
    copies = [{name: floats(*shape) for name, shape in args.items()} for _ in range(count)]
    epsilon = {"eps": 1e-6} if "eps" in cpu.kernels()[kernel].floats else {}
    calls = [cpu.Call(kernel, {name: address(a) for name, a in copy.items()}, ints, epsilon) for copy in copies]
    return Case(f"{kernel} {rows} rows", calls, tokens(rows), bytes=float(size), keep=(copies,))


def norm_rope_write(rows: int, suffix: str) -> Case:
    q_heads, kv_heads, dim = HEADS
    group = kv_group(kv_heads, dim, suffix)
    span = aligned(group * (rows // 16 + 1))
    shapes = {"qkv": (rows, (q_heads + 2 * kv_heads) * dim), "q_out": (rows, q_heads * dim)}
    shapes |= {"cos": (rows, dim), "sin": (rows, dim), "q_norm": (dim,), "k_norm": (dim,)}
    arrays = {name: floats(*shape) for name, shape in shapes.items()}
    ints = {"layer_offset": 0, "group_bytes": group, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
    call = cpu.Call(
        f"qk_norm_rope_write.{suffix}",
        {name: address(array) for name, array in arrays.items()},
        ints | {"rotary_dim": dim, "interleaved": 0},
        {"eps": 1e-6},
    )
    moved = sum(array.nbytes for array in arrays.values()) + rows * group / 16
    return Case(f"{call.kernel} {rows} rows", [call] * 28, tokens(rows, 0, span), bytes=moved, keep=(span, arrays))


def cases(quick: bool) -> Iterator[Callable[[], Case]]:
    for kernel in [kernel for kernel in STORAGE if not (quick and kernel == "linear.f32")]:
        for name, (k, n) in LINEARS.items():
            for rows in (1, 128) if quick else (1, 4, 8, 16, 64, 512):
                yield lambda name=name, k=k, n=n, rows=rows, kernel=kernel: linear(name, k, n, rows, kernel)
        yield lambda kernel=kernel: linear("head", HIDDEN, VOCAB, 1, kernel)
    kernels = [f"{name}.{suffix}" for suffix in ("bf16", "i8", "f32") for name in ("attention", "attention_rounded")]
    for kernel in kernels[:4] if quick else kernels:
        decodes = [(1, context) for context in ((1024,) if quick else (256, 1024, 4096, 16384))]
        prompts = ((256, 256),) if quick else ((8, 4096), (128, 4096), (512, 512), (2048, 2048), (512, 2048))
        for rows, context in [*decodes, *prompts]:
            for heads in (HEADS,) if quick else (HEADS, WIDER):
                yield lambda rows=rows, context=context, kernel=kernel, heads=heads: attention(
                    rows, context, kernel, heads
                )
    for rows in (1, 512):
        row, gated = (rows, HIDDEN), (rows, INTERMEDIATE)
        norm = {"x": row, "residual": row, "weight": (HIDDEN,), "out": row, "sum": row}
        yield lambda norm=norm, rows=rows: rowwise("add_rms_norm.f32", norm, {"width": HIDDEN}, rows)
        silu = {"x": (rows, 2 * INTERMEDIATE), "out": gated}
        yield lambda silu=silu, rows=rows: rowwise("gated_silu.f32", silu, {"width": INTERMEDIATE}, rows)
        for suffix in ("bf16", "i8"):
            yield lambda rows=rows, suffix=suffix: norm_rope_write(rows, suffix)


def seconds(runner: cpu.Runner, case: Case, budget: float) -> list[float]:
    """Wall seconds of single calls, taken over whole rounds through the case's calls."""
    plan = runner.add_plan(case.calls)
    runner.run(plan, case.batch)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        begin = time.perf_counter()
        runner.run(plan, case.batch)
        times.append((time.perf_counter() - begin) / len(case.calls))
    return times


def ceilings(runner: cpu.Runner) -> tuple[float, float]:
    """Read bandwidth in bytes/s, multiply-add peak in operations/s."""
    return runner.read_bandwidth(repeats=2), runner.fma_peak(20_000, repeats=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter repeats")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--level", default=cpu.level(), choices=cpu.levels())
    parser.add_argument("--only", default="", help="only cases whose name contains this text")
    options = parser.parse_args()
    budget = 0.2 if options.quick else 1.0
    runner = cpu.Runner(options.threads, options.level)
    table = Table(
        "kernel", "median", "p10 .. p90", "median rate", "of ceiling", "p10 of ceiling", title="xllm CPU kernels"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    peaks: list[tuple[float, float]] = []
    console = Console(width=None if Console().is_terminal else 120)
    for make in track(list(cases(options.quick)), "measuring", console=console, transient=True):
        case = make()
        if options.only not in case.name:
            continue
        # The ceiling is taken on both sides of each case: a shared machine changes from second to second.
        before = ceilings(runner)
        times = seconds(runner, case, budget)
        read, fma = (max(pair) for pair in zip(before, ceilings(runner), strict=True))
        peaks.append((read, fma))
        middle = statistics.median(times)
        low, high = np.percentile(times, [10, 90])
        work, ceiling, unit = (case.bytes, read, "GB/s") if case.bytes else (case.operations, fma, "GFLOP/s")
        spread, rate = f"{low * 1e3:.3f} .. {high * 1e3:.3f}", f"{work / middle / 1e9:.1f} {unit}"
        shares = f"{work / middle / ceiling:.0%}", f"{work / low / ceiling:.0%}"
        table.add_row(case.name, f"{middle * 1e3:.3f} ms", spread, rate, *shares)
    console.print(table)
    if peaks:
        read, fma = (statistics.median(p) / 1e9 for p in zip(*peaks, strict=True))
        machine = f"{platform.machine()}, {options.level}, {options.threads} threads, numpy {np.__version__}"
        console.print(f"{machine}; read {read:.1f} GB/s, multiply-add {fma:.0f} GFLOP/s (medians of the ceilings)")


if __name__ == "__main__":
    main()
