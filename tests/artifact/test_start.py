"""What a start checks: every byte of the weights, by the checksum of the file; by digests where a signature is asked
for. Nothing is said before."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.artifacts import reseal, weight_bytes, write_small
from xllm.artifact import WEIGHTS, Artifact, ArtifactError, MappedWeights, digest, new_key, pack, sign
from xllm.artifact.seal import Checksums, checksum
from xllm.artifact.store import Place
from xllm.kernels import cpu


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


@pytest.fixture(params=["folder", "one file"])
def held(request: pytest.FixtureRequest, path: Path, tmp_path: Path) -> Path:
    """An artifact in either form."""
    if request.param == "folder":
        return path
    pack(path, tmp_path / "small.pack")
    return tmp_path / "small.pack"


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (5 << 20) + 17])
def test_a_checksum_taken_in_parts_is_that_of_the_whole(size: int) -> None:
    """Parts of any size and order, a gap that nobody took among them; all that was read can be released."""
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, size, np.uint8)
    wanted = digest(cpu.checksum(data, 2).tobytes(), size.to_bytes(8, "little"))
    assert checksum(data, 2) == wanted
    for count in (0, 1, 7):
        cuts = [0, *sorted(rng.integers(0, size + 1, count).tolist()), size]
        parts = list(itertools.pairwise(cuts))
        rng.shuffle(parts)
        released: list[tuple[int, int]] = []
        sums = Checksums(data, lambda start, stop, released=released: released.append((start, stop)))
        for start, stop in parts[count // 4 :]:
            sums.take(start, stop)
        assert sums.name() == wanted
        assert sum(stop - start for start, stop in released) == size


def test_a_checksum_of_the_whole_is_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two, a start would wait for the interpreter, which reading a tokenizer holds for long."""
    calls: list[int] = []
    monkeypatch.setattr("xllm.artifact.seal._RUN_BLOCKS", 1)
    monkeypatch.setattr(cpu, "checksum", lambda data, threads: calls.append(len(data)) or np.zeros((3, 64), np.uint32))
    checksum(np.zeros(3 << 20, np.uint8), 2)
    assert calls == [3 << 20]


def place_of(path: Path) -> Place:
    return Artifact.open(path).store.place(WEIGHTS)


def flip(place: Place, at: int, bit: int = 1) -> None:
    with place.file.open("r+b") as file:
        file.seek(place.offset + at)
        [byte] = file.read(1)
        file.seek(place.offset + at)
        file.write(bytes([byte ^ bit]))


def start(path: Path) -> MappedWeights:
    return Artifact.open(path).map_weights(start_threads=2)


def test_every_flipped_bit_is_refused_by_name(held: Path) -> None:
    place, rng = place_of(held), random.Random(0)
    assert start(held).bytes.size == place.size
    for at in {0, place.size - 1, *rng.sample(range(place.size), 40)}:
        bit = 1 << rng.randrange(8)
        flip(place, at, bit)
        with pytest.raises(ArtifactError, match=f"(weight|header).* in {WEIGHTS} is not what the compiler wrote"):
            start(held)
        flip(place, at, bit)
    start(held)


def test_the_weights_of_another_artifact_are_refused_by_name(held: Path, tmp_path: Path) -> None:
    """Of the same sizes in the same places: nothing but the values differs."""
    other = write_small(tmp_path / "other.xllm", lambda weight: 255 - weight_bytes(weight))
    start(other)
    place = place_of(held)
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        file.write((other / WEIGHTS).read_bytes())
    with pytest.raises(ArtifactError, match=f"weight .* in {WEIGHTS} is not what the compiler wrote"):
        start(held)


@pytest.mark.parametrize("change", [-1, -4096, 1, 4096])
def test_weights_of_another_length_are_refused_by_name(held: Path, change: int) -> None:
    file = place_of(held).file
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(ArtifactError, match=WEIGHTS if held.is_dir() else held.name):
        start(held)


def test_an_artifact_without_a_checksum_is_checked_by_digests(path: Path) -> None:
    reseal(path, lambda manifest: manifest.pop("weights_checksum"))
    start(path)
    flip(place_of(path), place_of(path).size - 1)
    with pytest.raises(ArtifactError, match="weight"):
        start(path)


def test_a_required_signature_is_of_digests(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum can be made to fit, digests can't: who asked for a signature gets digests."""
    pytest.importorskip("cryptography")
    public = new_key(tmp_path / "key.pem")
    sign(path, Artifact.open(path).manifest["digest"], tmp_path / "key.pem")
    claimed = Artifact.open(path).manifest["weights_checksum"]
    flip(place_of(path), place_of(path).size - 1)
    monkeypatch.setattr("xllm.artifact.opened.checksum", lambda data, threads: claimed)
    start(path)
    with pytest.raises(ArtifactError, match="is not what the compiler wrote"):
        Artifact.open(path, public).map_weights(start_threads=1)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import FAMILIES, build

    return build(tmp_path_factory.mktemp("start"), {**FAMILIES["qwen3"], "num_hidden_layers": 2})[1]


def refused(artifact: Path, why: str, command: str, *flags: str) -> None:
    """The command ends with exit code 2, one line that says why, and nothing else."""
    line = [sys.executable, "-m", "xllm.cli", command, str(artifact), *flags, "--memory", "512MiB"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert why in done.stderr


@pytest.mark.parametrize("command", [("generate", "-p", "a", "--max-tokens", "1"), ("serve", "--port", "0")])
def test_nothing_is_said_before_the_weights_are_checked(compiled: Path, command: tuple[str, ...]) -> None:
    place = place_of(compiled)
    flip(place, place.size // 2)
    try:
        refused(compiled, f"in {WEIGHTS} is not what", *command)
    finally:
        flip(place, place.size // 2)


def test_a_tokenizer_that_can_not_be_read_is_one_line(compiled: Path, tmp_path: Path) -> None:
    """With a digest that fits: what the compiler was given was of no use."""
    held = shutil.copytree(compiled, tmp_path / "held")
    (held / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    reseal(held, lambda manifest: manifest["files"].update({"tokenizer/tokenizer.json": digest(b"{}")}))
    refused(held, "tokenizer.json can't be read", "serve", "--port", "0")


# Merges as given, and as kept where that is another way.
QUICK = (([["a", "b"], ["ab", "c"]], ["a b", "ab c"]), ([["a", "b"], ["a", " "]], None), ([["#version", "b"]], None))
KEPT = (b'{"model": {"type": "Unigram", "vocab": [["a", -1.20]]}}', b'{"model": {"type": "BPE", "merges": [["a", 1]]}}')


@pytest.mark.parametrize(("merges", "kept"), QUICK)
def test_a_tokenizer_that_is_quick_to_load_is_the_same(merges: list[Any], kept: list[Any] | None) -> None:
    from tokenizers import Tokenizer

    from xllm.compiler import quick_to_load

    pieces = ["a", "b", "c", " ", "ab", "abc", "a ", "#version", "#versionb", "ä"]
    model = {"type": "BPE", "vocab": {piece: at for at, piece in enumerate(pieces)}, "merges": merges}
    given = json.dumps({"version": "1.0", "model": model, "added_tokens": []}, indent=2).encode()
    quick = quick_to_load(given)
    assert json.loads(quick)["model"]["merges"] == (kept or merges)
    assert Tokenizer.from_buffer(quick).to_str() == Tokenizer.from_buffer(given).to_str()
    for other in (*KEPT, b"{", b'{"model": 1}', b"[" * 100_000):
        assert quick_to_load(other) == other
