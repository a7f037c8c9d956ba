"""`xllm profile` and `xllm show --profile`: a time for every call, the host's part of a step, what is unexplained."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.checkpoints import write_checkpoint
from tests.artifacts import contents, write_small
from tests.models import FAMILIES
from xllm import cli
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.inspection.profile import operators, text
from xllm.measure.machine import Machine
from xllm.measure.profile import between, executor_steps, profile, summary
from xllm.measure.record import Profile, StepProfile, profile_path, read_profile
from xllm.measure.shape import Shape, usual_shapes
from xllm.runtime.executor import Limits
from xllm.targets.base import StepSizes
from xllm.targets.cpu import rates
from xllm.targets.cpu.bound import StepTimes
from xllm.targets.cpu.executor import CpuExecutor
from xllm.targets.cpu.tuning import ungated
from xllm.targets.predicted import target_of

DECODE = Shape(True, 2, 40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    checkpoint = write_checkpoint(folder / "tiny", FAMILIES["qwen3"], dtype="float32")
    compile_checkpoint(checkpoint, folder / "tiny.xllm", CompileOptions(max_batch_tokens=64, max_len=128, max_seqs=4))
    return folder / "tiny.xllm"


@pytest.fixture(scope="module")
def measured(path: Path) -> Profile:
    return profile(Artifact.open(path), [DECODE, Shape(False, 16, 8)], threads=2, seconds=0)


def test_every_call_has_a_time_and_nothing_names_the_machine_s_owner(path, measured) -> None:
    plan = Artifact.open(path).plan
    decode, prefill = measured.steps
    assert (decode.name, prefill.name) == ("decode 2 at 40", "prefill 16 at 8")
    assert (decode.sequences, prefill.sequences) == (((1, 39), (1, 39)), ((16, 8),))
    for step in measured.steps:
        assert len(step.calls) == len(plan.calls) and min(step.calls) >= 0 and sum(step.calls) > 0
        assert step.repeats >= 2 and step.host > 0 and step.step > step.host
    assert decode.engine_step and decode.engine_host and decode.engine_step > decode.engine_host > 0
    assert prefill.engine_step is None
    assert measured.machine.threads == 2 and measured.machine.read_bytes_per_second > 0
    known = {"schema", "artifact", "machine", "steps"}
    assert json.loads(measured.to_json()).keys() == known
    assert str(Path.home()).encode() not in measured.to_json() and str(path.parent).encode() not in measured.to_json()


@pytest.mark.parametrize(("tick", "repeats"), [(10.0, 2), (0.25, 3), (0.05, 8)])
def test_a_step_longer_than_all_should_take_runs_twice(path, tick, repeats) -> None:
    """A clock that goes on when it is asked: once at the start, once before and once after each step."""
    ticks, executor = itertools.count(), CpuExecutor(Artifact.open(path), 1)
    found = executor_steps(executor, DECODE, 1.0, "generate", lambda: tick * next(ticks))
    executor.close()
    assert found.repeats == repeats and found.step == pytest.approx(tick) and executor.times is None


def test_steps_are_timed_only_when_asked_and_give_the_same_tokens(path) -> None:
    """The native times of a step are part of it: they lie between its launch and its end."""
    from xllm.measure.profile import _batch

    executor = CpuExecutor(Artifact.open(path), 2)
    try:
        with _batch(executor, DECODE, "generate") as batch:
            plain = executor.launch(batch).result()
            assert executor.times is None
            executor.times = []
            timed = executor.launch(batch).result()
            (times,) = executor.times
        assert plain.tokens.tolist() == timed.tokens.tolist()
        assert times.tokens == 2 and (times.calls >= 0).all() and times.sample > 0
    finally:
        executor.close()


def test_medians_are_of_each_call_and_the_host_s_part_of_each_step() -> None:
    times = [StepTimes(1, np.array(calls), sample, 0.0) for calls, sample in (((1, 9), 1), ((2, 2), 2), ((3, 4), 9))]
    found = summary(DECODE, times, [12.0, 6.5, 17.0])
    assert found.calls == (2, 4) and found.sample == 2 and found.step == 12.0
    assert found.host == 1.0  # of 1, 0.5 and 1; not 12 - 2 - 4 - 2
    assert found.repeats == 3


def test_the_engine_s_part_is_between_the_ends_of_equal_steps() -> None:
    ends = [(2, 0.0), (2, 1.5), (30, 9.0), (2, 10.0), (2, 11.25), (2, 12.25), (1, 99.0)]
    times = [StepTimes(tokens, np.array([0.5]), 0.25, end) for tokens, end in ends]
    assert between(times, 2) == {"engine_step": 1.25, "engine_host": 0.5}
    assert between(times, 5) == {}


LIMITS = Limits(max_tokens_per_step=64, max_seqs=4, max_len=128, vocab=100)


@pytest.mark.parametrize(
    ("shape", "task", "why"),
    [
        (Shape(True, 5, 40), "generate", "decode 5 at 40: the artifact decodes 4 sequences together"),
        (Shape(True, 1, 97), "generate", "decode 1 at 97: a context of 1 to 96 tokens fits"),
        (Shape(True, 1, 0), "generate", "a context of 1 to 96 tokens fits"),
        (Shape(False, 65, 0), "generate", "prefill 65 at 0: a step of the artifact has 64 tokens"),
        (Shape(False, 64, 65), "embed", "a context of 1 to 128 tokens fits"),
        (Shape(True, 1, 40), "embed", "decodes nothing; try --prefill"),
    ],
)
def test_steps_that_the_artifact_cannot_run_are_refused(shape, task, why) -> None:
    with pytest.raises(ValueError, match=why):
        shape.check(LIMITS, task)


@pytest.mark.parametrize("task", ["generate", "embed"])
@pytest.mark.parametrize("limits", [LIMITS, replace(LIMITS, max_len=20), Limits(4096, 64, 4096, 100)])
def test_usual_shapes_fit_what_they_are_for(limits, task) -> None:
    shapes = usual_shapes(limits, task)
    for shape in shapes:
        shape.check(limits, task)
    assert not shapes[-1].decode


def made(artifact: Artifact, seconds) -> Profile:
    """A profile in which every call takes what `seconds` of its prediction gives."""
    sizes, target = StepSizes(DECODE.sequences), target_of(artifact)
    predicted = [target.seconds(call.cost, sizes, call.kernel) for call in artifact.plan.calls]
    calls = tuple(seconds(call.kernel, each) for call, each in zip(artifact.plan.calls, predicted, strict=True))
    step = StepProfile(DECODE.name, DECODE.sequences, 3, calls, 1e-5, sum(calls) + 2e-5, 1e-5, sum(calls) + 3e-5, 2e-5)
    return Profile(artifact.manifest["digest"], Machine("A CPU", "x86-64-v3", 2, 2e10, 1e11), (step,))


def test_operators_hold_all_calls_and_all_of_their_work(path) -> None:
    artifact = Artifact.open(path)
    held = made(artifact, lambda kernel, each: each)
    found = operators(artifact, target_of(artifact), held.machine, held.steps[0])
    sizes, calls = StepSizes(DECODE.sequences), artifact.plan.calls
    assert sum(one.calls for one in found) == len(calls) > len(found)
    assert sum(one.bytes for one in found) == sum(call.cost.bytes.at(sizes) for call in calls)
    assert sum(one.flops for one in found) == sum(call.cost.flops.at(sizes) for call in calls)
    assert sum(one.measured for one in found) == pytest.approx(sum(held.steps[0].calls))
    attention = next(one for one in found if one.kernel.startswith("attention"))
    layers = FAMILIES["qwen3"]["num_hidden_layers"]
    assert attention.calls == layers and attention.limit == "read"
    assert attention.bytes > layers * 80 * artifact.plan.kv.token_bytes / layers
    assert attention.share == pytest.approx(attention.bytes / 2e10 / attention.measured)


def test_the_limit_of_a_product_is_that_of_its_unit(path, monkeypatch) -> None:
    """Where a matrix unit multiplies, the same time of the same product is a smaller share of a higher limit."""
    artifact = Artifact.open(path)
    held = made(artifact, lambda kernel, each: each)
    plain = operators(artifact, target_of(artifact), held.machine, held.steps[0])
    fast = {"linear.f32": 16.0}
    monkeypatch.setitem(rates.UNITS, held.machine.level, fast)
    for before, after in zip(plain, operators(artifact, target_of(artifact), held.machine, held.steps[0]), strict=True):
        assert before.multiplying == pytest.approx(after.multiplying * fast.get(ungated(before.kernel), 1.0)), (
            before.name
        )
    assert any(one.kernel in fast for one in plain)
    assert (rates.unit_of("x86-64-v4-amx", "moe.bf16"), rates.unit_of("x86-64-v4-amx", "linear.i4")) == (16 / 3, 32)
    assert rates.unit_of("x86-64-v4-amx", "attention.bf16") == rates.unit_of("aarch64", "linear.i8") == 1


def test_the_table_says_what_is_unexplained(path) -> None:
    artifact = Artifact.open(path)
    explained = text(artifact, made(artifact, lambda kernel, each: each))
    assert "every prediction is within 25% of its time or 1% of the step's" in explained
    assert "predicted from what is usual at this level" in explained and "DECODE 2 AT 40" in explained
    odd = text(artifact, made(artifact, lambda kernel, each: each * (2 if kernel.startswith("attention") else 1)))
    assert "unexplained, predicted / measured: layers_*_self_attn_attention (0.50)" in odd
    assert "  calls take 0.000 more than was predicted of them (+0%)" in explained
    late = text(artifact, made(artifact, lambda kernel, each: 1.5 * each))
    assert " more than was predicted of them (+50%)" in late
    host = next(line for line in odd.splitlines() if line.startswith("  host 0.010 of "))
    assert "by the executor" in host and "by the engine's loop" in host


def test_the_commands_write_beside_the_artifact_and_read_from_there(path, capsys, tmp_path) -> None:
    before = contents(path)
    assert cli.main(["show", str(path), "--profile"]) == 2
    assert "run `xllm profile" in capsys.readouterr().err
    arguments = ["profile", str(path), "--decode", "1@20", "--prefill", "8", "--seconds", "1", "--threads", "1"]
    arguments += ["--cost-seconds", "0"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "DECODE 1 AT 20" in printed and "PREFILL 8 AT 0" in printed
    assert contents(path) == before
    assert cli.main(["show", str(path), "--profile"]) == 0
    assert printed == capsys.readouterr().out + f"wrote {profile_path(path)}\n"
    cli.main(["explain", str(path)])
    assert "PROFILE  tiny.xllm.profile.json" in capsys.readouterr().out
    elsewhere = profile_path(path).rename(tmp_path / "moved.json")
    assert cli.main(["show", str(path), "--profile", str(elsewhere)]) == 0
    assert cli.main(["show", str(path), "--profile", str(elsewhere), "--dot"]) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda body: b"{", "is no profile"),
        (lambda body: body.replace(b'"schema": 1', b'"schema": 7'), "not of schema 1"),
        (lambda body: body.replace(b'"threads": 2', b'"threads": "two"'), "is no profile.*threads"),
        (lambda body: body.replace(b'"calls": [', b'"calls": [1.0, '), "has not a time for each"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(path, tmp_path, change, why) -> None:
    artifact = Artifact.open(path)
    file = tmp_path / "p.json"
    file.write_bytes(change(made(artifact, lambda kernel, each: each).to_json()))
    with pytest.raises(ArtifactError, match=why):
        read_profile(file, artifact)


def test_a_profile_of_another_artifact_is_refused(path, tmp_path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(made(Artifact.open(path), lambda kernel, each: each).to_json())
    with pytest.raises(ArtifactError, match="of another artifact"):
        read_profile(file, Artifact.open(write_small(tmp_path / "small")))
