"""`xllm show --profile`: every operator's predicted and measured time, and its share of the limit it meets.

Equal calls of all layers are one line. The limit is whichever takes longer on the machine of the profile: reading the
call's bytes from memory, or its multiply-adds; what lies in caches may be read faster than that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xllm.artifact import Artifact
from xllm.measure.record import Machine, Profile, StepProfile
from xllm.targets.base import StepSizes
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.rates import unit_of
from xllm.targets.predicted import TUNING, target_of

# An operator is unexplained where prediction and measurement differ by more than both: a share of its own time, and of
# the step's.
OF_ITSELF, OF_STEP = 0.25, 0.01
_HEAD = ("operator", "kernel", "calls", "predicted", "measured", "MB", "GFLOP", "limit", "share")


@dataclass(frozen=True)
class Operator:
    """Equal calls together: their number, seconds predicted and measured, bytes and operations of all, and seconds that
    the machine's limits allow."""

    name: str
    kernel: str
    calls: int
    predicted: float
    measured: float
    bytes: int
    flops: int
    reading: float
    multiplying: float

    @property
    def limit(self) -> str:
        return "multiply" if self.multiplying > self.reading else "read"

    @property
    def share(self) -> float:
        """Of the limit; 0 where nothing was measured."""
        return max(self.reading, self.multiplying) / self.measured if self.measured else 0.0

    def unexplained(self, step: float) -> bool:
        off = abs(self.predicted - self.measured)
        return off > OF_ITSELF * self.measured and off > OF_STEP * step


def operators(artifact: Artifact, target: CpuTarget, machine: Machine, step: StepProfile) -> list[Operator]:
    """The operators of a step in the order they first run."""
    sizes = StepSizes(step.sequences)
    groups: dict[tuple[str, str, int, int], list[tuple[float, float, int, int]]] = {}
    for call, measured in zip(artifact.plan.calls, step.calls, strict=True):
        moved, computed = call.cost.bytes.at(sizes), call.cost.flops.at(sizes)
        key = (re.sub(r"_\d+_", "_*_", call.node), call.kernel, moved, computed)
        groups.setdefault(key, []).append((target.seconds(call.cost, sizes, call.kernel), measured, moved, computed))
    found = []
    for (name, kernel, *_), held in groups.items():
        predicted, measured, total, work = (sum(part) for part in zip(*held, strict=True))
        multiplied = work / unit_of(machine.level, kernel)
        limits = total / machine.read_bytes_per_second, multiplied / machine.flops_per_second
        found.append(Operator(name, kernel, len(held), predicted, measured, int(total), int(work), *limits))
    return found


def text(artifact: Artifact, profile: Profile) -> str:
    """The tables of all steps for a person."""
    machine, target = profile.machine, target_of(artifact)
    tuned = TUNING in artifact.manifest["files"]
    source = "a tuning table" if tuned else "what is usual at this level (xllm compile --tuning)"
    lines = [
        f"{artifact.name} on {machine.cpu}, {machine.level}, {machine.threads} threads: reads"
        f" {machine.read_bytes_per_second / 1e9:.1f} GB/s, multiplies {machine.flops_per_second / 1e9:.0f} GFLOP/s;"
        f" predicted from {source}",
    ]
    for step in profile.steps:
        lines += ["", *_step(operators(artifact, target, machine, step), step)]
    return "\n".join(lines) + "\n"


def _step(found: Sequence[Operator], step: StepProfile) -> Iterator[str]:
    yield f"{step.name.upper()}  milliseconds, medians of {step.repeats} steps"
    predicted, measured = sum(one.predicted for one in found), sum(one.measured for one in found)
    rows: list[tuple[str, ...]] = [
        (one.name, one.kernel, str(one.calls), _ms(one.predicted), _ms(one.measured), f"{one.bytes / 1e6:,.2f}",
         f"{one.flops / 1e9:,.3f}", one.limit, f"{one.share:.0%}")
        for one in found
    ]  # fmt: skip
    rows.append(("sampling", "", "1", "", _ms(step.sample), *[""] * 4))
    rows.append(("sum", "", "", _ms(predicted), _ms(measured + step.sample), *[""] * 4))
    yield from _aligned([_HEAD, *rows])
    host = f"  host {_ms(step.host)} of {_ms(step.step)} by the executor ({step.host / step.step:.1%})"
    if step.engine_step and step.engine_host is not None:
        host += f", {_ms(step.engine_host)} of {_ms(step.engine_step)} by the engine's loop"
        host += f" ({step.engine_host / step.engine_step:.1%})"
    yield host
    off = measured - predicted
    yield f"  calls take {_ms(off)} more than was predicted of them ({off / predicted:+.0%})"
    odd = [f"{one.name} ({one.predicted / one.measured:.2f})" for one in found if one.unexplained(measured)]
    rule = f"within {OF_ITSELF:.0%} of its time or {OF_STEP:.0%} of the step's"
    yield f"  unexplained, predicted / measured: {', '.join(odd)}" if odd else f"  every prediction is {rule}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Two columns of text, the others of figures, each as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"
