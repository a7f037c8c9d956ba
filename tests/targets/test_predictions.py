"""What times are predicted from: the sizes of a step, curves of kernels, and the table that holds them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.artifacts import reseal, write_small
from xllm.artifact import Artifact, ArtifactError, ArtifactWriter
from xllm.kernels import cpu
from xllm.targets.base import TOKENS, Cost, LayerState, Lowering, Operation, StepSizes, Tensor, within
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.rates import GFLOPS, MEMORY_GBPS, usual
from xllm.targets.cpu.tuning import ROUND, Curve, Tuning
from xllm.targets.predicted import TUNING, predicted_cost, target_of


@pytest.mark.parametrize("window", [0, 1, 3, 4, 7, 100])
@pytest.mark.parametrize("sequences", [[(1, 0)], [(1, 6)], [(5, 0)], [(4, 3), (1, 9)], [(2, 50), (9, 1), (0, 4)]])
def test_the_sizes_of_a_step_are_what_counting_gives(sequences, window) -> None:
    sizes = StepSizes(sequences)
    seen = [
        {token for token in range(position + 1) if not window or position - token < window}
        for tokens, past in sequences
        for position in range(past, past + tokens)
    ]
    read = [
        set().union(*({t for t in range(p + 1) if not window or p - t < window} for p in range(past, past + tokens)))
        for tokens, past in sequences
    ]
    both = sum(
        not window or abs(one - other) < window
        for tokens, _ in sequences
        for one in range(tokens)
        for other in range(tokens)
    )
    assert (sizes["T"], sizes["S"]) == (sum(tokens for tokens, _ in sequences), len(sequences))
    assert within("P", window).at(sizes) == sum(map(len, seen))
    assert within("K", window).at(sizes) == sum(map(len, read))
    assert within("A", window).at(sizes) == both
    with pytest.raises(KeyError):
        sizes["T1"]


def test_a_usual_step_has_the_tokens_and_rows_it_is_said_to_have() -> None:
    for tokens, wanted in ((1, 1), (7, 3), (512, 64), (300, 1), (2, 0)):
        sizes = StepSizes.usual(tokens, wanted)
        assert (sizes["T"], sizes["S"]) == (tokens, wanted)
        assert sizes["K"] >= 256 and sizes["P"] >= tokens


@pytest.mark.parametrize(("dtype", "head_token_bytes"), [("float32", 512), ("bfloat16", 256), ("int8", 128 + 2 * 4)])
def test_attention_reads_its_context_and_computes_its_pairs(dtype: str, head_token_bytes: int) -> None:
    q = Tensor("q", "value", (TOKENS, 4, 64), "float32")
    args = {
        "q": q,
        "sinks": None,
        "kv_heads": 2,
        "value_dim": 64,
        "window": 0,
        "scale": 1.0,
        "softcap": 0.0,
        "layer": 0,
    }
    kv = CpuTarget("x").kv_layout((LayerState(2, 64, 64),), dtype)
    assert kv.token_bytes == 2 * head_token_bytes
    found = CpuTarget("x").lower(Operation("a", "xllm.attention", args, (q,)), kv, "float32")
    assert isinstance(found, Lowering)
    for past in (0, 999):
        sizes = StepSizes([(1, past)])
        assert found.cost.flops.at(sizes) == 4 * 64 * 4 * (past + 1)
        assert found.cost.bytes.at(sizes) == kv.token_bytes * (past + 1) + 2 * 4 * 4 * 64


CURVE = Curve(1e-6, ((1.0, 1e-10), (10.0, 2e-10), (100.0, 1e-9)))


def test_a_curve_is_flat_then_between_its_points_then_grows_with_the_operations() -> None:
    def each(intensity: float) -> float:
        return (CURVE.seconds(1000, 1000 * intensity) - CURVE.call_seconds) / 1000

    wanted = {0.0: 1e-10, 0.5: 1e-10, 1.0: 1e-10, 5.5: 1.5e-10, 10.0: 2e-10, 55.0: 6e-10, 100.0: 1e-9, 300.0: 3e-9}
    for intensity, seconds in wanted.items():
        assert math.isclose(each(intensity), seconds, rel_tol=1e-9), intensity
    assert CURVE.seconds(0, 0) == 1e-6


def table(**changes) -> Tuning:
    held = Tuning("A CPU", "x86-64-v3", 2, {"L2": 1 << 19}, 2e10, 8e10, 1e-6, {"linear.bf16": CURVE})
    return replace(held, **changes)


def test_a_target_predicts_by_the_kernel_s_curve_or_by_the_limits() -> None:
    target, cost, sizes = CpuTarget("x86-64-v3", tuning=table()), Cost(TOKENS.times(800), TOKENS.times(100)), {"T": 3}
    assert target.seconds(cost, sizes, "linear.bf16") == CURVE.seconds(300, 2400)
    assert target.seconds(cost, sizes, "gated_linear.bf16") == CURVE.seconds(300, 2400)
    assert target.seconds(cost, sizes, "rms_norm.f32") == 1e-6 + 2400 / 8e10
    assert target.seconds(cost, sizes) == target.seconds(cost, sizes, "of.nobody")
    assert CpuTarget("x86-64-v3").seconds(cost, sizes) == 3e-6 + 2400 / 90e9
    assert CpuTarget("aarch64").seconds(cost, sizes) == 3e-6 + 2400 / 150e9


def test_where_nothing_was_measured_a_level_has_its_usual_rates() -> None:
    """512 rows of a linear multiply, one waits for its weights; rounded rows are for levels that multiply them."""
    rows, weights = 512, 1024 * 3072
    for level in set(cpu.levels()) - {"aarch64"}:  # which has round figures
        assert level in GFLOPS, level
        many, one = (usual(level).seconds("linear.i8", 1.1 * weights, 2.0 * weights * n) for n in (rows, 1))
        assert many == pytest.approx(2 * weights * rows / (GFLOPS[level][2] * 1e9), rel=0.02)
        read = MEMORY_GBPS.get(level, 20) * 1e9 / (2 if level == "x86-64-v2" else 1)
        assert one == pytest.approx(1.1 * weights / read, rel=0.05)
    for kernel in (
        "linear.bf16",
        "linear.i8",
        "linear_rounded.i8",
        "linear_rounded_row.i8",
        "linear_rounded.i4",
        "attention.bf16",
    ):
        at = [usual(level).seconds(kernel, 1e6, 1e10) for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4-amx")]
        assert at == sorted(at, reverse=True)


def test_a_table_is_the_same_after_it_was_written() -> None:
    for held in (ROUND, table()):
        assert Tuning.from_json(held.to_json()) == held
        assert Tuning.from_json(held.to_json()).to_json() == held.to_json()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[]", "Expected `object`"),
        (b"{", "truncated"),
        (b"\xff", "malformed"),
        (table().to_json().replace(b'"schema": 2', b'"schema": 9'), "not of schema 2"),
        (table().to_json().replace(b"20000000000.0", b"-1"), "read_bytes_per_second"),
    ],
)
def test_what_is_no_table_is_refused(text, why) -> None:
    with pytest.raises(ValueError, match=why):
        Tuning.from_json(text)


@pytest.mark.parametrize("points", [(), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 2.0))])
def test_a_curve_whose_points_do_not_grow_is_refused(points) -> None:
    with pytest.raises(ValueError, match=r"points of linear\.bf16 do not grow"):
        replace(table(), kernels={"linear.bf16": Curve(1.0, points)})


def test_an_artifact_predicts_from_the_table_in_it(tmp_path) -> None:
    path = write_small(tmp_path / "small")
    assert target_of(Artifact.open(path)).tuning is None
    for text in (table().to_json(), b"{}"):
        writer = ArtifactWriter(path)
        writer.write(TUNING, text)
        reseal(path, lambda manifest, made=writer._files: manifest["files"].update(made))
        if text == b"{}":
            with pytest.raises(ArtifactError, match=r"tuning\.json: .*compile again"):
                target_of(Artifact.open(path))
        else:
            assert target_of(Artifact.open(path)) == CpuTarget("x86-64-v3", tuning=table())


def test_what_stands_in_for_a_fitted_model_says_what_the_calls_cost(tmp_path) -> None:
    artifact = Artifact.open(write_small(tmp_path))
    target, most = target_of(artifact), artifact.plan.buckets[-1].T
    cost = predicted_cost(artifact)
    for tokens in (1, most):
        sizes = StepSizes([(tokens, 0)], 1)
        whole = sum(target.seconds(call.cost, sizes, call.kernel) for call in artifact.plan.calls)
        assert cost.seconds([(0, tokens)], 1) == pytest.approx(whole, rel=0.1)
