"""What times are predicted from: figures of one machine, as `xllm tune` measures them, or round ones.

A kernel is a curve: seconds per byte against operations per byte. Left it is flat, the bandwidth the kernel reaches;
right it rises with the multiply-adds, the rate it reaches; between lies what no product of two limits says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from xllm import typed

SCHEMA = 2
MAX_BYTES = 1 << 20
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e18)]


@dataclass(frozen=True)
class Curve:
    """call_seconds: of a call that does next to nothing. points: (operations per byte, seconds per byte), growing."""

    call_seconds: Positive
    points: tuple[tuple[float, Positive], ...]

    def seconds(self, moved: float, computed: float) -> float:
        """Of a call that moves so many bytes and computes so many operations."""
        if not moved:
            return self.call_seconds
        intensity = computed / moved
        at = bisect_left(self.points, (intensity, 0.0))
        if at == 0:
            each = self.points[0][1]
        elif at == len(self.points):
            last, slowest = self.points[-1]
            each = slowest * intensity / last if last else slowest
        else:
            (low, fast), (high, slow) = self.points[at - 1 : at + 1]
            each = fast + (slow - fast) * (intensity - low) / (high - low)
        return self.call_seconds + moved * each


@dataclass(frozen=True)
class Tuning:
    """One machine: its CPU's model, the instruction set level and the threads that were measured; bytes of its caches
    ("L1d", "L2", "L3"); bytes read and float32 operations per second (a multiply-add counts as two) of all threads;
    kernels that were measured."""

    cpu: str
    level: str
    threads: int
    cache_bytes: Mapping[str, int]
    read_bytes_per_second: Positive
    flops_per_second: Positive
    call_seconds: Positive
    kernels: Mapping[str, Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, curve in self.kernels.items():
            if not curve.points or list(curve.points) != sorted({point[0]: point for point in curve.points}.values()):
                raise ValueError(f"the points of {name} do not grow")

    def seconds(self, kernel: str, moved: float, computed: float) -> float:
        """Predicted time of one call: by its kernel's curve, or by whichever limit it meets."""
        if (curve := self.kernels.get(ungated(kernel))) is not None:
            return curve.seconds(moved, computed)
        return self.call_seconds + max(moved / self.read_bytes_per_second, computed / self.flops_per_second)

    def to_json(self) -> bytes:
        """Keys sorted, so that equal tables are equal bytes."""
        body = {"schema": SCHEMA, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(body, order="sorted"), indent=1) + b"\n"

    @staticmethod
    def from_json(text: bytes) -> Tuning:
        """Raises ValueError saying what is not as it should be."""
        try:
            body = typed.decode(text, dict)
            if body.pop("schema", None) != SCHEMA:
                raise ValueError(f"it is not of schema {SCHEMA}")
            return typed.convert(body, Tuning)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(str(error)) from error


def ungated(kernel: str) -> str:
    """The product that a gated one takes as long as: a gate costs little beside it, and columns are not written."""
    return kernel.replace("gated_linear", "linear")


ROUND = Tuning("", "", 2, {}, 20e9, 150e9, 3e-6)
