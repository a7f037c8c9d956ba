"""Finds the first rewrite that changes what a program computes, and the first value in it that differs.

Passes run one at a time on the captured program; before and after each, both programs run in torch on the same random
weights and inputs. Inside the pass at fault, values that both programs name are compared in program order: the first
that differs tells the place, and the new values it is made from tell the match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.interpret import bind, empty_state, run
from xllm.ir.program import path_of
from xllm.passes.base import Context, Pass, run_pipeline
from xllm.passes.numerics import TOLERANCE, difference, random_sources, random_steps, run_steps
from xllm.passes.operations import op_name

Told = Callable[[str, float], None]  # pass, relative difference of its outputs


@dataclass(frozen=True)
class Divergence:
    """The pass at fault, the first value that differs (name, operator, module path), how far off, and the new values
    that the pass made between it and what was still the same. errors are ‖after - before‖/‖before‖."""

    pass_name: str
    node: str
    op: str
    path: str
    error: float
    output_error: float
    made_by: tuple[str, ...]

    def text(self) -> str:
        lines = [
            f"{self.pass_name} is the first pass that changes what the program computes: relative difference"
            f" {self.output_error:.2e} at the output",
            f"  first at %{self.node} = {self.op}, relative difference {self.error:.2e}"
            + (f", in {self.path}" if self.path else ""),
        ]
        if self.made_by:
            lines.append("  from what the pass put there: " + ", ".join(f"%{name}" for name in self.made_by))
        return "\n".join(lines)


def bisect(program: Program, passes: Iterable[Pass], context: Context, tell: Told | None = None) -> Divergence | None:
    """The first divergence, None when every pass keeps the numbers. `tell` hears of each pass that was run.

    Raises CompileError for a pass that fails, or leaves a program that breaks a rule.
    """
    sources = random_sources(program)
    for step in passes:
        after, _ = run_pipeline(program, [step], context)
        steps = random_steps(program, 0)
        pairs = zip(run_steps(program, sources, steps), run_steps(after, sources, steps), strict=True)
        worst = max(difference(old, new) for old, new in pairs)
        if tell is not None:
            tell(step.name(), worst)
        if worst > TOLERANCE:
            return _place(program, after, step.name(), worst, sources)
        program = after
    return None


def _place(
    before: Program, after: Program, name: str, output_error: float, sources: Mapping[str, np.ndarray]
) -> Divergence:
    """The first value, in program order, that both sides have and that differs in either step; else the output."""
    left, right = _values(before, sources), _values(after, sources)
    nodes = {node.name: node for node in after.calls()}
    for node in after.calls():
        old, new = left.get(node.name), right.get(node.name)
        if old is None or new is None:
            continue
        error = max(difference(a, b) for a, b in zip(old, new, strict=True))
        if error > TOLERANCE:
            return _told(node, name, error, output_error, left)
    last = next(node for node in after.output().all_input_nodes)
    return _told(nodes.get(last.name, last), name, output_error, output_error, left)


def _told(node: fx.Node, name: str, error: float, output_error: float, old: Mapping[str, object]) -> Divergence:
    made, open_ = [], [node]
    while open_:  # back to what stood there before
        for source in open_.pop().all_input_nodes:
            if source.op == "call_function" and source.name not in old and source.name not in made:
                made.append(source.name)
                open_.append(source)
    return Divergence(name, node.name, op_name(node), path_of(node), error, output_error, tuple(sorted(made)))


def _values(program: Program, sources: Mapping[str, np.ndarray]) -> dict[str, list[torch.Tensor]]:
    """Every tensor a program computes, by node name, one of each step."""
    weights, state = bind(program, sources), empty_state(program, slots=2, tokens=16)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(node: fx.Node, value: object) -> None:
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            seen.setdefault(node.name, []).append(value)

    for step in random_steps(program, 0):
        run(program, {**step, **state}, weights, keep)
    return seen
