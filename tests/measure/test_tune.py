"""`xllm tune` and `xllm compile --tuning`: real kernels run for a moment, and a table that is an input like others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from tests.artifacts import contents
from tests.models import FAMILIES
from xllm import cli
from xllm.artifact import Artifact
from xllm.kernels import cpu
from xllm.measure import tables
from xllm.measure import tune as tuning
from xllm.measure.machine import cache_bytes
from xllm.targets import host
from xllm.targets.cpu import CpuTarget
from xllm.targets.predicted import target_of


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that take no time, and are worth as much."""
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "LEAST", 1)
    monkeypatch.setattr(tuning, "MOST_COLD_BYTES", 1 << 20)
    monkeypatch.setattr(tuning, "WIDTH", 64)
    monkeypatch.setattr(tuning, "INNER", 128)
    monkeypatch.setattr(tuning, "VOCAB", 512)


def test_every_case_is_a_kernel_that_runs(short) -> None:
    with cpu.Runner(1) as runner:
        kernels = {
            bench.kernel: tuning.curve(bench)
            for bench in (tuning.Bench(runner, CpuTarget(cpu.level()), case) for case in tuning.cases())
        }
    stems = {name.partition(".")[0] for name in kernels}
    assert {"linear", "attention", "qk_norm_rope_write", "rms_norm", "gated_silu", "embedding", "rows"} <= stems
    assert {f"linear.{kind}" for kind in ("f32", "bf16", "i8", "i4")} <= kernels.keys()
    assert {f"linear_rounded.{kind}" for kind in ("bf16", "i8", "i4")} | {"linear_rounded_row.i8"} <= kernels.keys()
    assert {"attention.f32", "attention.bf16", "attention.i8", "embedding.i8", "embedding.i4"} <= kernels.keys()
    for curve in kernels.values():
        assert curve.call_seconds > 0 and all(each > 0 for _, each in curve.points)
    few, many = kernels["linear.bf16"].points[0][0], kernels["linear.bf16"].points[-1][0]
    assert few == pytest.approx(1, rel=0.05) and many > 20 * few


def test_a_case_without_a_kernel_is_left_out_and_named(short, monkeypatch) -> None:
    unknown = tuning._rowwise("xllm.nothing", {"x": tuning._value(8)}, [8])
    monkeypatch.setattr(tuning, "cases", lambda: iter([unknown, tuning._rowwise("aten.relu.default", unary, [8])]))
    unary = {"self": tuning._value(8)}
    told: list[str] = []
    table = tuning.tune(1, told.append)
    assert list(table.kernels) == ["relu.f32"]
    assert any(line.startswith("not xllm.nothing of float32: no cpu kernel") for line in told)


def test_cold_cases_have_more_bytes_than_the_caches() -> None:
    assert tuning._copies(100) == 1 == tuning._copies(tuning.LEAST_APART) < tuning._copies(1 << 20)
    assert tuning._copies(8 << 20) * (8 << 20) >= max(tuning.LEAST_COLD_BYTES, cache_bytes().get("L3", 0))


def test_what_only_moves_values_finds_them_in_another_place_each_time() -> None:
    """Of 512 rows; a product's rows stay where they are, and its weights do not."""
    cases = {case.make(0).op: case for case in tuning.cases() if case.weights == "float32"}
    wanted = {"aten.add.Tensor": {"out"}, "xllm.embedding": {"out"}, "xllm.linear": {"weight"}}
    with cpu.Runner(1) as runner:
        for op, moving in wanted.items():
            bench = tuning.Bench(runner, CpuTarget(runner.level), cases[op])
            calls = [bench._call(at) for at in range(bench.copies)]
            assert bench.copies > 1
            for name in {"out", "weight"} & set(calls[0].args):
                assert len({call.args[name] for call in calls}) == (bench.copies if name in moving else 1), (op, name)


def test_the_fastest_level_is_the_one_that_took_least(monkeypatch) -> None:
    taken = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
    monkeypatch.setattr(cpu, "levels", lambda: tuple(taken))
    monkeypatch.setattr(cpu, "Runner", Level)
    monkeypatch.setattr(tuning, "Bench", lambda runner, target, case: runner)
    Level.taken = taken
    assert tuning.fastest_level(2) == "fast"


class Level:
    taken: dict[str, float]

    def __init__(self, threads: int, level: str) -> None:
        self._level = level

    def __enter__(self) -> Level:
        return self

    def __exit__(self, *_: object) -> None: ...

    def seconds(self, step: object, budget: float) -> float:
        return self.taken[self._level]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned") / "tiny"
    return write_checkpoint(root, {**FAMILIES["qwen3"], "num_hidden_layers": 2}, dtype="float32")


def test_a_table_is_cached_asked_for_and_sealed_in_the_artifact(
    short, monkeypatch, checkpoint: Path, tmp_path: Path, capsys
) -> None:
    monkeypatch.setenv("XLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables.host, "threads", lambda *_: host.Threads(1, "one"))
    command = ["compile", str(checkpoint), "--quiet", "-o"]
    assert cli.main([*command, str(tmp_path / "none"), "--tuning", "cached"]) == 2
    assert "run `xllm tune`" in capsys.readouterr().err
    assert cli.main(["tune", "--threads", "1"]) == 0
    assert "linear.bf16" in capsys.readouterr().out
    (file,) = (tmp_path / "cache" / "tuning").iterdir()
    assert file == tables.table_path(host.cpu_model(), 1)
    for out, asked in (("one", ["--tuning", "cached"]), ("two", ["--tuning", str(file)]), ("plain", [])):
        assert cli.main([*command, str(tmp_path / out), *asked]) == 0
    one, two, plain = (contents(tmp_path / out) for out in ("one", "two", "plain"))
    assert one == two
    assert one["tuning.json"] == file.read_bytes()
    changed = {name for name in one if one[name] != plain.get(name)}
    assert {"tuning.json", "manifest.json"} <= changed
    assert not any(name.startswith("weights/") for name in changed)
    assert "tuning.json" not in plain  # a cached table that nobody asks for changes nothing
    assert target_of(Artifact.open(tmp_path / "one")).tuning == tables.read_tuning("cached")


def test_a_table_of_another_level_is_refused(short, checkpoint: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "table.json"
    body = {"level": "z80", "cpu": "", "threads": 1, "cache_bytes": {}, "schema": 2, "call_seconds": 1e-6}
    body |= {"read_bytes_per_second": 1.0, "flops_per_second": 1.0}
    file.write_text(json.dumps(body))
    assert cli.main(["compile", str(checkpoint), "--quiet", "-o", str(tmp_path / "a"), "--tuning", str(file)]) == 2
    assert "the tuning table is for CPU level z80" in capsys.readouterr().err
    file.write_text("{}")
    assert cli.main(["compile", str(checkpoint), "--quiet", "-o", str(tmp_path / "a"), "--tuning", str(file)]) == 2
    assert "is no tuning table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("AMD EPYC", "amd-epyc-4.json"),
        ("Intel(R) Xeon(R) @ 2.0/../x", "intel-r-xeon-r-2-0-x-4.json"),
        ("", "cpu-4.json"),
    ],
)
def test_tables_are_named_by_cpu_and_threads(name, file) -> None:
    assert tables.table_path(name, 4).name == file
