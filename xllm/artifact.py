"""The artifact: a folder of data that a runtime maps and runs. Written once, named by digests, refused when changed.

manifest.json   what it is: target, model facts, limits, pass records, digest of every file; carries its own digest
plan.json       what to execute (see `plan.py`), with the place and digest of every weight
weights/model.safetensors   weights in the target's layout, page aligned, mapped and never copied
ir/NN-pass.ir   the program after every pass, for reading
tokenizer/      tokenizer.json and what belongs to it

Only files that the manifest names are read; others in the folder are left alone and have no effect.
"""

from __future__ import annotations

import fcntl
import glob
import json
import mmap
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from xllm.plan import Plan, StoredWeight

SCHEMA = 2
PAGE_BYTES = 4096
WEIGHTS = "weights/model.safetensors"
# Fields of the manifest that readers rely on, and what they hold.
FIELDS: Mapping[str, type] = {
    "files": dict, "generation": dict, "limits": dict, "model": dict, "special_tokens": dict, "target": dict,
    "weights_header": str,
}  # fmt: skip
Progress = Callable[[str, int, int], None]  # what, done bytes, total bytes


class ArtifactError(Exception):
    """An artifact that cannot be used: `code` is stable, the message names the file or field and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. `manifest` and `plan` are verified; weights are verified by `map_weights`."""

    path: Path
    manifest: Mapping[str, Any]
    plan: Plan

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Artifact:
        """Reads and checks everything but the weights. Raises ArtifactError naming what is missing or changed."""
        root = Path(path)
        if not (root / "manifest.json").is_file():
            raise ArtifactError(
                "not-an-artifact", f"{root} has no manifest.json; build one with `xllm compile CHECKPOINT -o {root}`"
            )
        manifest = _read_manifest(root)
        held = {name: _read(root, name, digest) for name, digest in manifest["files"].items()}
        if "plan.json" not in held:
            raise ArtifactError("artifact-incomplete", "manifest.json names no plan.json; compile the checkpoint again")
        try:
            plan = Plan.from_json(held["plan.json"])
            plan.check()
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}") from error
        artifact = Artifact(root, manifest, plan)
        end = max((weight.offset + weight.bytes for weight in plan.weights.values()), default=0)
        if artifact.weight_bytes < end:
            raise ArtifactError("artifact-incomplete", f"{WEIGHTS} is cut short; compile the checkpoint again")
        return artifact

    @property
    def name(self) -> str:
        return self.manifest["model"]["name"]

    @property
    def generation(self) -> Mapping[str, Any]:
        """Contents of the checkpoint's generation_config.json; empty where it has none."""
        return self.manifest["generation"]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer" / "tokenizer.json"

    @property
    def chat_template(self) -> str | None:
        name = "tokenizer/chat_template.jinja"
        return (self.path / name).read_text(encoding="utf-8") if name in self.manifest["files"] else None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self.manifest["special_tokens"]

    @property
    def weight_bytes(self) -> int:
        return _inside(self.path, WEIGHTS).stat().st_size

    def stages(self) -> dict[str, Path]:
        """Program dumps by stage name, in pipeline order."""
        dumps = sorted(name for name in self.manifest["files"] if name.startswith("ir/"))
        return {name.split("-", 1)[1].removesuffix(".ir"): self.path / name for name in dumps}

    def map_weights(self, verify: bool = True, progress: Progress | None = None) -> MappedWeights:
        """Maps the weight file read-only and, unless told not to, checks every byte of it against the digests.

        The mapping is shared: processes serving one artifact hold one copy. Raises ArtifactError naming the first
        weight whose bytes changed.
        """
        mapped = MappedWeights(_inside(self.path, WEIGHTS))
        size = len(mapped.bytes)
        if verify:
            for name, start, stop, digest in _regions(self.plan, self.manifest["weights_header"], size):
                if _digest(mapped.bytes[start:stop]) != digest:
                    raise _changed(f"{name} in {WEIGHTS}")
                if progress is not None:
                    progress(name, stop, size)
        return mapped


