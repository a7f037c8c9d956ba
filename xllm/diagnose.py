"""A compile up to a point, to look at: a checkpoint's program after a pass, and the first pass that goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.compiler import CompileOptions, chosen_passes, resolved
from xllm.errors import CompileError

if TYPE_CHECKING:
    from xllm.ir import Program
    from xllm.passes import Context
    from xllm.passes.bisect import Divergence

CAPTURED = "captured"


def program_of(
    checkpoint: str | Path,
    stage: str | None = None,
    options: CompileOptions | None = None,
    dims: Mapping[str, int] | None = None,
) -> Program:
    """The program of a checkpoint, or of a .onnx file whose dims have these largest sizes, after the rewrite called
    `stage` ("captured": before any; None: after all). Weights are not read. Raises CompileError listing the stages
    there are.
    """
    from xllm.passes import FUNCTION_REWRITES, run_pipeline

    is_function = Path(checkpoint).suffix == ".onnx"
    rewrites = FUNCTION_REWRITES if is_function else chosen_passes(options or CompileOptions()).rewrites
    names = [step.name() for step in rewrites]
    if stage not in (None, CAPTURED, *names):
        known = ", ".join(dict.fromkeys((CAPTURED, *names)))
        raise CompileError(f"there is no stage {stage!r}", code="unknown-stage", try_=f"one of {known}")
    count = 0 if stage == CAPTURED else len(names) if stage is None else len(names) - names[::-1].index(stage)
    if is_function:
        program, context = _imported(checkpoint, dims or {})
    else:
        program, context = _captured(checkpoint, options or CompileOptions())
    return run_pipeline(program, rewrites[:count], context)[0]


def _imported(model: str | Path, dims: Mapping[str, int]) -> tuple[Program, Context]:
    from xllm.frontend.onnx import import_onnx
    from xllm.passes import Context
    from xllm.targets import cpu

    return import_onnx(model, dims)[0], Context(cpu.host_target())


def bisect_passes(
    checkpoint: str | Path, options: CompileOptions, tell: Callable[[str, float], None] | None = None
) -> Divergence | None:
    """The first rewrite that changes what the program computes, on random weights; None when none does. Raises
    CompileError for a checkpoint that cannot be captured and a pass that fails.
    """
    from xllm.passes.bisect import bisect

    program, context = _captured(checkpoint, options)
    return bisect(program, chosen_passes(options).rewrites, context, tell)


def _captured(checkpoint: str | Path, options: CompileOptions) -> tuple[Any, Context]:
    from xllm.frontend.facts import facts as read_facts
    from xllm.frontend.huggingface import capture
    from xllm.passes import Context
    from xllm.targets import cpu

    options = resolved(options, read_facts(checkpoint).max_len, set())
    context = Context(cpu.host_target(), str(options.weights), str(options.head), str(options.kv))
    limits = {"max_len": options.max_len, "max_tokens": options.max_batch_tokens, "max_seqs": options.max_seqs}
    return capture(checkpoint, **limits, task=options.task), context
