"""What a compile says of its choices beyond the plan itself: who was asked for each operation and why they refused, and
how the buckets compare. Written into the artifact as report.json, so that `xllm explain` needs no compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from xllm.ir import Program
from xllm.ir.program import layer_of, path_of
from xllm.passes.base import Context
from xllm.passes.choose_kernels import Choice

SCHEMA = 2


def account(program: Program, context: Context) -> dict[str, Any]:
    """The report of a planned program, as JSON holds it; equal programs give equal reports.

    notes: as the program has them. operators: by node, {"path", "layer", "provider", "refused": [[provider, reason],
    …]}. buckets: the share of a step that is padding under the traffic the sizes were chosen for, beside a ladder of
    powers of two, and whether the target pads at all; nothing for a function, whose one bucket is its dims' limits.
    """
    choices: dict[str, Choice] = program.plans["kernels"]
    nodes = {node.name: node for node in program.calls()}
    operators = {
        name: {
            "path": path_of(nodes[name]),
            "layer": layer_of(nodes[name]),
            "provider": choice.provider,
            "refused": [list(pair) for pair in choice.refused],
        }
        for name, choice in choices.items()
    }
    return {
        "schema": SCHEMA,
        "notes": list(program.notes),
        "operators": operators,
        "buckets": {} if program.is_function else _buckets(program, context),
    }


def _buckets(program: Program, context: Context) -> dict[str, Any]:
    sizes = [T for T, _ in program.plans["buckets"].sizes]
    ladder = [1 << bit for bit in range(sizes[-1].bit_length()) if 1 << bit < sizes[-1]] + [sizes[-1]]
    even = [(size, 1.0) for size in range(1, sizes[-1] + 1)]
    traffic = [(min(size, sizes[-1]), weight) for size, weight in context.traffic] or even
    return {
        "traffic": "given" if context.traffic else "every size alike",
        "pads": context.target.pads,
        "padding": round(padding(sizes, traffic), 6),
        "ladder": ladder,
        "ladder_padding": round(padding(ladder, traffic), 6),
    }


def padding(sizes: Sequence[int], traffic: Iterable[tuple[int, float]]) -> float:
    """The share of all rows that is padding when steps of (tokens, weight) run in the smallest of `sizes` (ascending)
    that holds them; none is larger than the last."""
    used = given = 0.0
    for tokens, weight in traffic:
        used += weight * tokens
        given += weight * next(size for size in sizes if size >= tokens)
    return (given - used) / given if given else 0.0
