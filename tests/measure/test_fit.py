"""The cost model that `xllm profile` fits: it finds what a device costs behind noise, lies beside the artifact, and is
used where it fits only."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.artifacts import contents, write_small
from tests.models import FAMILIES, build
from tests.servers import serving
from xllm import cli
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.llm import STEP_SECONDS, engine_config, tokens_beside_decodes
from xllm.measure.fit import Shapes, doubling, errors, fit, measure, non_negative, windows_of
from xllm.measure.machine import thread_times, undisturbed
from xllm.memory import plan_memory
from xllm.offline import LLM
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.executor import Limits
from xllm.targets import host
from xllm.targets.base import USUAL_CONTEXT
from xllm.targets.fitted import Fidelity, Fitted, cost_of, cost_path

LIMITS = Limits(max_tokens_per_step=512, max_seqs=32, max_len=2048, vocab=100)
ROOM = 16384


class Device:
    """Steps take what a known model says, 2 in 100 more or less, and now and then much more; its clock is their sum."""

    def __init__(self, cost: StepCost, seed: int) -> None:
        self.cost, self.chance, self.now = cost, random.Random(seed), 0.0

    def run(self, step) -> float:
        took = self.cost.seconds(step.rows, step.sampled) * self.chance.uniform(0.98, 1.02)
        took *= self.chance.choice((1.0,) * 9 + (2.5,))
        self.now += took
        return took

    def clock(self) -> float:
        return self.now


def known(seed: int, windows: tuple[int, ...]) -> StepCost:
    """Figures of the size that a machine has: weights are read once, then it multiplies; no part is seen alone."""
    chance, basis = random.Random(seed), Basis(doubling(512), doubling(32), windows)
    seconds = [chance.uniform(5e-3, 2e-2), chance.uniform(0, 2e-4)]
    seconds += [chance.uniform(0, 1e-3) if knot < 16 else chance.uniform(1e-3, 3e-3) for knot in basis.tokens]
    seconds += [chance.uniform(0, 1e-3) for _ in basis.sampled]
    seconds += [chance.uniform(1e-7, 1e-5) for _ in range(2 * len(windows))]
    return StepCost(basis, tuple(seconds))


@pytest.mark.parametrize("seed", range(6))
def test_the_fit_finds_what_a_device_costs(seed: int) -> None:
    windows = ((0,), (0, 256), ())[seed % 3]
    device = Device(known(seed, windows), seed)
    largest, fidelity, cost = fit(device.run, windows, LIMITS, ROOM, 300.0, device.clock)
    assert largest == 512 and fidelity.held_out >= 20 and fidelity.fitted >= 60
    assert fidelity.median_error < 0.03 and fidelity.p90_error < 0.1
    fresh = list(Shapes(LIMITS, ROOM, 512).drawn(random.Random(99), 200, 512))
    truth = [device.cost.seconds(step.rows, step.sampled) for step in fresh]
    assert np.median(errors(cost, fresh, truth)) < 0.03, "the error told is that of steps it has not seen"
    assert np.percentile(errors(cost, fresh, truth), 90) < 0.1


def test_a_device_that_no_model_explains_is_told_so() -> None:
    device = Device(known(1, (0,)), 1)
    _, fidelity, _ = fit(
        lambda step: device.run(step) * (1 + step.tokens * 7919 % 13), (0,), LIMITS, ROOM, 100.0, device.clock
    )
    assert fidelity.median_error > 0.2


def test_a_slow_device_is_asked_for_less() -> None:
    """Steps of seconds: the largest are left out, and every step runs once at least."""
    quick = known(2, (0,))
    device = Device(replace(quick, seconds_of=tuple(40 * each for each in quick.seconds_of)), 2)
    largest, fidelity, _ = fit(device.run, (0,), LIMITS, ROOM, 30.0, device.clock)
    assert largest == 64 and fidelity.held_out == 8
    assert device.now < 400


def test_steps_take_turns_and_none_is_left_out() -> None:
    shapes = Shapes(LIMITS, ROOM, 512)
    steps = [*shapes.designed(), *shapes.drawn(random.Random(0), 50, 512)]
    ran = []

    def run(step) -> float:
        ran.append(step)
        return 1.0 if step is steps[0] else 0.1

    times = measure(run, steps, 60.0, lambda: 0.1 * len(ran))
    assert min(map(len, times)) >= 2 and len(times[0]) == 2, "what takes long runs as long, not as often"
    assert set(ran[: len(steps)]) == set(steps) and ran[: len(steps)] != ran[len(steps) : 2 * len(steps)]


@pytest.mark.parametrize(
    "limits", [LIMITS, replace(LIMITS, max_len=20), Limits(4096, 64, 4096, 9), replace(LIMITS, max_seqs=1)]
)
@pytest.mark.parametrize("room", [200, 100_000])
def test_steps_are_what_the_artifact_takes(limits: Limits, room: int) -> None:
    shapes = Shapes(limits, room, limits.max_tokens_per_step)
    steps = [*shapes.designed(), *shapes.drawn(random.Random(1), 100, limits.max_tokens_per_step)]
    assert len(steps) > 30
    for step in steps:
        assert 1 <= len(step.rows) <= limits.max_seqs and 0 <= step.sampled <= len(step.rows)
        assert step.tokens <= limits.max_tokens_per_step and step.context <= room
        assert all(new >= 1 and past >= 0 and past + new <= limits.max_len for past, new in step.rows)


def test_what_threads_waited_for_a_core_is_no_part_of_a_step() -> None:
    before, ms = {"1": (0, 0), "2": (100, 7), "3": (100, 9)}, 10**6
    after = {"1": (10, 90 * ms), "2": (30 * ms, 20 * ms + 7), "3": (28 * ms, 15 * ms + 9), "4": (99 * ms, 99 * ms)}
    assert undisturbed(0.05, before, after, 2) == pytest.approx(0.035), "not of who hardly ran, or is new"
    assert undisturbed(0.05, before, after, 1) == pytest.approx(0.03)
    assert undisturbed(0.031, before, after, 2) == pytest.approx(0.03, abs=1e-6), "a thread ran as long"
    assert undisturbed(0.02, before, after, 2) == 0.02 and undisturbed(0.009, before, after, 2) == 0.009
    assert undisturbed(0.05, {}, after, 2) == undisturbed(0.05, {}, {}, 2) == 0.05
    began = thread_times()
    assert undisturbed(1.0, began, thread_times(), 1) <= 1.0
    assert all(run >= 0 and wait >= 0 for run, wait in began.values())


def test_least_squares_have_no_negative_coefficients() -> None:
    """Karush-Kuhn-Tucker: no gain along what is free, none upwards along what is held at zero."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        matrix, target = generator.normal(size=(20, 6)), generator.normal(size=20)
        found = non_negative(matrix, target)
        gain = matrix.T @ (target - matrix @ found)
        assert (found >= 0).all() and (gain <= 1e-8).all()
        assert np.abs(gain[found > 0]).max(initial=0) < 1e-8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = CompileOptions(max_batch_tokens=64, max_len=128, max_seqs=4)
    return build(tmp_path_factory.mktemp("fit"), FAMILIES["qwen3"], options=options)[1]


