"""The artifact in its other forms: packed, signed, sharing its weights, made with those of an earlier one."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import contents, fill, refusal, reseal, write_small
from xllm import Session, cli
from xllm.artifact import (
    SIGNATURE,
    WEIGHTS,
    Artifact,
    ArtifactError,
    new_key,
    pack,
    sign,
    unpack,
    writing,
)
from xllm.artifact.store import MAGIC, packed_header
from xllm.targets.cpu.arena import allocate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


@pytest.fixture
def packed(path: Path, tmp_path: Path) -> Path:
    pack(path, tmp_path / "small.pack")
    return tmp_path / "small.pack"


# --- packed -----------------------------------------------------------------------------------------------------------


def test_packing_loses_nothing(path: Path, packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "back.xllm")
    assert contents(tmp_path / "back.xllm") == contents(path)
    pack(tmp_path / "back.xllm", tmp_path / "again.pack")
    assert (tmp_path / "again.pack").read_bytes() == packed.read_bytes()
    pack(packed, tmp_path / "copy.pack")
    assert (tmp_path / "copy.pack").read_bytes() == packed.read_bytes()


def test_a_packed_artifact_reads_as_the_folder_does(path: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pack").symlink_to(packed)
    packed.chmod(0o444)
    folder = Artifact.open(path)
    for place in (packed, tmp_path / "link.pack"):
        one = Artifact.open(place)
        assert (one.manifest, one.plan, one.tokenizer) == (folder.manifest, folder.plan, folder.tokenizer)
        assert (one.chat_template, one.stages()) == (folder.chat_template, folder.stages())
        mapped = one.map_weights()
        assert mapped.bytes.tobytes() == folder.map_weights().bytes.tobytes()
        assert mapped.address % 4096 == 0


@pytest.mark.parametrize("pages", [1 << 14, 1 << 16])
def test_a_packed_artifact_is_mapped_where_pages_are_larger(
    path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    artifact = Artifact.open(packed)
    assert artifact.store.place(WEIGHTS).offset % pages, "it lies inside such a page"
    monkeypatch.setattr("mmap.ALLOCATIONGRANULARITY", pages)
    mapped = artifact.map_weights()
    assert mapped.bytes.tobytes() == (path / WEIGHTS).read_bytes()
    mapped.release(0, len(mapped.bytes))


def test_only_artifacts_are_written_over(path: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is no packed artifact; choose another name"):
        pack(path, tmp_path / "thesis.txt")
    with pytest.raises(ArtifactError, match="is no packed artifact; `xllm pack` makes one"):
        unpack(path, tmp_path / "new.xllm")
    assert not (tmp_path / "new.xllm").exists()


def test_what_is_not_sound_is_not_packed(path: Path, tmp_path: Path) -> None:
    with (path / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xaa")
    with pytest.raises(ArtifactError, match="is not what the compiler wrote"):
        pack(path, tmp_path / "new.pack")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["small.xllm"]


@pytest.mark.parametrize(
    "index",
    [
        b"", b"null", b"{}", b"[[1,2]]", b'[["a"]]', b'[["a",-1]]', b'[["a",1.0]]', b'[["a",true]]', b'[["../a",0]]',
        b'[["/a",0]]', b'[["",0]]', b'[["a//b",0]]', b'[["a",99999999999999999999]]', b'[["b",0],["a",0]]',
        b'[["a",0],["a",0]]', b'[["a",0]] ', b"[" * 5000, b'[["\\ud800",0]]', b"\xff",
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused(tmp_path: Path, index: bytes) -> None:
    file = tmp_path / "hostile.pack"
    text = index + b" " * (-(len(index) + 16) % 4096)
    file.write_bytes(MAGIC + struct.pack("<Q", len(text)) + text)
    assert refusal(file).code in ("artifact-malformed", "artifact-changed", "artifact-incomplete")


@pytest.mark.parametrize("claimed", [1 << 63, 1 << 40, 1 << 20])
def test_a_length_beyond_the_file_is_refused_before_it_is_read(tmp_path: Path, claimed: int) -> None:
    file = tmp_path / "hostile.pack"
    file.write_bytes(MAGIC + struct.pack("<Q", claimed) + b"[]")
    assert f"its index claims {claimed} bytes" in str(refusal(file))


def test_a_pack_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pack").write_bytes(packed_header([]))
    assert "manifest.json is missing" in str(refusal(tmp_path / "empty.pack"))


# --- no bit and no key ------------------------------------------------------------------------------------------------


def test_no_flipped_bit_is_accepted_in_either_form(path: Path, packed: Path) -> None:
    """Thousands of places over every file: the error is always ours."""
    sign_with(path)
    pack(path, packed)
    rng = np.random.default_rng(0)
    for file, count in [(packed, 1500), *((entry, 300) for entry in path.rglob("*") if entry.is_file())]:
        whole = file.read_bytes()
        for place in rng.integers(0, 8 * len(whole), count).tolist():
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            file.write_bytes(changed)
            if file == packed and place < 8 * len(MAGIC):
                assert refusal(packed).code == "not-an-artifact"
            else:
                assert refusal(packed if file == packed else path).code.startswith("artifact-"), (file, place)
        file.write_bytes(whole)
    Artifact.open(path).map_weights()
    Artifact.open(packed).map_weights()


@pytest.mark.parametrize("keep", [0, 7, 8, 16, 4096, 0.5, 0.999])
def test_a_cut_pack_is_refused(packed: Path, keep: float) -> None:
    whole = packed.read_bytes()
    packed.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    assert refusal(packed).code in ("artifact-malformed", "artifact-incomplete", "not-an-artifact")
    packed.write_bytes(whole + b"\0")
    assert refusal(packed).code == "artifact-incomplete"


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and item of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for key, item in items for inner in ((*at, key), *places(item, (*at, key)))]


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda value: None,
    lambda value: [value],
    lambda value: not value,
    lambda value: {"x": value} if not isinstance(value, dict) else {**value, "x": 1},
    lambda value: value + 1 if isinstance(value, int) else 7,
)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_no_changed_key_is_accepted(path: Path, name: str) -> None:
    file = path / name
    whole = file.read_bytes()
    for place in places(json.loads(whole)):
        for change in (*CHANGES, None):
            held = json.loads(whole)
            inner = held
            for key in place[:-1]:
                inner = inner[key]
            if change is None:
                del inner[place[-1]]
            else:
                inner[place[-1]] = change(inner[place[-1]])
            if held == json.loads(whole):
                continue
            file.write_text(json.dumps(held, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
            with pytest.raises(ArtifactError) as caught:
                Artifact.open(path)
            assert caught.value.code.startswith("artifact-") and "\n" not in str(caught.value), place


def test_two_files_swapped_are_refused(path: Path) -> None:
    one, two = path / "tokenizer/tokenizer.json", path / "ir/00-captured.ir"
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert refusal(path).code == "artifact-changed"


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("model.vocab", 0), ("model.vocab", "20"), ("model.vocab", True), ("model.vocab", 1 << 40),
        ("model.max_len", -1), ("model.eos_ids", [-1]), ("model.eos_ids", 1), ("model.name", None),
        ("limits.max_seqs", 2.5), ("limits.max_len", None), ("target.level", 3), ("target.architecture", []),
        ("special_tokens.eos_token", {"content": "x"}), ("generation", []), ("files.plan.json", "0"),
        ("weights_header", "../x"), ("weight_origins", {"embed": 1}), ("kind", "spell"), ("kind", 1),
        ("extensions", []), ("extensions", {"kernels": [1]}), ("extensions", {"kernels": [{"module": "x"}]}),
    ],
)  # fmt: skip
def test_a_sealed_manifest_of_wrong_types_is_refused(path: Path, field: str, wrong: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        head, _, key = field.partition(".")
        if key:
            manifest[head][key] = wrong
        else:
            manifest[head] = wrong

    reseal(path, change)
    error = refusal(path)
    assert error.code == "artifact-malformed" and str(error).startswith("manifest.json: ")


def test_a_function_around_the_plan_of_a_step_is_refused(path: Path) -> None:
    reseal(path, lambda manifest: manifest.update(kind="function", limits={"T": 4}))
    with pytest.raises(ArtifactError, match=r"manifest.json and plan.json are not of one kind") as caught:
        Artifact.open(path)
    assert caught.value.code == "artifact-malformed"


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_what_is_parsed_has_a_limit(path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size = (path / name).stat().st_size
    opened = "xllm.artifact.opened" if name == "plan.json" else "xllm.artifact.manifest"
    monkeypatch.setattr(f"{opened}.MAX_TABLE_BYTES", size)
    Artifact.open(path)
    monkeypatch.setattr(f"{opened}.MAX_TABLE_BYTES", size - 1)
    assert f"{name} has {size} bytes, at most {size - 1} are read" in str(refusal(path))


def test_files_are_hashed_in_blocks(path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.artifact.store._BLOCK_BYTES", 7)
    for form in (path, packed):
        Artifact.open(form)
    (path / "ir/00-captured.ir").write_text("Program\n")
    assert "ir/00-captured.ir is not what the compiler wrote" in str(refusal(path))


def test_an_arena_that_cannot_be_had_is_refused() -> None:
    for size in (1 << 70, 1 << 62):
        with pytest.raises(ArtifactError, match=f"an arena of {size} bytes cannot be had"):
            allocate(size)


def test_a_template_that_is_not_text_is_refused(path: Path) -> None:
    with writing(path) as writer:
        fill(writer)
        writer.write("tokenizer/chat_template.jinja", b"\xff")
        reseal_files(writer)
    with pytest.raises(ArtifactError, match="is not UTF-8"):
        _ = Artifact.open(path).chat_template


def reseal_files(writer: Any) -> None:
    manifest = json.loads((writer.root / "manifest.json").read_text())
    writer.finish({key: value for key, value in manifest.items() if key not in ("schema", "files", "digest")})


# --- signed -----------------------------------------------------------------------------------------------------------


def sign_with(path: Path, name: str = "key.pem") -> Path:
    """Signs with a key beside the artifact, made where there is none; returns its public key."""
    key = path.parent / name
    public = Path(f"{key}.pub") if key.exists() else new_key(key)
    sign(path, Artifact.open(path).manifest["digest"], key)
    return public


def test_a_signature_is_kept_by_packing(path: Path, packed: Path, tmp_path: Path) -> None:
    public = sign_with(path)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    pack(path, packed)
    unpack(packed, tmp_path / "back.xllm")
    for place in (path, packed, tmp_path / "back.xllm"):
        Artifact.open(place, public).map_weights()
    with pytest.raises(FileExistsError):
        new_key(tmp_path / "key.pem")


def test_a_missing_or_foreign_signature_is_refused(path: Path, tmp_path: Path) -> None:
    public = new_key(tmp_path / "other.pem")
    assert refusal(path, public).code == "signature-missing"
    sign_with(path)
    assert refusal(path, public).code == "signature-wrong"
    assert refusal(path, tmp_path / "other.pem").code == "bad-key"
    with pytest.raises(FileNotFoundError):
        Artifact.open(path, tmp_path / "nowhere.pub")


def test_a_signature_serves_no_other_artifact(path: Path, tmp_path: Path) -> None:
    public = sign_with(path)
    other = write_small(tmp_path / "other.xllm")
    reseal(other, lambda manifest: manifest["model"].update(name="other"))
    (other / SIGNATURE).write_bytes((path / SIGNATURE).read_bytes())
    assert refusal(other).code == refusal(other, public).code == "signature-wrong"
    with pytest.raises(ArtifactError, match="holds no private key"):
        sign(other, "0" * 64, public)


def test_a_stale_signature_is_replaced_through_a_link_too(path: Path, tmp_path: Path) -> None:
    public = sign_with(path)
    reseal(path, lambda manifest: manifest["model"].update(name="other"))
    assert refusal(path).code == "signature-wrong"
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.xllm"
    link.symlink_to(path)
    link.parent.chmod(0o555)
    try:
        assert cli.main(["sign", str(link), "--key", str(tmp_path / "key.pem")]) == 0
    finally:
        link.parent.chmod(0o755)
    Artifact.open(path, public)


def test_a_session_asks_for_a_signature(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        Session(path, require_signature=new_key(tmp_path / "other.pem"))
    assert caught.value.code == "signature-missing"
