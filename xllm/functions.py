"""`xllm compile model.onnx`: import, rewrite, plan, pack, write. The order of this file is the order of the work.

A function has no state, tokenizer or steps: what it shares with `xllm.compiler` are the passes, the target and the
artifact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xllm.artifact import PLANNED, check_apart, share, writing
from xllm.errors import CompileError
from xllm.pipeline import (
    check_activations,
    fallback_lines,
    made_by,
    module_lines,
    modules_of,
    pass_lines,
    pipeline_of,
    sized,
)  # fmt: skip
from xllm.plan import StoredWeight
from xllm.storage import STORAGES, full_word


@dataclass(frozen=True)
class FunctionReport:
    """What the compile of a function did: pass records, operators left to torch as (operator, reason), sizes, and the
    modules of others whose kernels it runs."""

    artifact: Path
    records: tuple[Any, ...]
    fallbacks: tuple[tuple[str, str], ...]
    weight_bytes: int
    arena_bytes: int
    dims: Mapping[str, int]
    modules: tuple[str, ...] = ()

    def text(self) -> str:
        """The report as lines for a person."""
        lines = [f"wrote {self.artifact}", *pass_lines(self.records)]
        dims = " ".join(f"{name} <= {size}" for name, size in self.dims.items())
        lines.append(f"  weights {self.weight_bytes / 1e6:,.1f} MB · arena {self.arena_bytes / 1e6:,.1f} MB · {dims}")
        lines += module_lines(self.modules, "running it needs Session(path, kernel_modules=[{!r}])")
        lines += fallback_lines([("", op, why, 0) for op, why in self.fallbacks], "run")
        return "\n".join(lines)


def compile_onnx(
    model: str | os.PathLike[str], out: str | os.PathLike[str], dims: Mapping[str, int], *,
    weights: str = "float32", activations: str = "", disable: tuple[str, ...] = (), pass_modules: tuple[str, ...] = (),
    kernel_modules: tuple[str, ...] = (), share_weights: str | os.PathLike[str] | None = None, debug: int = 0,
) -> FunctionReport:  # fmt: skip
    """Compiles an ONNX file into the function artifact `out`, whole or not at all.

    dims: the largest size of each dim its inputs name. weights: storage of product weights (see `xllm.storage`).
    activations: what rows are rounded to in products with them, a type that fits or "".
    pass_modules, kernel_modules: files of others (see `xllm.extensions`). share_weights: a folder that keeps the weight
    file, for every artifact with the same weights to share. Raises CompileError or ArtifactError.
    """
    if (weights := full_word(weights)) not in STORAGES:
        raise CompileError(f"weights is {weights!r}", code="bad-option", try_="one of " + ", ".join(STORAGES))
    check_activations(activations, weights)
    if debug > 4:
        raise CompileError(
            "numeric checks of rewrites run steps, which a function has not",
            code="bad-option",
            try_="XLLM_DEBUG=4 or less",
        )
    if share_weights is not None:
        check_apart(out, share_weights)
    from xllm.frontend.onnx import import_onnx
    from xllm.ir.show import text
    from xllm.passes import FUNCTION_REWRITES, Context, run_pipeline
    from xllm.passes.account import account
    from xllm.passes.debug import Ladder
    from xllm.passes.emit import emit_plan
    from xllm.targets import cpu

    pipeline = pipeline_of(FUNCTION_REWRITES, disable, pass_modules, kernel_modules)
    with writing(out) as writer:
        program, tensors = import_onnx(model, dims)
        target = cpu.host_target()
        context = Context(target, weights, activations=activations, providers=pipeline.providers)
        ladder = Ladder(debug, target.name, lambda name, dump: writer.write(f"ir/{name}.ir", dump))
        ladder.captured(program)
        program, records = run_pipeline(program, pipeline.rewrites, context, ladder.observe)
        program, planned = run_pipeline(program, pipeline.plans, context, ladder.observe)
        plan = emit_plan(program)
        writer.write(f"ir/{ladder.count:02d}-{PLANNED}.ir", text(program, stage=PLANNED, target=target.name))
        written = writer.write_weights(sized(plan), lambda held: iter([_packed(program, held, tensors)]))
        plan = written.plan
        if share_weights is not None:
            share(writer.root, written, share_weights)
        writer.write("plan.json", plan.to_json())
        writer.write("report.json", json.dumps(account(program, context), separators=(",", ":"), sort_keys=True))
        records = [*records, *planned]
        writer.finish(
            {
                "kind": "function",
                "model": {"name": program.name, "architecture": "ONNX"},
                "generation": {},
                "special_tokens": {},
                "limits": {dim.name: dim.max for dim in program.dims},
                **made_by(program, pipeline, records, written, context, "onnx"),
            }
        )
    return FunctionReport(
        Path(out), tuple(records), _fallbacks(program), sum(held.bytes for held in plan.weights.values()),
        plan.arena_bytes, {dim.name: dim.max for dim in program.dims}, modules_of(plan),
    )  # fmt: skip


def _fallbacks(program: Any) -> tuple[tuple[str, str], ...]:
    choices = program.plans["kernels"].values()
    return tuple((choice.operation.op, choice.why) for choice in choices if choice.provider == "torch")


def _packed(program: Any, stored: StoredWeight, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A weight's bytes as the target wants them, from its rule and the mapped initializers."""
    from xllm.ir.weight_rules import evaluate
    from xllm.packing import laid_out

    weight = program.weights[stored.name]
    return laid_out(evaluate(weight.rule, tensors, program.constants).reshape(weight.shape), stored)
