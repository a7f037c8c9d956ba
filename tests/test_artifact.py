"""Artifacts: whole or not at all, the same bytes twice, and no byte that can change unseen."""

from __future__ import annotations

import getpass
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import replan, reseal, small_plan, weight_bytes, write_small
from tests.pages import huge_bytes
from xllm.artifact import WEIGHTS, Artifact, ArtifactError, writing
from xllm.artifact.store import Place
from xllm.artifact.weights import HUGE_PAGE_BYTES, MappedWeights
from xllm.targets.cpu.executor import CpuExecutor

ROOT = Path(__file__).parents[1]
FILES = ("manifest.json", "plan.json", WEIGHTS, "ir/00-captured.ir", "tokenizer/tokenizer.json",
         "tokenizer/chat_template.jinja")  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


def refusal(path: Path, *, weights: bool = True) -> ArtifactError:
    """The error of opening an artifact and mapping its weights."""
    with pytest.raises(ArtifactError) as caught:
        artifact = Artifact.open(path)
        if weights:
            artifact.map_weights()
    return caught.value


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    artifact = Artifact.open(path)
    assert set(contents(path)) == set(FILES)
    assert (artifact.name, artifact.chat_template) == ("小模型", "{{ messages }}")
    assert artifact.generation == {"temperature": 0.7}
    assert artifact.special_tokens == {"eos_token": "</s>"}
    assert artifact.stages() == {"captured": "ir/00-captured.ir"}
    assert artifact.tokenizer == (path / "tokenizer/tokenizer.json").read_bytes()
    told: list[int] = []
    mapped = artifact.map_weights(progress=lambda name, done, total: told.append(done))
    for key, weight in artifact.plan.weights.items():
        assert mapped.bytes[weight.offset : weight.offset + weight.bytes].tobytes() == weight_bytes(weight).tobytes()
        assert mapped.array(weight).shape == small_plan().weights[key].shape
        assert weight.offset % (4096 if weight.bytes >= 4096 else 64) == 0
    assert told == sorted(told) and told[-1] == artifact.weight_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of huge pages in /proc")
def test_what_is_written_lies_in_huge_pages_where_files_read_anew_do(tmp_path: Path) -> None:
    size = 4 * HUGE_PAGE_BYTES
    written, sparse = tmp_path / "written", tmp_path / "sparse"
    for file in (written, sparse):
        file.touch()
        os.truncate(file, size)
    mapped = MappedWeights(Place(written, 0, size))
    mapped.enlarge(0, size)
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    with written.open("r+b") as out:
        for at in range(0, size, 100_000):
            os.pwrite(out.fileno(), content[at : at + 100_000].tobytes(), at)
    assert (mapped.bytes == content).all()
    other = MappedWeights(Place(sparse, 0, size))
    other.bytes.max()
    assert (huge_bytes(mapped.address) > 0) == (huge_bytes(other.address) > 0), "a machine short of them gives fewer"


def test_the_weight_file_is_safetensors(path: Path) -> None:
    from safetensors.numpy import load_file

    held = load_file(path / WEIGHTS)
    for key, weight in Artifact.open(path).plan.weights.items():
        assert held[key].tobytes() == weight_bytes(weight).tobytes()


def test_two_builds_are_byte_identical(path: Path, tmp_path: Path) -> None:
    other = write_small(tmp_path / "elsewhere" / "other.xllm")
    assert contents(path) == contents(other)


def test_it_works_wherever_it_is_moved(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a folder" / "名前"
    moved.parent.mkdir()
    shutil.copytree(path, moved)
    for folder in (moved, *moved.rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert Artifact.open(link).map_weights().bytes.size
    for folder in (moved, *moved.rglob("*")):
        folder.chmod(0o755)


# --- changes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_refused_by_name(path: Path, name: str) -> None:
    file = path / name
    whole = file.read_bytes()
    rng = random.Random(name)
    small = len(whole) < 400
    places = range(len(whole)) if small else sorted({0, len(whole) - 1, *rng.sample(range(len(whole)), 150)})
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        error = refusal(path)
        assert name in str(error) and error.code.startswith("artifact-"), (place, error)
    file.write_bytes(whole)
    Artifact.open(path).map_weights()


def test_a_changed_weight_is_named_and_gaps_count(path: Path) -> None:
    file = path / WEIGHTS
    whole = file.read_bytes()
    plan = Artifact.open(path).plan
    expected = {weight.offset: f"weight {key} in" for key, weight in plan.weights.items()}
    expected |= {plan.weights["embed"].offset + plan.weights["embed"].bytes - 1: "weight embed in", 4: "header in"}
    gap = plan.weights["norm"].offset + plan.weights["norm"].bytes
    assert gap < plan.weights["table"].offset  # the bytes between are nobody's, and still count
    expected[gap] = "weight norm in"
    for place, who in expected.items():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert who in str(refusal(path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    error = refusal(path)
    assert name in str(error)
    assert error.code == ("not-an-artifact" if name == "manifest.json" else "artifact-incomplete")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(path: Path, name: str, keep: float) -> None:
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(len(whole) * keep)])
    assert name in str(refusal(path))


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_named(path: Path, name: str) -> None:
    with (path / name).open("ab") as file:
        file.write(b" ")
    assert name in str(refusal(path))


@pytest.mark.parametrize("planted", ["ir/99-planted.ir", "README", "weights/other.safetensors", "tokenizer/.hidden"])
def test_a_file_too_many_is_named(path: Path, planted: str) -> None:
    (path / planted).write_text("planted")
    error = refusal(path)
    assert error.code == "artifact-changed" and f"{planted} is no part of the artifact" in str(error)


def test_a_linked_folder_too_many_is_named(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (path / "more").symlink_to(tmp_path / "elsewhere")
    assert "more is no part of the artifact" in str(refusal(path))
    (path / "more").unlink()
    (path / "ir/empty").mkdir()
    assert "ir/empty/ is no part of the artifact" in str(refusal(path))


@pytest.mark.parametrize("name", ["plan.json", WEIGHTS, "manifest.json"])
def test_links_out_of_the_folder_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    assert f"{name} leads out of the artifact" in str(refusal(path))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "ir/../../outside"])
def test_names_out_of_the_folder_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    reseal(path, lambda manifest: manifest["files"].update({name: "0" * 64}))
    assert refusal(path).code in ("artifact-changed", "artifact-incomplete")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "\\xff", '{"schema": 2}', "[" * 100000])
