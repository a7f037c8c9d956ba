"""`xllm compile model.onnx`: import, rewrite, plan, pack, write. The order of this file is the order of the work.

A function has no state, tokenizer or steps: what it shares with `xllm.compiler` are the passes, the target and the
artifact.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import xllm
from xllm.artifact import writing
from xllm.plan import StoredWeight


@dataclass(frozen=True)
class FunctionReport:
    """What the compile of a function did: pass records, operators left to torch as (operator, reason), sizes."""

    artifact: Path
    records: tuple[Any, ...]
    fallbacks: tuple[tuple[str, str], ...]
    weight_bytes: int
    arena_bytes: int
    dims: Mapping[str, int]

    def text(self) -> str:
        """The report as lines for a person."""
        lines = [f"wrote {self.artifact}"]
        for record in self.records:
            missed = f", {len(record.misses)} near misses" if record.misses else ""
            lines.append(f"  {record.name:<20} {record.hits:>5} hits{missed}  {record.seconds:.2f} s")
        dims = " ".join(f"{name} <= {size}" for name, size in self.dims.items())
        lines.append(f"  weights {self.weight_bytes / 1e6:,.1f} MB · arena {self.arena_bytes / 1e6:,.1f} MB · {dims}")
        for op in sorted({op for op, _ in self.fallbacks}):
            whys = [why for name, why in self.fallbacks if name == op]
            lines.append(f"  runs in torch: {len(whys)} x {op}, because {whys[0]}")
        if self.fallbacks:
            lines.append("  running it imports torch for them: seconds and some 200 MB at start")
        return "\n".join(lines)


def compile_onnx(
    model: str | os.PathLike[str], out: str | os.PathLike[str], dims: Mapping[str, int], *,
    weights: str = "float32", disable: tuple[str, ...] = (), debug: int = 0,
) -> FunctionReport:  # fmt: skip
    """Compiles an ONNX file into the function artifact `out`, whole or not at all.

    dims: the largest size of each dim its inputs name. weights: storage of product weights. Raises CompileError or
    ArtifactError.
    """
    from xllm.frontend.onnx import import_onnx
    from xllm.ir.show import digest, text
    from xllm.passes import FUNCTION_REWRITES, PLANS, Context, pipeline_text, run_pipeline, without
    from xllm.passes.account import account
    from xllm.passes.debug import Ladder
    from xllm.passes.emit import emit_plan, weight_bytes
    from xllm.targets import cpu

    with writing(out) as writer:
        program, tensors = import_onnx(model, dims)
        target = cpu.host_target()
        context = Context(target, weights, "float32")
        ladder = Ladder(min(debug, 4), target.name, lambda name, dump: writer.write(f"ir/{name}.ir", dump))
        ladder.captured(program)
        rewrites = without(FUNCTION_REWRITES, disable)
        program, records = run_pipeline(program, rewrites, context, ladder.observe)
        program, planned = run_pipeline(program, PLANS, context, ladder.observe)
        plan = emit_plan(program)
        writer.write(f"ir/{ladder.count:02d}-planned.ir", text(program, stage="planned", target=target.name))
        sized = {key: replace(held, bytes=weight_bytes(held, cpu.PANEL_ROWS)) for key, held in plan.weights.items()}
        written = writer.write_weights(
            replace(plan, weights=sized), lambda held: iter([_packed(program, held, tensors)])
        )
        plan = written.plan
        writer.write("plan.json", plan.to_json())
        writer.write("report.json", json.dumps(account(program, context), separators=(",", ":"), sort_keys=True))
        records = [*records, *planned]
        writer.finish(
            {
                "kind": "function",
                "toolchain": {"xllm": xllm.__version__},
                "target": {"name": target.name, "level": target.level, "architecture": cpu.architecture()},
                "model": {"name": program.name, "architecture": "ONNX"},
                "generation": {},
                "special_tokens": {},
                "limits": {dim.name: dim.max for dim in program.dims},
                "weights_dtype": weights,
                "weights_header": written.header,
                "pipeline": pipeline_text((*rewrites, *PLANS)),
                "passes": [
                    {"name": r.name, "kind": r.kind, "hits": r.hits, "misses": list(r.misses), "before": r.before,
                     "after": r.after}
                    for r in records
                ],
                "program": digest(program),
            }
        )  # fmt: skip
    return FunctionReport(
        Path(out), tuple(records), _fallbacks(program), sum(held.bytes for held in plan.weights.values()),
        plan.arena_bytes, {dim.name: dim.max for dim in program.dims},
    )  # fmt: skip


def _fallbacks(program: Any) -> tuple[tuple[str, str], ...]:
    choices = program.plans["kernels"].values()
    return tuple((choice.operation.op, choice.why) for choice in choices if choice.provider == "torch")


def _packed(program: Any, stored: StoredWeight, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A weight's bytes as the target wants them, from its rule and the mapped initializers."""
    from xllm.ir.weight_rules import evaluate, widen
    from xllm.kernels.cpu import pack_panels

    weight = program.weights[stored.name]
    array = evaluate(weight.rule, tensors, program.constants).reshape(weight.shape)
    if stored.layout.form == "plain":
        return np.ascontiguousarray(widen(array)).reshape(-1).view(np.uint8)
    raw = array if array.dtype == np.uint16 else widen(array)
    return pack_panels(np.ascontiguousarray(raw), stored.layout.dtype)
