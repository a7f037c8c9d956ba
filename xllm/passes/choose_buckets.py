"""Chooses the sizes a step is planned for, by dynamic programming over what a smaller step wastes in a larger bucket.

Adds `plans["buckets"]`. With observed sizes s (traffic) of weight f and step cost t, D[k][j] = min over i of
D[k-1][i] + sum f * (t(s_j) - t(s)) over i < s <= j; the largest size is always a bucket. t is what the target predicts
for the calls of the step. Without traffic, sizes are powers of two that carry equally many tokens, and t counts tokens.
Kernels of the CPU take sizes as parameters, so nothing is padded there: a bucket only sizes the arena.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass
from xllm.targets.base import Cost, Extent, Lowering, StepSizes


@dataclass(frozen=True)
class Buckets:
    """Sizes from small to large, each the dims of the program in their order (of a step: tokens, logit rows), and the
    expected share of work that is padding.
    """

    sizes: tuple[tuple[int, ...], ...]
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
        if program.is_function:  # its sizes are what a call brings: one bucket holds them all
            program.plans["buckets"] = Buckets((tuple(dim.max for dim in program.dims),), 0.0)
            return Outcome(program, tuple(f"{dim.name}={dim.max}" for dim in program.dims))
        tokens, rows = (dim.max for dim in program.dims)
        often = {tokens: 0.0}
        for size, weight in expected_steps(context, tokens):
            often[size] = often.get(size, 0.0) + weight
        sizes = sorted(often)
        weights = [often[size] for size in sizes]
        cost = predicted_seconds(program, context) if context.traffic else float
        chosen = choose_sizes(sizes, weights, cost, self.count)
        wasted = padding(chosen, often.items()) if context.target.pads else 0.0
        buckets = Buckets(tuple((size, min(size, rows)) for size in chosen), wasted)
        program.plans["buckets"] = buckets
        return Outcome(program, tuple(f"T={size}" for size in chosen))


def expected_steps(context: Context, largest: int) -> list[tuple[int, float]]:
    """(tokens, weight) of the steps that sizes are chosen for: the traffic given, with larger steps cut, or powers of
    two that carry equally many tokens."""
    return [(min(size, largest), weight) for size, weight in context.traffic] or [
        (size, 1.0 / size) for size in powers_of_two(largest)
    ]


def padding(sizes: Sequence[int], steps: Iterable[tuple[int, float]]) -> float:
    """The share of all rows that is padding when steps of (tokens, weight) run in the smallest of `sizes` (ascending)
    that holds them; none is larger than the last."""
    used = given = 0.0
    for tokens, weight in steps:
        used += weight * tokens
        given += weight * sizes[bisect_left(sizes, tokens)]
    return (given - used) / given if given else 0.0


def predicted_seconds(program: Program, context: Context) -> Callable[[int], float]:
    """Seconds of a step by its tokens, as the target predicts the calls that were chosen for it."""
    rows = next(dim.max for dim in program.dims[1:])
    calls = Counter((low.kernel, _terms(low.cost.flops), _terms(low.cost.bytes)) for low in _lowerings(program))
    alike = [
        (kernel, Cost(Extent(dict(flops)), Extent(dict(moved))), count)
        for (kernel, flops, moved), count in calls.items()
    ]

    def seconds(tokens: int) -> float:
        sizes = StepSizes.usual(tokens, min(tokens, rows))
        return sum(count * context.target.seconds(cost, sizes, kernel) for kernel, cost, count in alike)

    return seconds


def _lowerings(program: Program) -> Iterator[Lowering]:
    return (choice.lowering for choice in program.plans["kernels"].values())


def _terms(extent: Extent) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(extent.terms.items()))


def choose_sizes(
    sizes: Sequence[int], weights: Sequence[float], cost: Callable[[int], float], count: int
) -> tuple[int, ...]:
    """At most `count` of `sizes` (ascending), the last always among them, that waste least.

    A step of size s in a bucket of size b wastes cost(b) - cost(s); `weights` say how often each size comes. Of equal
    choices, the one with the fewest and then the smallest sizes.
    """
    total, costs = len(sizes), [cost(size) for size in sizes]
    often = np.array([0.0, *accumulate(weights)])
    spent = np.array([0.0, *accumulate(weight * each for weight, each in zip(weights, costs, strict=True))])
    waste = np.array([0.0] + [np.inf] * total)  # of the first i sizes, and what is chosen of them
    held: list[tuple[int, ...]] = [()] * (total + 1)
    found = []
    for _ in range(min(count, total)):
        place = {some: rank for rank, some in enumerate(sorted(set(held)))}
        ranks = np.array([place[some] for some in held])
        wasted = [0.0]
        chosen: list[tuple[int, ...]] = [()]
        for j in range(1, total + 1):
            # Sizes i..j-1 in bucket j-1 waste what that bucket costs as often as they come, less what they cost.
            options = waste[:j] + (often[j] - often[:j]) * costs[j - 1] - (spent[j] - spent[:j])
            least = np.flatnonzero(options == options.min())
            best = int(least[ranks[least].argmin()])
            wasted.append(float(options[best]))
            chosen.append((*held[best], sizes[j - 1]))
        waste, held = np.array(wasted), chosen
        found.append((wasted[-1], len(held[-1]), held[-1]))
    return min(found)[2]


def powers_of_two(maximum: int) -> list[int]:
    """1, 2, 4, … up to the maximum."""
    return [1 << bit for bit in range(maximum.bit_length()) if 1 << bit <= maximum]