def made(artifact: Artifact, threads: int = 2, each: float = 1e-3) -> Fitted:
    """A model by which a token takes `each` seconds, and nothing else anything."""
    basis = Basis((1,), (1,), windows_of(artifact))
    cost = StepCost(basis, (0.0, 0.0, each, *[0.0] * (basis.size - 3)))
    fidelity = Fidelity(20, 60, 0.04, 0.11, 0.02)
    return Fitted(artifact.manifest["digest"], host.cpu_model(), threads, 64, fidelity, cost)


def test_a_file_is_read_as_it_was_written_and_used_where_it_fits(path: Path) -> None:
    artifact = Artifact.open(path)
    assert cost_of(artifact, 2)[0] is None and "run `xllm profile" in cost_of(artifact, 2)[1]
    fitted = made(artifact)
    assert Fitted.from_json(fitted.to_json()) == fitted
    cost_path(path).write_bytes(fitted.to_json())
    assert cost_of(artifact, 2) == (fitted.cost, "tiny.xllm.cost.json, off by 4.0% (median) and 11.0% (90 of 100) of 20"
                                    " steps it was not fitted to")  # fmt: skip
    for change, why in (
        ({"artifact": "0" * 64}, "of artifact 000000000000, here it is "),
        ({"cpu": "Another CPU"}, "of CPU Another CPU, here it is "),
        ({"threads": 3}, "of number of threads 3, here it is 2"),
    ):
        cost_path(path).write_bytes(replace(fitted, **change).to_json())
        cost, said = cost_of(artifact, 2)
        assert cost is None and why in said and "is not used" in said
    cost_path(path).unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda body: b"{", "no cost model"),
        (lambda body: b"[" * 100_000, "no cost model"),
        (lambda body: b"\xff", "no cost model"),
        (lambda body: b" " * (2 << 20), "more than 1048576 bytes"),
        (lambda body: body.replace(b'"schema": 1', b'"schema": 9'), "not of schema 1"),
        (lambda body: body.replace(b"0.001", b"-0.001"), "seconds_of must be"),
        (lambda body: body.replace(b"0.001", b"1e999"), "no cost model"),
        (lambda body: body.replace(b'"threads": 2', b'"threads": 0'), "threads"),
        (lambda body: body.replace(b'"median_error": 0.04', b'"median_error": "small"'), "median_error"),
        (lambda body: body.replace(b'"sampled": [\n    1', b'"sampled": [\n    1,\n    1'), "sampled must be"),
    ],
)
def test_a_file_that_is_no_model_is_not_used_and_said_so(path: Path, change, why: str) -> None:
    artifact = Artifact.open(path)
    body = change(made(artifact).to_json())
    assert body != made(artifact).to_json()
    cost_path(path).write_bytes(body)
    cost, said = cost_of(artifact, 2)
    assert cost is None and why in said and "is not used" in said
    cost_path(path).unlink()


