"""Chooses the sizes a step is planned for, by dynamic programming over what a smaller step wastes in a larger bucket.

Adds `plans["buckets"]`. With observed sizes s (traffic) of weight f and step cost t, D[k][j] = min over i of
D[k-1][i] + sum f * (t(s_j) - t(s)) over i < s <= j; the largest size is always a bucket. Without traffic, sizes are
powers of two that carry equally many tokens. On targets whose kernels take sizes as parameters (CPU) nothing is padded:
a bucket only sizes the arena, and the waste counted is its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass


@dataclass(frozen=True)
class Buckets:
    """Sizes (tokens, logit rows) from small to large, and the expected share of work that is padding."""

    sizes: tuple[tuple[int, int], ...]
    expected_padding: float


@dataclass(frozen=True)
class ChooseBuckets(Pass):
    count: int = 5
    kind: ClassVar[Literal["rewrite", "plan"]] = "plan"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CompileError(
                f"count is {self.count}", code="bad-option", pass_name=self.name(), try_="one bucket or more"
            )

    def run(self, program: Program, context: Context) -> Outcome:
        tokens, rows = (dim.max for dim in program.dims)
        traffic = context.traffic or tuple((size, 1.0 / size) for size in _ladder(tokens))
        sizes = sorted({min(size, tokens) for size, _ in traffic} | {tokens})
        weights = [sum(f for size, f in traffic if min(size, tokens) == wanted) for wanted in sizes]
        chosen = choose_sizes(sizes, weights, float, self.count)
        used = sum(f * size for size, f in zip(sizes, weights, strict=True))
        given = sum(
            f * next(bucket for bucket in chosen if bucket >= size) for size, f in zip(sizes, weights, strict=True)
        )
        padding = (given - used) / given if context.target.pads and given else 0.0
        buckets = Buckets(tuple((size, min(size, rows)) for size in chosen), padding)
        program.plans["buckets"] = buckets
        return Outcome(program, tuple(f"T={size}" for size in chosen))


def choose_sizes(
    sizes: Sequence[int], weights: Sequence[float], cost: Callable[[int], float], count: int
) -> tuple[int, ...]:
    """At most `count` of `sizes` (ascending), the last always among them, that waste least.

    A step of size s in a bucket of size b wastes cost(b) - cost(s); `weights` say how often each size comes. Of equal
    choices, the one with the fewest and then the smallest sizes.
    """
    total = len(sizes)
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] + [(float("inf"), ())] * total]
    for _ in range(min(count, total)):
        row = [(0.0, ())]
        for j in range(1, total + 1):
            options = []
            for i in range(j):
                waste = sum(weights[m] * (cost(sizes[j - 1]) - cost(sizes[m])) for m in range(i, j))
                options.append((best[-1][i][0] + waste, (*best[-1][i][1], sizes[j - 1])))
            row.append(min(options))
        best.append(row)
    return min((row[total] for row in best[1:]), key=lambda choice: (choice[0], len(choice[1]), choice[1]))[1]


def _ladder(maximum: int) -> list[int]:
    """1, 2, 4, … up to the maximum."""
    return [1 << bit for bit in range(maximum.bit_length()) if 1 << bit <= maximum]
