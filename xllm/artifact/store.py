"""Where the files of an artifact lie: in a folder, or one behind another in a packed file.

A packed file is a header, then the files, each at the next multiple of PAGE_BYTES with zeros between, so that weights
are mapped in place. The header: MAGIC, the length of the index as a little-endian u64, the index, spaces up to a page.
The index is JSON, [[name, bytes], ...] in the order of names; places follow from it, so there is one way to pack.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from blake3 import blake3

from xllm.artifact.seal import ArtifactError, changed

PAGE_BYTES = 4096
MAGIC = b"XLLMPACK"
MAX_READ_BYTES = 1 << 30  # of a file that is read, not mapped
MAX_TABLE_BYTES = 64 << 20  # of manifest.json and plan.json, which become many small objects; real ones have a few MiB
_BLOCK_BYTES = 4 << 20
_MAX_INDEX_BYTES = 16 << 20
_HEAD = struct.Struct("<8sQ")


@dataclass(frozen=True)
class Place:
    """`size` bytes at `offset` of `file`; the offset is a multiple of PAGE_BYTES."""

    file: Path
    offset: int
    size: int


class Store(Protocol):
    """The files of one artifact by name. Names are relative paths with slashes."""

    @property
    def path(self) -> Path: ...

    def names(self) -> frozenset[str]: ...

    def place(self, name: str) -> Place:
        """Raises ArtifactError naming a file that is missing or lies elsewhere."""
        ...


def open_store(path: str | os.PathLike[str]) -> Store:
    """The artifact at `path`, whichever form it has. Raises ArtifactError when there is none."""
    root = Path(path)
    if is_packed(root):
        return Packed(root, _read_index(root))
    if (root / "manifest.json").is_file():
        return Folder(root)
    raise ArtifactError(
        "not-an-artifact", f"{root} has no manifest.json; build one with `xllm compile CHECKPOINT -o {root}`"
    )


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Whether there is an artifact of either form, sound or not."""
    return is_packed(Path(path)) or (Path(path) / "manifest.json").is_file()


def is_packed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(store: Store, name: str, limit: int = MAX_READ_BYTES) -> bytes:
    """A whole file. Raises ArtifactError when it is missing or larger than `limit` bytes."""
    place = store.place(name)
    if place.size > limit:
        raise ArtifactError("artifact-malformed", f"{name} has {place.size} bytes, at most {limit} are read")
    with place.file.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def digest_of(store: Store, name: str) -> str:
    """Digest of a file of any size, a block of it in memory at a time. Raises ArtifactError when it is missing."""
    place, hasher = store.place(name), blake3()
    with place.file.open("rb") as file:
        file.seek(place.offset)
        left = place.size
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            hasher.update(block)
            left -= len(block)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Folder:
    path: Path

    def names(self) -> frozenset[str]:
        found = set()
        for folder, folders, files in os.walk(self.path):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            at = Path(folder).relative_to(self.path)
            found.update((at / name).as_posix() for name in (*files, *links))
            if at.parts and not folders and not files:
                found.add(f"{at.as_posix()}/")  # an empty folder, which no artifact has
        return frozenset(found)

    def place(self, name: str) -> Place:
        file = self.path / name
        if not file.is_file():
            raise ArtifactError("artifact-incomplete", f"{name} is missing; compile the checkpoint again")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise ArtifactError("artifact-changed", f"{name} leads out of the artifact; compile the checkpoint again")
        return Place(file, 0, file.stat().st_size)


@dataclass(frozen=True)
class Packed:
    path: Path
    index: Mapping[str, tuple[int, int]]  # name -> offset, bytes

    def names(self) -> frozenset[str]:
        return frozenset(self.index)

    def place(self, name: str) -> Place:
        if name not in self.index:
            raise ArtifactError("artifact-incomplete", f"{name} is missing; compile the checkpoint again")
        return Place(self.path, *self.index[name])


def packed_header(sizes: Iterable[tuple[str, int]]) -> bytes:
    """The header of a packed file with these files, which are in the order of their names."""
    text = json.dumps([[name, size] for name, size in sizes], separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + _HEAD.size) % PAGE_BYTES)
    return _HEAD.pack(MAGIC, len(text)) + text


def packed_places(header_bytes: int, sizes: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Offset and bytes of every file behind a header of `header_bytes`."""
    places, at = {}, header_bytes
    for name, size in sizes:
        places[name] = (at, size)
        at += -(-size // PAGE_BYTES) * PAGE_BYTES
    return places


def _read_index(path: Path) -> dict[str, tuple[int, int]]:
    """The index of a packed file whose header, sizes and gaps are as packing leaves them. Nothing is read or allocated
    for a size that the file does not have."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        size = _HEAD.unpack(head)[1] if len(head) == _HEAD.size else length
        if size > min(_MAX_INDEX_BYTES, length - _HEAD.size):
            raise _malformed(path, f"its index claims {size} bytes")
        raw = file.read(size)
        try:
            sizes = [(name, count) for name, count in json.loads(raw)]
            header = packed_header(sizes)
        except (ValueError, TypeError, RecursionError) as error:
            raise _malformed(path, f"its index is not one: {error}") from error
        for name, count in sizes:
            if not isinstance(name, str) or type(count) is not int or not 0 <= count <= length or not _inside(name):
                raise _malformed(path, f"its index holds {name!r} with {count!r} bytes")
        names = [name for name, _ in sizes]
        if header != head + raw or names != sorted(set(names)):
            raise changed(f"the index of {path.name}")
        places = packed_places(len(header), sizes)
        end = max((offset + count for offset, count in places.values()), default=len(header))
        if end != length:
            raise ArtifactError("artifact-incomplete", f"{path.name} has {length} bytes, its index says {end}")
        for name, (offset, count) in places.items():
            gap = min(-count % PAGE_BYTES, end - offset - count)
            file.seek(offset + count)
            if file.read(gap).strip(b"\0"):
                raise changed(f"the gap behind {name}")
    return places


def _inside(name: str) -> bool:
    return (
        bool(name)
        and "\\" not in name
        and "\0" not in name
        and not PurePosixPath(name).is_absolute()
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _malformed(path: Path, why: str) -> ArtifactError:
    return ArtifactError("artifact-malformed", f"{path.name} is not a packed artifact: {why}")
