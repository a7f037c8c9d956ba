"""Every rewrite on real models: it hits where it should, computes the same, and its effect is on file to read."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.passes.zoo import CONTEXT, FAMILIES, captured, planned, rewritten
from xllm.errors import CompileError
from xllm.frontend.stamp import stamp
from xllm.ir import Program, Weight
from xllm.ir.show import text
from xllm.ir.weight_rules import rule_text
from xllm.passes import FUNCTION_REWRITES, PLANS, REQUIRED, REWRITES, run_pipeline, without
from xllm.passes.base import Record
from xllm.passes.debug import dump_planned
from xllm.passes.numerics import check_same, random_sources

GOLDEN = Path(__file__).parent / "golden"
OPTIONAL = [step.name() for step in REWRITES if step.name() not in REQUIRED]
# Passes for what few families have: they hit in these, and have nothing to say of the others.
ONLY = {
    "tabulate-positions": ("glm4",),
    "fuse-layer-norm": ("cohere",),
    "fuse-moe": ("qwen3_moe", "gpt_oss"),
    "fuse-gated-delta": ("qwen3_next",),
    "split-projections": ("qwen3_next", "gpt_neox", "deepseek_v2", "deepseek_v3"),
    **{name: ("deepseek_v3", "deepseek_v2") for name in ("fuse-neighbour-rope", "absorb-mla")},
}
# Passes that find nothing in a family, and why. Every other pass must hit.
NOTHING: dict[str, dict[str, str]] = {
    "qwen3_moe": {"fuse-gate-up": "", "fuse-gated-linear": ""},
    "olmo2": {"fuse-qk-norm-rope": "the norm at %layers_0_self_attn_q_norm_rms_norm spans all heads, not one"},
    "stablelm": {"fuse-rms-norm": "", "fuse-add-rms-norm": ""},
    "gpt_oss": {"fuse-gate-up": "", "fuse-gated-linear": ""},
    "phi3": {
        "fuse-qkv": "query, key and value do not come from three projections",
    },
    "cohere": {
        "fuse-rms-norm": "",
        "fuse-add-rms-norm": "",
        "fuse-qk-norm-rope": "%layers_0_self_attn_q_norm_layer_norm is not a part of one fused projection",
    },
    "gpt_neox": {
        "fuse-rms-norm": "",
        "fuse-add-rms-norm": "",
        "fuse-gate-up": "expected aten.mul.Tensor, found %layers_0_mlp_dense_4h_to_h_linear_2 (xllm.linear.default)",
        "fuse-gated-linear": "",
    },
    **{name: {"fuse-rope": "", "fuse-qkv": "", "fuse-qk-norm-rope": ""} for name in ("deepseek_v2", "deepseek_v3")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pass_computes_the_same(family: str) -> None:
    stages, records = rewritten(family)
    sources = random_sources(stages[0])
    for (before, after), record in zip(pairwise(stages), records, strict=True):
        check_same(before, after, record.name, sources)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_pass_hits_or_says_why_not(family: str) -> None:
    for record in rewritten(family)[1]:
        expected = NOTHING.get(family, {}).get(record.name)
        if record.name in ONLY:
            expected = None if family in ONLY[record.name] else ""
        assert bool(record.hits) == (expected is None), record
        if expected is not None:
            assert [why for _, why in record.misses][:1] == ([expected] if expected else []), record
        assert (record.before != record.after) == bool(record.hits)


def test_a_listed_pass_without_a_hit_is_dead() -> None:
    hits = {record.name for family in FAMILIES for record in rewritten(family)[1] if record.hits}
    assert hits == {step.name() for step in REWRITES}


@pytest.mark.parametrize("family", FAMILIES)
def test_running_again_changes_nothing(family: str) -> None:
    once = rewritten(family)[0][-1]
    again, records = run_pipeline(once, REWRITES, CONTEXT)
    assert text(again) == text(once)
    assert [record.name for record in records if record.hits] == []


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_leaving_a_pass_out_still_compiles(family: str, name: str) -> None:
    program, records = run_pipeline(captured(family), without(REWRITES, [name]), CONTEXT)
    assert name not in {record.name for record in records}
    check_same(captured(family), program, f"all but {name}", random_sources(captured(family)))
    run_pipeline(stamp(program), PLANS, CONTEXT)


def test_leaving_out_is_refused_by_name() -> None:
    with pytest.raises(CompileError, match=r"no pass named fuse-all.*\[unknown-pass\]"):
        without(REWRITES, ["fuse-all"])
    for passes, other in ((REWRITES, "fuse-sdpa"), (FUNCTION_REWRITES, "fuse-moe")):
        with pytest.raises(CompileError, match=f"{other} does not run here; try: passes that may be disabled: "):
            without(passes, [other])
    for name in REQUIRED:
        with pytest.raises(CompileError, match=rf"{name} cannot be left out.*\[required-pass\]"):
            without(REWRITES, [name])


@pytest.mark.parametrize("index", range(len(REWRITES)), ids=[step.name() for step in REWRITES])
def test_golden(index: int, golden: Callable[[Path, str], None]) -> None:
    stages, records = rewritten(ONLY.get(REWRITES[index].name(), ("qwen3",))[0])
    record = records[index]
    before, after = stages[index], stages[index + 1]
    parts = (_report(record), "// before", text(before), "// after", text(after), _new_weights(before, after))
    golden(GOLDEN / f"{record.name}.ir", "\n".join(parts))


def test_golden_plan(golden: Callable[[Path, str], None]) -> None:
    """Kernels, streams and addresses, as `xllm show` prints them."""
    program, plan = planned("qwen3")
    golden(GOLDEN / "planned.ir", dump_planned(program, plan, CONTEXT.target.name)[""])


def test_golden_misses(golden: Callable[[Path, str], None]) -> None:
    """What the passes nearly matched in families they do not serve in full: the list of what to do next."""
    missed = [f"{family}\n{_report(r)}\n" for family in FAMILIES for r in rewritten(family)[1] if r.misses]
    golden(GOLDEN / "misses.txt", "".join(missed))


def _report(record: Record) -> str:
    lines = [f"// {record.name}: {record.hits} hits", *(f"//   miss at %{node}: {why}" for node, why in record.misses)]
    return "\n".join(lines)


def _new_weights(before: Program, after: Program) -> str:
    def line(name: str, weight: Weight) -> str:
        return f"// weight {name} {list(weight.shape)} = {rule_text(weight.rule)}\n"

    return "".join(line(n, w) for n, w in sorted(after.weights.items()) if before.weights.get(n) != w)
