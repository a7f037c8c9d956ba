"""Weights of an earlier artifact taken, and one weight file shared by many; modes and links at the output."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import contents, refusal, small_plan, weight_bytes, write_small
from xllm.artifact import (
    WEIGHTS,
    Artifact,
    ArtifactError,
    check_apart,
    digest,
    is_packed,
    pack,
    previous_weights,
    share,
    writing,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


def build(path: Path, made: list[str], *, previous: Path | None = None, shared: Path | None = None) -> tuple[str, ...]:
    """A small artifact; `made` gets the weights that were made for it. Returns those that were reused."""

    def make(weight: Any) -> list[np.ndarray]:
        made.append(weight.name)
        return [weight_bytes(weight)]

    def origin(weight: Any) -> str:
        return digest(weight.name.encode())

    with writing(path) as writer:
        written = writer.write_weights(small_plan(), make, None, origin, previous_weights(previous))
        writer.write("plan.json", written.plan.to_json())
        if shared is not None:
            share(writer.root, written, shared)
        rest = json.loads((write_small(path.parent / "model.xllm") / "manifest.json").read_text())
        kept = {key: rest[key] for key in ("generation", "limits", "model", "special_tokens", "target", "task")}
        writer.finish({**kept, "weights_header": written.header, "weight_origins": dict(written.origins)})
    return written.reused


def test_weights_of_the_same_origin_are_taken(tmp_path: Path) -> None:
    made: list[str] = []
    assert build(tmp_path / "one.xllm", made) == () and len(made) == 4
    made.clear()
    assert len(build(tmp_path / "two.xllm", made, previous=tmp_path / "one.xllm")) == 4 and made == []
    assert contents(tmp_path / "one.xllm") == contents(tmp_path / "two.xllm")


def test_a_changed_weight_of_an_earlier_artifact_is_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    build(tmp_path / "one.xllm", made)
    before = contents(tmp_path / "one.xllm")
    weight = Artifact.open(tmp_path / "one.xllm").plan.weights["table"]
    with (tmp_path / "one.xllm" / WEIGHTS).open("r+b") as file:
        file.seek(weight.offset + 5)
        file.write(b"\x5a\xa5")
    made.clear()
    assert len(build(tmp_path / "two.xllm", made, previous=tmp_path / "one.xllm")) == 3 and made == ["table"]
    assert contents(tmp_path / "two.xllm") == before


def test_equal_weights_are_one_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(tmp_path / f"{name}.xllm", [], shared=tmp_path / "shared")
    (shared,) = (tmp_path / "shared").iterdir()
    assert {(tmp_path / f"{name}.xllm" / WEIGHTS).stat().st_ino for name in ("one", "two")} == {shared.stat().st_ino}
    Artifact.open(tmp_path / "two.xllm").map_weights()
    with shared.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x5a")
    assert refusal(tmp_path / "one.xllm").code == refusal(tmp_path / "two.xllm").code == "artifact-changed"
    with pytest.raises(ArtifactError, match=rf"shared file .*{shared.name} is not what was put there"):
        build(tmp_path / "three.xllm", [], shared=tmp_path / "shared")
    assert not (tmp_path / "three.xllm").exists()


@pytest.mark.parametrize("shared", ["one.xllm", "one.xllm/shared"])
def test_the_common_folder_is_not_in_the_artifact(tmp_path: Path, shared: str) -> None:
    with pytest.raises(ArtifactError, match=r"is in the artifact .* choose one beside it"):
        check_apart(tmp_path / "one.xllm", tmp_path / shared)
    check_apart(tmp_path / "all/one.xllm", tmp_path / "all")


def test_modes_that_are_right_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file may belong to somebody else, whose modes are not ours to set."""
    build(tmp_path / "one.xllm", [], shared=tmp_path / "shared")
    (shared,) = (tmp_path / "shared").iterdir()
    theirs, change = shared.stat().st_ino, Path.chmod

    def chmod(file: Path, mode: int) -> None:
        if file.stat().st_ino == theirs:
            raise PermissionError(file)
        change(file, mode)

    monkeypatch.setattr(Path, "chmod", chmod)
    build(tmp_path / "two.xllm", [], shared=tmp_path / "shared")
    assert (tmp_path / "two.xllm" / WEIGHTS).stat().st_ino == theirs


def test_an_equal_file_shared_at_the_same_moment_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "one.xllm", [], shared=tmp_path / "shared")
    (shared,) = (tmp_path / "shared").iterdir()
    monkeypatch.setattr(Path, "exists", lambda file: file != shared and os.path.exists(file))
    build(tmp_path / "two.xllm", [], shared=tmp_path / "shared")
    assert (tmp_path / "two.xllm" / WEIGHTS).stat().st_ino == shared.stat().st_ino


def test_a_link_at_the_output_stays(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.xllm"
    link.symlink_to(path)
    write_small(link)
    assert link.is_symlink() and link.resolve() == path.resolve()
    Artifact.open(link).map_weights()
    (tmp_path / "ahead.xllm").symlink_to(tmp_path / "later.xllm")
    write_small(tmp_path / "ahead.xllm")
    Artifact.open(tmp_path / "later.xllm").map_weights()


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    def modes(root: Path) -> set[int]:
        return {stat.S_IMODE(entry.stat().st_mode) for entry in (root, *root.rglob("*"))}

    before = os.umask(0o077)
    try:
        path = write_small(tmp_path / "private.xllm")
        pack(path, tmp_path / "private.pack")
    finally:
        os.umask(before)
    assert modes(path) == {0o755, 0o644}
    assert stat.S_IMODE((tmp_path / "private.pack").stat().st_mode) == 0o644
    assert is_packed(tmp_path / "private.pack")