class MappedWeights:
    """A read-only mapping of the weight file. Addresses stay valid until `close`."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)  # never empty: there is a header
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.address = self.bytes.ctypes.data

    def _advise(self, advice: int) -> None:
        try:
            self._map.madvise(advice)
        except OSError:
            return  # advice only: kernels without file huge pages refuse it

    def array(self, weight: StoredWeight) -> np.ndarray:
        """A plain weight as float32 [shape], without a copy."""
        raw = self.bytes[weight.offset : weight.offset + weight.bytes]
        return raw.view(np.float32).reshape(weight.shape)


class ArtifactWriter:
    """Builds an artifact aside. Use through `writing`, which renames it into place when the block ends well."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, str] = {}

    def write(self, name: str, data: bytes | str) -> None:
        """A file at `name`, a relative path, covered by the manifest."""
        raw = data.encode() if isinstance(data, str) else data
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with _named(file):
            file.write_bytes(raw)
        self._files[name] = _digest(raw)

    def write_weights(
        self, plan: Plan, make: Callable[[StoredWeight], np.ndarray], progress: Progress | None = None
    ) -> tuple[Plan, str]:
        """Streams every weight to its aligned place, one in memory at a time.

        `make` gives a weight's bytes (uint8 [bytes]). Returns the plan with places and digests, and the header's
        digest. Raises ValueError for a weight of another size, and for a plan that `Plan.check` refuses.
        """
        placed, header = _layout(plan)
        ends = [*(weight.offset for weight in placed.values()), 0][1:]
        total = max((weight.offset + weight.bytes for weight in placed.values()), default=len(header))
        file = self.root / WEIGHTS
        file.parent.mkdir(parents=True, exist_ok=True)
        sealed: dict[str, StoredWeight] = {}
        with _named(file), file.open("wb") as out:
            out.write(header)
            for (key, weight), end in zip(placed.items(), ends, strict=True):
                data = make(weight)
                if data.dtype != np.uint8 or data.shape != (weight.bytes,):
                    raise ValueError(f"weight {key} has {data.shape} {data.dtype}, planned are {weight.bytes} bytes")
                # A weight's region runs to the next weight, so that digests cover the gaps too.
                gap = b"\0" * max(end - weight.offset - weight.bytes, 0)
                out.write(data.data)
                out.write(gap)
                sealed[key] = replace(weight, digest=_digest(data, gap))
                del data
                if progress is not None:
                    progress(key, weight.offset + weight.bytes, total)
        plan = replace(plan, weights=sealed)
        plan.check()
        return plan, _digest(header)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, with the digests of all files and its own."""
        body = {"schema": SCHEMA, **manifest, "files": self._files}
        body["digest"] = _digest(_spelled(body))
        (self.root / "manifest.json").write_bytes(_spelled(body))


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[ArtifactWriter]:
    """An artifact is there whole or not at all: built beside `path`, renamed over it at the end, removed on any error.

    What a killed build left beside `path` goes when the next one starts. Raises ArtifactError when `path` exists and is
    not an artifact.
    """
    root = Path(os.path.abspath(path))
    if root.exists() and not (root / "manifest.json").is_file() and (not root.is_dir() or any(root.iterdir())):
        raise ArtifactError("not-an-artifact", f"{path} exists and is not an artifact; choose another -o or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    aside = root.parent / f".{root.name}.partial-{secrets.token_hex(4)}"
    aside.mkdir()
    lock = _locked(aside)
    try:
        yield ArtifactWriter(aside)
        _put(aside, root)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """An OSError says which file: of a full disk, a write does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def _put(aside: Path, root: Path) -> None:
    """Renames `aside` to `root`; what stood there is back if that fails."""
    old = Path(f"{aside}.old")
    if root.exists():
        root.rename(old)
    try:
        aside.rename(root)
    except BaseException:  # Ctrl-C too: between the two renames there is nothing under the name
        if old.exists() and not root.exists():
            old.rename(root)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes what builds of `root` left behind: their lock went with their process. An artifact that one had put
    away, and was killed before it put its own in the place, returns.
    """
    for left in sorted(root.parent.glob(f".{glob.escape(root.name)}.partial-*")):
        lock = _locked(left)
        if lock is not None:
            if left.suffix == ".old" and not root.exists() and not left.with_suffix("").exists():
                left.rename(root)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """An exclusive lock on a folder, held until the descriptor or the process goes; None if another has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _layout(plan: Plan) -> tuple[dict[str, StoredWeight], bytes]:
    """Where each weight goes, and the safetensors header that says so. Gaps are named: the format allows no holes."""
    relative: dict[str, tuple[int, int]] = {}
    at = 0
    for key, weight in sorted(plan.weights.items()):
        align = PAGE_BYTES if weight.bytes >= PAGE_BYTES else 64
        start = -(-at // align) * align
        if start > at:
            relative[f"gap.{at}"] = (at, start)
        relative[key] = (start, start + weight.bytes)
        at = start + weight.bytes
    entries = {
        key: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for key, (start, stop) in relative.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    header = struct.pack("<Q", len(text)) + text
    placed = {
        key: replace(weight, file=WEIGHTS, offset=len(header) + relative[key][0])
        for key, weight in sorted(plan.weights.items())
    }
    return placed, header


def _regions(plan: Plan, header_digest: str, size: int) -> Iterator[tuple[str, int, int, str]]:
    """What `write_weights` hashed: (name, start, stop, digest) over every byte of the file."""
    weights = sorted(plan.weights.items(), key=lambda item: item[1].offset)
    header = min((weight.offset for _, weight in weights), default=size)
    yield "header", 0, header, header_digest
    start = header
    for index, (key, weight) in enumerate(weights):
        stop = weights[index + 1][1].offset if index + 1 < len(weights) else size
        yield f"weight {key}", start, stop, weight.digest
        start = stop


def _inside(root: Path, name: str) -> Path:
    """The file `name` of the artifact. Raises ArtifactError when it is missing or leads out of the folder."""
    file = root / name
    if not file.is_file():
        raise ArtifactError("artifact-incomplete", f"{name} is missing; compile the checkpoint again")
    if not file.resolve().is_relative_to(root.resolve()):
        raise ArtifactError("artifact-changed", f"{name} leads out of the artifact; compile the checkpoint again")
    return file


def _read(root: Path, name: str, digest: str) -> bytes:
    raw = _inside(root, name).read_bytes()
    if _digest(raw) != digest:
        raise _changed(name)
    return raw


def _read_manifest(root: Path) -> dict[str, Any]:
    raw = _inside(root, "manifest.json").read_bytes()
    try:
        manifest = json.loads(raw)
        claimed, schema = manifest["digest"], manifest["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError("artifact-malformed", f"manifest.json is not a manifest: {error}") from error
    if schema != SCHEMA:
        raise ArtifactError(
            "artifact-schema",
            f"manifest.json has schema {schema}, this xllm reads {SCHEMA}; compile the checkpoint again",
        )
    body = {key: value for key, value in manifest.items() if key != "digest"}
    # The spelling counts as well, so that there is no byte whose change goes unseen.
    if _digest(_spelled(body)) != claimed or _spelled(manifest) != raw:
        raise _changed("manifest.json")
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise ArtifactError("artifact-malformed", f"manifest.json: {name} is not a {kind.__name__}")
    return manifest


def _spelled(manifest: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest down."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _digest(data: Any, more: bytes = b"") -> str:
    """blake3 of bytes, and of `more` behind them, on all cores where there is enough to share."""
    return blake3(data, max_threads=blake3.AUTO if len(data) > 1 << 20 else 1).update(more).hexdigest()


def _changed(name: str) -> ArtifactError:
    return ArtifactError("artifact-changed", f"{name} is not what the compiler wrote; compile the checkpoint again")
