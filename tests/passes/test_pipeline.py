"""The list of passes: names, spelling, blame, and the same result in every process."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from tests.ir.small import attend, small, xllm
from tests.passes.zoo import CONTEXT, planned
from xllm.errors import CompileError
from xllm.ir import Program, Weight
from xllm.passes import PLANS, REWRITES, Context, Outcome, Pass, parse_pipeline, pipeline_text, run_pipeline
from xllm.passes.choose_buckets import ChooseBuckets
from xllm.passes.fuse_add_rms_norm import FuseAddRmsNorm
from xllm.passes.fuse_qk_norm_rope import FuseQkNormRope
from xllm.passes.fuse_qkv import FuseQkv

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("step", [*REWRITES, *PLANS], ids=lambda step: step.name())
def test_names_are_derived(step: Pass) -> None:
    words = re.findall("[A-Z][a-z]*", type(step).__name__)
    assert step.name() == "-".join(words).lower()
    assert type(step).__module__ == "xllm.passes." + "_".join(words).lower()


def test_a_pass_is_named_as_the_documents_name_it() -> None:
    assert FuseAddRmsNorm.name() == "fuse-add-rms-norm"


def test_the_pipeline_round_trips() -> None:
    passes = (*REWRITES, ChooseBuckets(count=3), *PLANS)
    assert parse_pipeline(pipeline_text(passes)) == passes
    assert pipeline_text([ChooseBuckets()]) == "choose-buckets{count=5}"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("fuse-all", "unknown-pass"),
        ("choose-buckets{size=3}", "bad-option"),
        ("choose-buckets{count=few}", "bad-option"),
        ("choose-buckets{count=0}", "bad-option"),
        ("canonicalize{count=1}", "bad-option"),
    ],
)
def test_a_pipeline_with_a_mistake_is_refused(text: str, code: str) -> None:
    with pytest.raises(CompileError) as caught:
        parse_pipeline(text)
    assert caught.value.code == code


# --- blame ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropWrites(Pass):
    """A rewrite that forgets what must not be forgotten."""

    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        for node in list(program.calls()):
            if node.target is xllm.kv_write.default:
                program.graph.erase_node(node)
        return Outcome(program)


@dataclass(frozen=True)
class PlanThatRenames(Pass):
    """A plan that changes the program it plans for."""

    kind: ClassVar[Literal["rewrite", "plan"]] = "plan"

    def run(self, program: Program, context: Context) -> Outcome:
        held = program.weights["lm_head.weight"]
        program.weights["lm_head.weight"] = Weight(held.shape, replace(held.rule, names=("other",)))  # pyright: ignore
        return Outcome(program)


@dataclass(frozen=True)
class Stumble(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        raise KeyError("lost")


def test_a_rewrite_that_breaks_the_program_is_named() -> None:
    program = small(attend)
    with pytest.raises(CompileError) as caught:
        run_pipeline(program, [FuseQkv(), DropWrites(), FuseQkNormRope()], CONTEXT)
    error = caught.value
    assert (error.code, error.pass_name) == ("broken-program", "drop-writes")
    assert error.node == "attention"
    assert "reads the state of layer 0 before anything is written there" in str(error)
    assert "ran before: fuse-qkv)" in str(error)


def test_a_program_that_arrives_broken_is_not_blamed_on_a_pass() -> None:
    program = small(attend)
    DropWrites().run(program, CONTEXT)
    with pytest.raises(CompileError, match=r"^the captured program: reads the state"):
        run_pipeline(program, REWRITES, CONTEXT)


def test_a_plan_that_changes_the_program_is_refused() -> None:
    with pytest.raises(CompileError, match="plan-that-renames: a plan changed the graph") as caught:
        run_pipeline(small(attend), [PlanThatRenames()], CONTEXT)
    assert caught.value.code == "broken-pass"


def test_a_pass_that_stumbles_is_named() -> None:
    with pytest.raises(CompileError, match=r"stumble: the pass failed with KeyError: 'lost'; try: --disable-pass"):
        run_pipeline(small(attend), [FuseQkv(), Stumble()], CONTEXT)


def test_rewrites_leave_the_program_they_are_given_alone() -> None:
    program = small(attend)
    before = [node.name for node in program.graph.nodes]
    run_pipeline(program, REWRITES, CONTEXT)
    assert [node.name for node in program.graph.nodes] == before


def test_a_target_without_the_kernel_keeps_the_parts() -> None:
    context = replace(CONTEXT, target=replace(CONTEXT.target, fuses=frozenset()))  # pyright: ignore
    _, records = run_pipeline(small(attend), [FuseQkv(), FuseQkNormRope()], context)
    assert records[1].hits == 0
    assert records[1].misses == (("attention", "target cpu has no kernel for the fused form"),)


# --- the same everywhere ----------------------------------------------------------------------------------------------

PRINT_PLAN = """
import hashlib
from tests.passes.zoo import planned
from xllm.ir.show import digest
program, plan = planned("qwen3")
print(digest(program), hashlib.sha256(plan.to_json().encode()).hexdigest())
"""


def test_another_process_with_another_hash_seed_gives_the_same() -> None:
    import hashlib

    from xllm.ir.show import digest

    program, plan = planned("qwen3")
    here = f"{digest(program)} {hashlib.sha256(plan.to_json().encode()).hexdigest()}"
    seed = "1" if hash("xllm") % 2 else "2"
    there = subprocess.run(
        [sys.executable, "-c", PRINT_PLAN],
        cwd=ROOT, env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert there.stdout.split()[-2:] == here.split()