def test_the_engine_decides_by_it(path: Path) -> None:
    artifact = Artifact.open(path)
    fast, slow = made(artifact, each=1e-6).cost, made(artifact, each=STEP_SECONDS / 33).cost
    assert tokens_beside_decodes(artifact, fast) == 64 == artifact.plan.buckets[-1].T
    assert tokens_beside_decodes(artifact, slow) == 32, "one more decodes"
    assert slow.seconds([(USUAL_CONTEXT, 1), (0, 32)]) <= STEP_SECONDS
    assert tokens_beside_decodes(artifact, made(artifact, each=1.0).cost) == 16
    config = engine_config(artifact, plan_memory(artifact, 256 << 20), cost=slow)
    assert config.max_beside_decodes == 32 and config.cost is slow


def test_the_command_writes_beside_the_artifact_what_serving_uses(path: Path, capsys) -> None:
    before = contents(path)
    arguments = ["profile", str(path), "--decode", "1@20", "--seconds", "1", "--threads", "1", "--cost-seconds", "1"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert contents(path) == before, "the artifact is sealed"
    told = re.search(r"of (\d+) steps held out it is off by ([\d.]+)% \(median\) and ([\d.]+)% \(90 of 100\)", said)
    assert told and int(told[1]) >= 8
    artifact = Artifact.open(path)
    cost, why = cost_of(artifact, 1)
    assert cost is not None and f"off by {told[2]}% (median)" in why
    held = json.loads(cost_path(path).read_text())["fidelity"]
    assert held["held_out"] == int(told[1]) and f"{held['p90_error']:.1%}" == f"{told[3]}%"
    assert 0 < cost.seconds([(20, 1)]) <= cost.seconds([(20, 1), (0, 60)])
    for threads, used in ((1, cost), (2, None)):
        with LLM(path, memory_bytes=256 << 20, threads=threads) as llm:
            assert llm._engine is not None and llm._engine._config.cost == used
    with serving(path, "--memory", "256MiB", "--threads", "1") as server:
        assert f"step times: {why}\n" in server.said
    cost_path(path).unlink()


def test_windows_are_those_of_the_plan_s_attention(path: Path, tmp_path: Path) -> None:
    assert windows_of(Artifact.open(path)) == (0,)
    assert windows_of(Artifact.open(write_small(tmp_path / "small"))) == ()
