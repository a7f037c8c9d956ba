"""`xllm tune`: the figures that the CPU target predicts from, measured on this machine in some seconds.

Kernels are asked for as the compiler asks for them: an operation, the target's rule, and the call that it gives, run
over memory of the sizes that plans are checked against. So whatever a rule chooses is what is measured. Weights and
state are larger than the caches, as those of a model are, and so are the values of kernels that do nothing but move
them: between one such call and the next, a prompt's step reads weights. The values of others are not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from xllm.kernels import cpu
from xllm.measure.machine import WRITTEN, cache_bytes, state_memory
from xllm.storage import ACTIVATIONS, rounds
from xllm.targets import host
from xllm.targets.base import TOKENS, KVLayout, LayerState, Lowering, Operation, StepSizes, Tensor
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.bounds import reach
from xllm.targets.cpu.tuning import Curve, Tuning

LEAST_COLD_BYTES, MOST_COLD_BYTES = 96 << 20, 512 << 20
LEAST_APART = 256 << 10  # bytes: less is what caches are for
SECONDS = 0.12  # of one point of a curve
LEAST, MOST = 3, 200  # runs of one
APART = 1.2  # intensities closer than this are one point
WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 4096, 16, 8, 128, 32768

Sequences = tuple[tuple[int, int], ...]
ONE: Sequences = ((1, 0),)

STORAGES = ("float32", "bfloat16", "int8.32", "int4.32")
KVS = ("float32", "bfloat16", "int8")


def prompt(tokens: int, past: int = 0) -> Sequences:
    return ((tokens, past),)


@dataclass(frozen=True)
class Case:
    """One kernel. make(layer) gives the operation, as layer `layer` of a model has it; tiny: the same with next to
    nothing to do; points: the steps that the curve is measured at. cold: what is larger than caches, the "weights" with
    the state, or the "values"."""

    make: Callable[[int], Operation]
    tiny: tuple[Operation, Sequences]
    points: tuple[Sequences, ...]
    weights: str = "float32"
    kv: str = "float32"
    cold: str = "weights"
    activations: str = ""


def tune(threads: int | None = None, tell: Callable[[str], None] = lambda _: None, level: str = "") -> Tuning:
    """The table of this machine, for `level`, by default its fastest instruction set level. Raises ValueError for a
    level that does not run here."""
    count = host.threads(threads).count
    if level and level not in cpu.levels():
        raise ValueError(f"CPU level {level} does not run here, {', '.join(cpu.levels())} do")
    if not level:
        tell("instruction set levels")
        level = fastest_level(count)
    curves = {}
    with cpu.Runner(count, level) as runner:
        tell(f"limits of {count} threads")
        read, flops = runner.read_bandwidth(128 << 20, 5), runner.fma_peak(20_000, 20)
        for case in cases():
            try:
                bench = Bench(runner, CpuTarget(level), case)
            except NoKernel as error:
                tell(f"not {error}")
                continue
            if bench.kernel not in curves:
                tell(bench.kernel)
                curves[bench.kernel] = curve(bench)
    usual = statistics.median(found.call_seconds for found in curves.values())
    return _rounded(Tuning(host.cpu_model(), level, count, cache_bytes(), read, flops, usual, curves))


def fastest_level(threads: int) -> str:
    """The level at which a product of few and of many rows, and attention, take least, every one of them counting the
    same. Mostly the widest; not where wide vectors slow the clock down."""
    if len(cpu.levels()) == 1:
        return cpu.level()
    taken, cases = {}, (linear("bfloat16"), linear("bfloat16", "bfloat16"), attention("bfloat16"))
    for level in cpu.levels():
        with cpu.Runner(threads, level) as runner:
            found = [Bench(runner, CpuTarget(level), case) for case in cases]
            taken[level] = sum(math.log(bench.seconds(step, 0.02)) for bench in found for step in (ONE, prompt(16)))
    return min(taken, key=lambda level: taken[level])


def curve(bench: Bench) -> Curve:
    """Measured at every point of the case; those that differ little in operations per byte count once."""
    case = bench.case
    points: dict[float, float] = {}
    for step in case.points:
        intensity, moved = bench.work(step)
        if all(intensity > APART * other or other > APART * intensity for other in points):
            points[intensity] = bench.seconds(step) / moved
    tiny = Bench(bench.runner, bench.target, replace(case, make=lambda _: case.tiny[0], cold=""))
    first = points[min(points)]
    call = max(tiny.seconds(case.tiny[1]) - tiny.work(case.tiny[1])[1] * first, 5e-8)
    # What the call costs by itself is not in the slope.
    sizes = {bench.work(step)[0]: bench.work(step)[1] for step in case.points}
    found = sorted((at, max(each - call / sizes[at], each / 2)) for at, each in points.items())
    return Curve(call, tuple(found))


class NoKernel(ValueError):
    """The target has no kernel for a case; the message says why."""


class Bench:
    """The calls of one case over memory of their own. Raises NoKernel where the target has none for it."""

    def __init__(self, runner: cpu.Runner, target: CpuTarget, case: Case) -> None:
        self.runner, self.target, self.case = runner, target, case
        state = LayerState(KV_HEADS, HEAD_DIM, HEAD_DIM)
        one = self._lower(target.kv_layout((state,), case.kv), 0)
        self.kernel, self._cost = one.kernel, one.cost
        most = max((StepSizes(step) for step in (*case.points, case.tiny[1])), key=lambda sizes: sizes["T"])
        rows, once = reach(one.kernel, one.ints)
        scratch = {name: once.pop(name) for name in [*once] if name.startswith("scratch")}
        held = sum(size for name, size in once.items() if name != "state")
        per_token = target.kv_layout((state,), case.kv).token_bytes if "state" in once else 0
        self._context = max(tokens + past for step in (*case.points, case.tiny[1]) for tokens, past in step)
        sizes = {name: most["T"] * size for name, size in rows.items()} | {"table": most["T"] * rows.get("out", 0)}
        for name, size in scratch.items():
            sizes[name] = sizes.get(name, 0) + size
        cold = {"weights": held + per_token * min(self._context, 256), "values": sum(sizes.values())}
        self.copies = _copies(cold.get(case.cold, 0))
        self._kv = target.kv_layout((state,) * self.copies, case.kv)
        self._lowered = [self._lower(self._kv, layer) for layer in range(self.copies)]
        self._weights = [
            {name: _memory(size) for name, size in once.items() if name != "state" and size}
            for _ in range(self.copies if case.cold == "weights" else 1)
        ]
        apart = self.copies if case.cold == "values" else 1
        self._values = [{name: _memory(size) for name, size in sizes.items()} for _ in range(apart)]
        self._state = state_memory(self._kv.group_bytes * (-(-self._context // 16) + 8) if "state" in once else 1)

    def _lower(self, kv: KVLayout, layer: int) -> Lowering:
        found = self.target.lower(self.case.make(layer), kv, self.case.weights, self.case.activations)
        if not isinstance(found, Lowering):
            raise NoKernel(f"{self.case.make(layer).op} of {self.case.weights}: {found.why}")
        return found

    def work(self, step: Sequences) -> tuple[float, float]:
        """Operations per byte of one call, and its bytes."""
        moved, computed = (part.at(StepSizes(step)) for part in (self._cost.bytes, self._cost.flops))
        return computed / moved, moved

    def seconds(self, step: Sequences, budget: float = SECONDS) -> float:
        """Of one call, the median over runs through all copies; one copy where there is much to compute."""
        one = self.case.cold != "values" and StepSizes(step)["T"] > 64
        calls = [self._call(at) for at in range(1 if one else self.copies)]
        plan, batch = self.runner.add_plan(calls), self._batch(step)
        self.runner.run(plan, batch)
        taken, end = [], time.perf_counter() + budget
        while len(taken) < LEAST or (time.perf_counter() < end and len(taken) < MOST):
            began = time.perf_counter()
            self.runner.run(plan, batch)
            taken.append((time.perf_counter() - began) / len(calls))
        return statistics.median(taken)

    def _call(self, at: int) -> cpu.Call:
        low = self._lowered[at]
        args: dict[str, int | str | None] = {}
        for name, tensor in low.args.items():
            if tensor is None:
                args[name] = None
            elif tensor.kind == "input":
                args[name] = tensor.name
            else:
                held = self._weights if tensor.kind == "weight" else self._values
                args[name] = held[at % len(held)][name].ctypes.data
        terms = low.rows.terms
        rows = terms.get("T", 0), terms.get("S", 0), terms.get("", 0)
        return cpu.Call(low.kernel, args, low.ints, low.floats, rows)

    def _batch(self, step: Sequences) -> cpu.Batch:
        counts = [tokens for tokens, _ in step]
        starts = np.cumsum([0, *counts], dtype=np.int32)
        positions = np.concatenate([np.arange(past, past + tokens, dtype=np.int32) for tokens, past in step])
        ids = (np.arange(len(positions)) * 7919 % VOCAB).astype(np.int32)
        spans = np.full(len(step), self._state.ctypes.data, np.uint64)
        return cpu.Batch(ids, positions, (starts[1:] - 1).astype(np.int32), starts, spans)


def _copies(size: int) -> int:
    """So many that one has left the caches when its turn comes again, if 64 are enough for that."""
    cold = min(max(4 * cache_bytes().get("L3", 0), LEAST_COLD_BYTES), MOST_COLD_BYTES)
    return max(1, min(64, -(-cold // size))) if size > LEAST_APART else 1


def _memory(size: int) -> np.ndarray:
    """Written memory from a cache line on."""
    block = np.full(size + 64, WRITTEN, np.uint8)
    return block[-block.ctypes.data % 64 :]


# --- what is measured -------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """The kernels that steps of language models spend their time in, of every type of weights and of state."""
    for dtype in STORAGES:
        yield linear(dtype)
        yield from (linear(dtype, kind) for kind in ACTIVATIONS if rounds(kind, dtype))
        yield _rowwise("xllm.embedding", {"ids": _input("ids"), "weight": _weight(VOCAB, WIDTH)}, [WIDTH], dtype)
    yield linear("int8.row", "int8")
    for dtype in KVS:
        yield attention(dtype)
        yield attention(dtype, "bfloat16")
        yield _write(dtype)
    x, norm = _value(WIDTH), {"weight": _weight(WIDTH), "eps": 1e-6}
    yield _rowwise("xllm.rms_norm", {"x": x, **norm}, [WIDTH])
    yield _rowwise("xllm.add_rms_norm", {"x": x, "residual": x, **norm}, [WIDTH, WIDTH])
    yield _rowwise("xllm.gated_act", {"x": _value(2 * INNER), "act": "silu"}, [INNER])
    yield _rowwise("xllm.rows", {"table": x, "index": _input("positions")}, [WIDTH])
    yield _rowwise("aten.add.Tensor", {"self": x, "other": x}, [WIDTH])


def linear(dtype: str, activations: str = "") -> Case:
    def make(n: int, k: int) -> Operation:
        args = {"x": _value(k), "weight": _weight(n, k), "bias": None}
        return Operation("linear", "xllm.linear", args, (_value(n),))

    points = tuple(prompt(rows) for rows in (1, 2, 4, 8, 16, 32, 64, 128, 512))
    return Case(lambda _: make(INNER, WIDTH), (make(128, 16), ONE), points, weights=dtype, activations=activations)


def attention(dtype: str, activations: str = "") -> Case:
    def make(layer: int) -> Operation:
        args = {
            "q": _value(HEADS, HEAD_DIM), "sinks": None, "kv_heads": KV_HEADS, "value_dim": HEAD_DIM, "window": 0,
            "scale": HEAD_DIM**-0.5, "softcap": 0.0, "layer": layer,
        }  # fmt: skip
        return Operation("attention", "xllm.attention", args, (_value(HEADS, HEAD_DIM),))

    points = (prompt(1, 255), prompt(4, 252), prompt(16, 240), prompt(64, 192), prompt(512), prompt(512, 512))
    weights = activations or "float32"
    return Case(make, (make(0), ONE), points, weights, kv=dtype, activations=activations)


def _write(dtype: str) -> Case:
    sizes = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rotary_dim": HEAD_DIM}

    def make(layer: int) -> Operation:
        args = {
            "qkv": _value((HEADS + 2 * KV_HEADS) * HEAD_DIM), "q_norm": _weight(HEAD_DIM), "k_norm": _weight(HEAD_DIM),
            "cos": _value(HEAD_DIM), "sin": _value(HEAD_DIM), "interleaved": False, "eps": 1e-6, "layer": layer,
            **sizes,
        }  # fmt: skip
        return Operation("write", "xllm.qk_norm_rope_write", args, (_value(HEADS, HEAD_DIM),))

    return Case(make, (make(0), ONE), (prompt(512),), kv=dtype, cold="values")


def _rowwise(op: str, args: Mapping[str, object], widths: Sequence[int], weights: str = "float32") -> Case:
    """Kernels whose time is that of their bytes, whatever the rows."""
    operation = Operation("rowwise", op, args, tuple(_value(width) for width in widths))
    return Case(lambda _: operation, (operation, ONE), (prompt(512),), weights, cold="values")


def _value(*shape: int) -> Tensor:
    return Tensor("value", "value", (TOKENS, *shape), "float32")


def _weight(*shape: int) -> Tensor:
    return Tensor("weight", "weight", shape, "float32")


def _input(name: str) -> Tensor:
    return Tensor(name, "input", (TOKENS,), "int32")


def _rounded(table: Tuning) -> Tuning:
    """To four digits: more would only be noise."""

    def short(figure: float) -> float:
        return float(f"{figure:.4g}")

    curves = {
        name: Curve(short(held.call_seconds), tuple((short(at), short(each)) for at, each in held.points))
        for name, held in table.kernels.items()
    }
    assert all(one[0] < two[0] for held in curves.values() for one, two in pairwise(held.points))
    return replace(
        table,
        read_bytes_per_second=short(table.read_bytes_per_second),
        flops_per_second=short(table.flops_per_second),
        call_seconds=short(table.call_seconds),
        kernels=curves,
    )