def test_what_is_no_manifest_is_refused(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    assert refusal(path).code == "artifact-malformed"


# --- sealed, and still refused ----------------------------------------------------------------------------------------


def test_another_schema_is_refused_with_both_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.artifact.writer.SCHEMA", 99)
    reseal(path, lambda manifest: None)
    monkeypatch.undo()
    error = refusal(path)
    assert error.code == "artifact-schema" and "schema 99" in str(error)


@pytest.mark.parametrize(
    "field", ["generation", "limits", "model", "special_tokens", "target", "task", "weights_header"]
)
def test_a_manifest_without_a_field_is_refused(path: Path, field: str) -> None:
    reseal(path, lambda manifest: manifest.pop(field))
    error = refusal(path)
    assert error.code == "artifact-malformed" and field in str(error)


def test_an_unsound_plan_is_refused_although_it_is_sealed(path: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        plan["calls"][1]["args"]["x"] = "%lost"

    replan(path, change)
    error = refusal(path)
    assert error.code == "artifact-malformed" and "call norm refers to '%lost'" in str(error)


def test_a_weight_beyond_the_file_is_refused(path: Path) -> None:
    def change(plan: dict[str, Any]) -> None:
        plan["weights"]["table"]["offset"] += 1 << 20

    replan(path, change)
    assert f"{WEIGHTS} is cut short" in str(refusal(path, weights=False))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ({"level": "x86-64-v9"}, "is for CPU level x86-64-v9, this machine has"),
        ({"name": "cuda"}, "is for target cuda"),
    ],
)
def test_another_machine_is_refused_by_name(path: Path, target: dict[str, str], why: str) -> None:
    reseal(path, lambda manifest: manifest["target"].update(target))
    with pytest.raises(ArtifactError, match=why) as caught:
        CpuExecutor(Artifact.open(path), 1)
    assert caught.value.code == "wrong-target"


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_weight_of_another_size_is_refused(tmp_path: Path) -> None:
    makers: list[Callable[..., np.ndarray]] = [
        lambda weight: np.zeros(weight.bytes - 1, np.uint8),
        lambda weight: np.zeros(weight.bytes + 1, np.uint8),
        lambda weight: np.zeros(weight.bytes, np.int8),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="weight table has"), writing(tmp_path / "new.xllm") as writer:
            writer.write_weights(small_plan(), lambda weight, make=make: [make(weight)])
    assert list(tmp_path.iterdir()) == []


# --- from a compiler --------------------------------------------------------------------------------------------------


def test_compiled_artifacts_are_byte_identical_and_know_no_place(tmp_path: Path) -> None:
    from bench.checkpoints import write_checkpoint
    from tests.models import FAMILIES
    from xllm.compiler import compile_checkpoint

    config = {**FAMILIES["qwen3"], "num_hidden_layers": 2}
    builds = []
    for place in ("one", "two/deeper"):
        checkpoint = write_checkpoint(tmp_path / place / "tiny", config, dtype="float32")
        compile_checkpoint(checkpoint, tmp_path / place / "out.xllm")
        builds.append(contents(tmp_path / place / "out.xllm"))
    assert builds[0] == builds[1]
    foreign = [str(tmp_path), str(Path.home()), str(ROOT), os.uname().nodename]
    if len(user := getpass.getuser()) > 3 and user != "root":
        foreign.append(user)
    for name, data in builds[0].items():
        if name not in (WEIGHTS, "tokenizer/tokenizer.json"):
            text = data.decode()
            assert not [word for word in foreign if len(word) > 3 and word in text], name
            assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text), name
