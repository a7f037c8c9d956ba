"""`xllm explain` and `xllm diff`: they say what the artifact holds, and a difference wherever there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from tests.artifacts import replan, write_small
from tests.models import FAMILIES
from xllm import cli
from xllm.artifact import WEIGHTS, Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.passes.choose_buckets import padding


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint compiled twice: as it is, and without one fusion, in other storage."""
    folder = tmp_path_factory.mktemp("inspection")
    checkpoint = folder / "tiny"
    write_checkpoint(checkpoint, FAMILIES["qwen3"], dtype="float32")
    chosen = {
        "one": CompileOptions(max_batch_tokens=64),
        "two": CompileOptions(max_batch_tokens=64, disable=("fuse-gate-up",), weights="bfloat16", kv="int8"),
    }
    for name, options in chosen.items():
        compile_checkpoint(checkpoint, folder / name, options)
    return {name: folder / name for name in chosen}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_explain_says_what_the_artifact_holds(artifacts, capsys) -> None:
    code, out, _ = run(capsys, "explain", artifacts["one"], "--json")
    facts, artifact = json.loads(out), Artifact.open(artifacts["one"])
    assert code == 0
    assert sum(kernel["calls"] for kernel in facts["kernels"]) == len(artifact.plan.calls)
    assert sum(held["bytes"] for held in facts["memory"]["weights"]) == facts["memory"]["weight_bytes"]
    assert [step["name"] for step in facts["passes"]] == [record["name"] for record in artifact.manifest["passes"]]
    assert facts["memory"]["arena_bytes"] == artifact.plan.arena_bytes
    by_owner = {held["owner"]: held for held in facts["memory"]["weights"]}
    assert by_owner["model.layers.*.self_attn.o_proj"]["count"] == FAMILIES["qwen3"]["num_hidden_layers"]

    _, words, _ = run(capsys, "explain", artifacts["one"])
    for section in ("PASSES", "KERNELS", "FALLBACKS  none", "BUCKETS", "MEMORY"):
        assert section in words
    assert "xllm.linear                 linear.f32" in words


def test_explain_tells_every_near_miss_once_with_its_number(artifacts, capsys) -> None:
    manifest = Artifact.open(artifacts["two"]).manifest
    _, out, _ = run(capsys, "explain", artifacts["two"], "--json")
    told = {step["name"]: sum(miss["count"] for miss in step["misses"]) for step in json.loads(out)["passes"]}
    assert told == {record["name"]: len(record["misses"]) for record in manifest["passes"]}


def test_diff_of_equals_is_nothing(artifacts, capsys) -> None:
    code, out, _ = run(capsys, "diff", artifacts["one"], artifacts["one"])
    assert code == 0
    assert out.splitlines()[-1].startswith("equal: facts, passes, stage captured")


def test_diff_tells_each_part(artifacts, capsys) -> None:
    code, out, _ = run(capsys, "diff", artifacts["one"], artifacts["two"])
    assert code == 1
    sections = {block.partition(":")[0]: block for block in out.split("\n\n")}
    assert "weights_dtype  A float32" in sections["facts"]
    assert "fuse-gate-up" in sections["passes"] and "B -" in sections["passes"]
    assert "B has no such stage" in sections["stage fuse-gate-up"]
    assert "-    %gated_linear" in sections["stage planned"] and "+    %silu" in sections["stage planned"]
    assert "xllm.gated_linear" in sections["kernels"]
    assert "bfloat16 panels16" in sections["weights"]
    assert "weight bytes" in sections["plan"]
    assert "stage captured" in sections["equal"] and "stage fuse-qkv" in sections["equal"]


def test_the_kind_of_keys_and_values_is_named(artifacts, capsys) -> None:
    kv = Artifact.open(artifacts["two"]).plan.kv
    told = f"{kv.token_bytes:,} bytes a token"
    assert Artifact.open(artifacts["two"]).manifest["kv_dtype"] == kv.dtype == "int8"
    assert f"KV {told} (int8)" in run(capsys, "explain", artifacts["two"])[1]
    assert f"KV int8, {told}" in run(capsys, "show", artifacts["two"])[1]
    assert f"{kv.token_bytes:,} (int8)" in run(capsys, "diff", artifacts["one"], artifacts["two"])[1]


def test_one_stage_alone(artifacts, capsys) -> None:
    assert run(capsys, "diff", artifacts["one"], artifacts["two"], "--stage", "fuse-qkv")[0] == 0
    code, out, _ = run(capsys, "diff", artifacts["one"], artifacts["two"], "--stage", "planned")
    assert code == 1 and "facts" not in out
    code, _, err = run(capsys, "diff", artifacts["one"], artifacts["two"], "--stage", "fuse-all")
    assert code == 2 and err.count("\n") == 1 and "fuse-qkv" in err


def test_a_changed_plan_does_not_go_unseen(tmp_path, capsys) -> None:
    one, two = write_small(tmp_path / "one"), write_small(tmp_path / "two")
    replan(two, lambda raw: raw["calls"][1]["floats"].update(eps=1e-5))
    code, out, _ = run(capsys, "diff", one, two)
    assert code == 1 and "plan.json" in out


def test_a_damaged_weight_is_not_called_equal(tmp_path, capsys) -> None:
    one, two = write_small(tmp_path / "one"), write_small(tmp_path / "two")
    with (two / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x5a")
    for pair in ((one, two), (two, one)):
        code, _, err = run(capsys, "diff", *pair)
        assert code == 2 and f"in {WEIGHTS} is not what the compiler wrote" in err


def test_an_artifact_without_a_report_is_refused(tmp_path, capsys) -> None:
    code, _, err = run(capsys, "explain", write_small(tmp_path / "small"))
    assert code == 2 and "report.json" in err and err.count("\n") == 1


def test_padding_is_the_share_of_rows_that_are_not_asked_for() -> None:
    assert padding([1, 4], [(1, 1.0), (3, 1.0)]) == pytest.approx(1 / 5)
    assert padding([4], [(4, 2.0)]) == 0
