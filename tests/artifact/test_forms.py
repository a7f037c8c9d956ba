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

from tests.artifacts import fill, reseal, small_plan, weight_bytes, write_small
from xllm.artifact import (
    SIGNATURE,
    WEIGHTS,
    Artifact,
    ArtifactError,
    digest,
    is_packed,
    new_key,
    pack,
    previous_weights,
    share,
    sign,
    unpack,
    writing,
)
from xllm.artifact.store import MAGIC, packed_header


def contents(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


@pytest.fixture
def packed(path: Path, tmp_path: Path) -> Path:
    pack(path, tmp_path / "small.pack")
    return tmp_path / "small.pack"


def refusal(path: Path, key: Path | None = None) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(path, key).map_weights()
    return caught.value


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
        ("weights_header", "../x"), ("weight_origins", {"embed": 1}),
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


# --- shared and reused ------------------------------------------------------------------------------------------------


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
