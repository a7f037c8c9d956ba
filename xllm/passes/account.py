"""What a compile says of its choices beyond the plan itself: who was asked for each operation and why they refused, and
how the buckets compare. Written into the artifact as report.json, so that `xllm explain` needs no compiler.
"""

from __future__ import annotations

from typing import Any

from xllm.ir import Program
from xllm.ir.program import layer_of, path_of
from xllm.passes.base import Context
from xllm.passes.choose_buckets import expected_steps, padding, powers_of_two
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
    ladder = sorted({*powers_of_two(sizes[-1]), sizes[-1]})
    steps = expected_steps(context, sizes[-1])
    return {
        "traffic": "given" if context.traffic else "powers of two, as many tokens of each",
        "pads": context.target.pads,
        "padding": round(padding(sizes, steps), 6),
        "ladder": ladder,
        "ladder_padding": round(padding(ladder, steps), 6),
    }
