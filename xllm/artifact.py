"""The artifact: a folder of data that a runtime maps and runs. Written once, named by digests, refused when changed.

manifest.json   what it is: target, model facts, limits, pass records, digest of every file; carries its own digest
plan.json       what to execute (see `plan.py`), with the place and digest of every weight
weights/model.safetensors   weights in the target's layout, page aligned, mapped and never copied
ir/NN-pass.ir   the program after every pass, for reading
tokenizer/      tokenizer.json and what belongs to it
"""

from __future__ import annotations

import json
import mmap
import os
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

SCHEMA = 1
PAGE_BYTES = 4096
WEIGHTS = "weights/model.safetensors"
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
        for name, digest in manifest["files"].items():
            file = root / name
            if not file.is_file():
                raise ArtifactError("artifact-incomplete", f"{name} is missing; compile the checkpoint again")
            if _digest(file.read_bytes()) != digest:
                raise _changed(name)
        try:
            plan = Plan.from_json((root / "plan.json").read_text())
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}") from error
        return Artifact(root, manifest, plan)

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
        file = self.path / "tokenizer" / "chat_template.jinja"
        return file.read_text() if file.is_file() else None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self.manifest["special_tokens"]

    @property
    def weight_bytes(self) -> int:
        return (self.path / WEIGHTS).stat().st_size

    def stages(self) -> dict[str, Path]:
        """Program dumps by stage name, in pipeline order."""
        return {file.name.split("-", 1)[1].removesuffix(".ir"): file for file in sorted((self.path / "ir").glob("*.ir"))}

    def map_weights(self, verify: bool = True, progress: Progress | None = None) -> MappedWeights:
        """Maps the weight file read-only and, unless told not to, checks every weight against its digest.

        The mapping is shared: processes serving one artifact hold one copy. Raises ArtifactError naming the first weight
        whose bytes changed.
        """
        mapped = MappedWeights(self.path / WEIGHTS)
        size = len(mapped.bytes)
        if any(weight.offset + weight.bytes > size for weight in self.plan.weights.values()):
            raise ArtifactError("artifact-incomplete", f"{WEIGHTS} is cut short; compile the checkpoint again")
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
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
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
        raw = data.encode() if isinstance(data, str) else data
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(raw)
        self._files[name] = _digest(raw)

    def write_weights(
        self, plan: Plan, make: Callable[[StoredWeight], np.ndarray], progress: Progress | None = None
    ) -> tuple[Plan, str]:
        """Streams every weight to its aligned place, one in memory at a time.

        `make` gives a weight's bytes (uint8 [bytes]). Returns the plan with places and digests, and the header's digest.
        """
        placed, header = _layout(plan)
        total = max((weight.offset + weight.bytes for weight in placed.values()), default=len(header))
        file = self.root / WEIGHTS
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            out.write(header)
            for key, weight in placed.items():
                data = make(weight)
                if data.dtype != np.uint8 or data.shape != (weight.bytes,):
                    raise ValueError(f"weight {key} has {data.shape} {data.dtype}, planned are {weight.bytes} bytes")
                out.write(b"\0" * (weight.offset - out.tell()))
                start = out.tell()
                out.write(data.data)
                del data
                if progress is not None:
                    progress(key, start + weight.bytes, total)
        sealed = _seal(file, placed)
        return replace(plan, weights=sealed), _digest(header)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, with the digests of all files and its own."""
        body = {"schema": SCHEMA, **manifest, "files": dict(sorted(self._files.items()))}
        body["digest"] = _digest(_canonical(body))
        (self.root / "manifest.json").write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[ArtifactWriter]:
    """An artifact is there whole or not at all: built beside `path`, renamed over it at the end, removed on any error.

    Raises ArtifactError when `path` exists and is not an artifact.
    """
    root = Path(path)
    if root.exists() and not (root / "manifest.json").is_file() and (not root.is_dir() or any(root.iterdir())):
        raise ArtifactError("not-an-artifact", f"{root} exists and is not an artifact; choose another -o or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = root.parent / f".{root.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield ArtifactWriter(aside)
        old = root.parent / f".{root.name}.old-{os.getpid()}"
        if root.exists():
            root.rename(old)
        aside.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
        key: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} for key, (start, stop) in relative.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    header = struct.pack("<Q", len(text)) + text
    placed = {
        key: replace(weight, file=WEIGHTS, offset=len(header) + relative[key][0])
        for key, weight in sorted(plan.weights.items())
    }
    return placed, header


def _seal(file: Path, placed: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Digests of what is on disk now. A weight's region runs to the next weight, so that gaps are covered too."""
    data = np.memmap(file, np.uint8, "r")
    starts = [weight.offset for weight in placed.values()]
    stops = [*starts[1:], len(data)]
    return {
        key: replace(weight, digest=_digest(data[start:stop]))
        for (key, weight), start, stop in zip(placed.items(), starts, stops, strict=True)
    }


def _regions(plan: Plan, header_digest: str, size: int) -> Iterator[tuple[str, int, int, str]]:
    """What `_seal` hashed: (name, start, stop, digest) over every byte of the file."""
    weights = sorted(plan.weights.items(), key=lambda item: item[1].offset)
    header = min((weight.offset for _, weight in weights), default=size)
    yield "header", 0, header, header_digest
    start = header
    for index, (key, weight) in enumerate(weights):
        stop = weights[index + 1][1].offset if index + 1 < len(weights) else size
        yield f"weight {key}", start, stop, weight.digest
        start = stop


def _read_manifest(root: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((root / "manifest.json").read_text())
        claimed = manifest.pop("digest")
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("artifact-malformed", f"manifest.json is not a manifest: {error}") from error
    if schema != SCHEMA:
        raise ArtifactError(
            "artifact-schema", f"manifest.json has schema {schema}, this xllm reads {SCHEMA}; compile the checkpoint again"
        )
    if _digest(_canonical(manifest)) != claimed:
        raise _changed("manifest.json")
    return {**manifest, "digest": claimed}


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _digest(data: Any) -> str:
    """blake3 of bytes, on all cores where there is enough to share."""
    return blake3(data, max_threads=blake3.AUTO if len(data) > 1 << 20 else 1).hexdigest()


def _changed(name: str) -> ArtifactError:
    return ArtifactError("artifact-changed", f"{name} is not what the compiler wrote; compile the checkpoint again")
