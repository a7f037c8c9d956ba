"""No call of a function's plan reaches outside the memory it names, whatever sizes and strides a file claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.frontend.onnx_models import MODELS, exported
from xllm.artifact import Artifact
from xllm.functions import compile_onnx
from xllm.plan import Call, Plan
from xllm.targets.cpu.bounds import check_function

NO_SIZES = {"act", "start", "number", "causal", "heads_first", "interleaved"}  # with any value nothing further is read


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    out = tmp_path_factory.mktemp("bounds") / "out.xllm"
    report = compile_onnx(
        exported("llama-past"), out, dict.fromkeys(MODELS["llama-past"][1], 16), disable=("fuse-rope",)
    )
    assert report.fallbacks == ()
    return Artifact.open(out).plan


def test_a_compiled_plan_stays_inside_at_all_sizes(plan: Plan) -> None:
    for sizes in ((16, 16, 16, 16), (1, 1, 1, 0), (3, 5, 7, 2), (0, 0, 0, 0)):
        check_function(plan, dict(zip(plan.buckets[0].sizes, sizes, strict=True)))


def test_sizes_and_strides_that_reach_further_are_refused(plan: Plan) -> None:
    """Every number of every call, far too large; and one more of its rows."""
    limits, tried, kernels = plan.buckets[0].sizes, 0, set()
    for index, call in enumerate(plan.calls):
        grown = [replace(call, rows=call.rows.times(1 << 20))]
        for name in {**call.ints, **call.extents}.keys() - NO_SIZES:
            rest = {key: size for key, size in call.extents.items() if key != name}
            size = 0xFFF if name == "scaled" else 1 << 40
            grown.append(replace(call, ints={**call.ints, name: size}, extents=rest))
        for changed in grown:
            if _moves(changed, limits) == _moves(call, limits):
                continue
            tried, kernels = tried + 1, kernels | {call.kernel}
            calls = (*plan.calls[:index], changed, *plan.calls[index + 1 :])
            with pytest.raises(ValueError, match=r"needs|beyond|size"):
                check_function(replace(plan, calls=calls), limits)
    assert tried > 300 and {"strided_where.f32", "take.u8", "cast_u8.i64", "copy.f32", "range.i64"} <= kernels


def _moves(call: Call, limits: Mapping[str, int]) -> tuple[int, ...]:
    """What a call goes by: strides along axes of one element are never taken, nor do they count in a single row."""
    ints, rows = call.ints_at(limits), call.rows.at(limits)
    still = {name for name in ints if name[-2:] in ("_0", "_1", "_2") and ints[f"n{name[-1]}"] == 1}
    still |= {name for name in ints if call.args.get(name.rpartition("_")[0]) == ""}  # kernels refuse those of numbers
    if rows == 1:
        still |= {name for name in ints if name.endswith("_row")}
    if rows == 1 or all(ints.get(f"n{axis}") == 1 for axis in range(3)):
        still.add("scaled")
    return (rows, *(size for name, size in ints.items() if name not in still))
