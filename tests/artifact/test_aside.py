"""Writing beside the place: whole or not at all, whoever writes at once, and nothing lost that is not ours."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.artifacts import contents, fill, reseal, write_small
from xllm.artifact import Artifact, ArtifactError, pack, unpack, writing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "new.xllm") as writer:
        writer.write("plan.json", "{}")
        raise RuntimeError("out of luck")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_replacing_keeps_the_old_one(path: Path) -> None:
    before = contents(path)
    with pytest.raises(RuntimeError), writing(path) as writer:
        fill(writer)
        raise RuntimeError("out of luck")
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("limit", [3000, 5000])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands for the disk: either ends a write half done."""
    code = (
        "import resource, sys; from tests.artifacts import write_small; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); write_small(sys.argv[1])"
    )
    target = tmp_path / "new.xllm"
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"File too large: '.*/weights/model\.safetensors'", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_pack_and_what_a_killed_one_left_is_swept(path: Path) -> None:
    code = (
        "import resource, sys; from xllm.artifact import pack; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); pack(*sys.argv[1:])"
    )
    out = path.parent / "small.pack"
    (path.parent / ".small.pack.partial-0123abcd").write_text("half")
    done = subprocess.run([sys.executable, "-c", code, str(path), str(out)], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"File too large: '.*/small\.pack'", done.stderr), done.stderr
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_old_one_returns_when_the_last_rename_does_not_happen(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, rename = contents(path), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not self.name.endswith(".old"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        write_small(path)
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_a_build_had_put_away_when_it_was_killed_returns(path: Path) -> None:
    before = contents(path)
    path.rename(path.parent / ".small.xllm.partial-0123abcd.old")
    with pytest.raises(RuntimeError), writing(path):
        raise RuntimeError("out of luck")
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_artifact_is_replaced_sound_or_not(path: Path) -> None:
    (path / "plan.json").write_text("{}")
    reseal(path, lambda manifest: manifest.update(digest="0" * 64))
    (path / "weights/model.safetensors").unlink()
    sealed = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(sealed.replace('"schema": ', '"schema": 1'))
    write_small(path)
    Artifact.open(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("extra", ["thesis.txt", "weights/thesis.txt", "manifest.json"])
def test_a_folder_that_holds_what_is_not_ours_is_not_replaced(path: Path, tmp_path: Path, extra: str) -> None:
    """Nor is one whose manifest.json is of something else, as those of web pages are."""
    if extra == "manifest.json":
        path = tmp_path / "web"
        path.mkdir()
    pack(write_small(tmp_path / "other.xllm"), tmp_path / "other.pack")
    precious = path / extra
    precious.write_text('{"name": "my page", "files": {}, "schema": 3}')
    before = contents(path)
    for write in (write_small, lambda place: unpack(tmp_path / "other.pack", place)):
        with pytest.raises(ArtifactError, match=r"choose another -o or (remove|move) it") as caught:
            write(path)
        assert caught.value.code == "not-an-artifact"
    assert contents(path) == before and precious.exists()


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here/deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/deeper")
    for place in (".", "..", tmp_path / "here"):
        with pytest.raises(ArtifactError, match="is the current folder or holds it"):
            write_small(Path(place))


def test_what_appears_while_it_is_built_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new.xllm"
    with pytest.raises(ArtifactError, match="exists and is not an artifact"), writing(path) as writer:
        fill(writer)
        path.mkdir()
        (path / "thesis.txt").write_text("x")
    assert contents(tmp_path) == {"new.xllm/thesis.txt": b"x"}


def test_many_writers_of_one_name_all_end_well(path: Path) -> None:
    code = "import sys; from tests.artifacts import write_small\nfor _ in range(20): write_small(sys.argv[1])"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    Artifact.open(path).map_weights()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_artifact_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    if kind == "folder":
        precious.mkdir()
        (precious / "thesis.txt").write_text("x")
    else:
        precious.write_text("x")
    with pytest.raises(ArtifactError, match="exists and is not an artifact; choose another"):
        write_small(precious)
    assert precious.exists() and [entry.name for entry in tmp_path.iterdir()] == ["precious"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "new.xllm").mkdir()
    Artifact.open(write_small(tmp_path / "new.xllm"))


SLOW_WRITER = """
import sys, time
from tests.artifacts import small_plan
from xllm.artifact import writing
with writing(sys.argv[1]) as writer:
    writer.write("plan.json", "{}")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_build_leaves_nothing_under_the_name_and_the_next_one_sweeps(path: Path) -> None:
    before = contents(path)
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    with pytest.raises(RuntimeError), writing(path):  # a living build is left alone
        assert len(list(path.parent.glob(".small.xllm.partial-*"))) == 2
        raise RuntimeError
    assert len(list(path.parent.glob(".small.xllm.partial-*"))) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert contents(path) == before
    write_small(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
