"""THE list: every pass of the compiler, in the order it runs. Order is source order; nothing else decides it.

Rewrites run on the captured program, where each distinct layer stands once. Then the program is stamped to full depth
(`frontend/stamp.py`), and plans are made for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xllm.errors import CompileError
from xllm.passes.absorb_mla import AbsorbMla
from xllm.passes.base import Context, Outcome, Pass, Record, run_pipeline, with_options
from xllm.passes.canonicalize import Canonicalize
from xllm.passes.choose_buckets import ChooseBuckets
from xllm.passes.choose_kernels import ChooseKernels
from xllm.passes.fold_indices import FoldIndices
from xllm.passes.fold_weights import FoldWeights
from xllm.passes.fuse_activation import FuseActivation
from xllm.passes.fuse_add_rms_norm import FuseAddRmsNorm
from xllm.passes.fuse_gate_up import FuseGateUp
from xllm.passes.fuse_gated_delta import FuseGatedDelta
from xllm.passes.fuse_gated_linear import FuseGatedLinear
from xllm.passes.fuse_layer_norm import FuseLayerNorm
from xllm.passes.fuse_moe import FuseMoe
from xllm.passes.fuse_neighbour_rope import FuseNeighbourRope
from xllm.passes.fuse_qk_norm_rope import FuseQkNormRope
from xllm.passes.fuse_qkv import FuseQkv
from xllm.passes.fuse_rms_norm import FuseRmsNorm
from xllm.passes.fuse_rope import FuseRope
from xllm.passes.fuse_sdpa import FuseSdpa
from xllm.passes.plan_memory import PlanMemory
from xllm.passes.schedule_streams import ScheduleStreams
from xllm.passes.split_projections import SplitProjections
from xllm.passes.tabulate_positions import TabulatePositions

REWRITES: tuple[Pass, ...] = (
    Canonicalize(),
    FuseNeighbourRope(),
    TabulatePositions(),
    FuseLayerNorm(),
    FuseRmsNorm(),
    FuseAddRmsNorm(),
    FuseRope(),
    AbsorbMla(),
    SplitProjections(),
    FuseQkv(),
    FuseQkNormRope(),
    FuseGateUp(),
    FuseGatedDelta(),
    FuseMoe(),
    FuseGatedLinear(),
)
# What a function goes through: the rewrites that do not look for the state of a step.
FUNCTION_REWRITES: tuple[Pass, ...] = (
    Canonicalize(),
    FoldWeights(),
    FoldIndices(),
    FuseActivation(),
    FuseLayerNorm(),
    FuseRmsNorm(),
    FuseAddRmsNorm(),
    FuseRope(),
    FuseSdpa(),
    FuseGateUp(),
    FuseGatedLinear(),
)
PLANS: tuple[Pass, ...] = (
    ChooseKernels(),
    ChooseBuckets(),
    ScheduleStreams(),
    PlanMemory(),
)
REQUIRED = frozenset({"canonicalize", *(step.name() for step in PLANS)})


def without(passes: Sequence[Pass], disabled: Iterable[str]) -> tuple[Pass, ...]:
    """The passes less those named. Raises CompileError for an unknown name, one the pipeline cannot do without, and one
    of the other pipeline: nothing here would be left out.
    """
    known = {step.name() for step in (*REWRITES, *FUNCTION_REWRITES, *PLANS)}
    off = set(disabled)
    if unknown := sorted(off - known):
        raise CompileError(
            f"there is no pass named {', '.join(unknown)}", code="unknown-pass", try_="`xllm passes` lists them all"
        )
    if needed := sorted(off & REQUIRED):
        raise CompileError(
            f"{', '.join(needed)} cannot be left out: later passes need its result",
            code="required-pass",
            try_="passes that may be disabled: " + ", ".join(sorted(known - REQUIRED)),
        )
    running = {step.name() for step in passes}
    if absent := sorted(off - running):
        raise CompileError(
            f"{', '.join(absent)} does not run here",
            code="unknown-pass",
            try_="passes that may be disabled: " + ", ".join(sorted(running - REQUIRED)),
        )
    return tuple(step for step in passes if step.name() not in off)


def pipeline_text(passes: Iterable[Pass]) -> str:
    """The pipeline as recorded in the manifest; `parse_pipeline` gives the passes back."""
    return " ".join(step.spelled() for step in passes)


def parse_pipeline(text: str, added: Iterable[Pass] = ()) -> tuple[Pass, ...]:
    """The passes a pipeline string names, with their options; `added` are passes of modules it may name. Raises
    CompileError for an unknown name or option.
    """
    known = {step.spelled().partition("{")[0]: type(step) for step in (*REWRITES, *FUNCTION_REWRITES, *PLANS, *added)}
    passes = []
    for word in text.split():
        name = word.partition("{")[0]
        if name not in known:
            raise CompileError(
                f"there is no pass named {name}", code="unknown-pass", try_="`xllm passes` lists them all"
            )
        passes.append(with_options(known[name], word))
    return tuple(passes)


__all__ = [
    "FUNCTION_REWRITES",
    "PLANS",
    "REQUIRED",
    "REWRITES",
    "Context",
    "Outcome",
    "Pass",
    "Record",
    "parse_pipeline",
    "pipeline_text",
    "run_pipeline",
    "without",
]
