"""One file in place of a folder, and back: the same bytes whoever packs, and nothing lost either way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from xllm.artifact.aside import built, named
from xllm.artifact.opened import Artifact
from xllm.artifact.seal import ArtifactError
from xllm.artifact.store import PAGE_BYTES, Place, is_packed, packed_header, packed_places
from xllm.artifact.writer import writing

_COPY_BYTES = 8 << 20


def pack(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a verified artifact as one file, whole or not at all. Raises ArtifactError for a source that is not sound,
    and when `out` exists and is no packed artifact."""
    artifact = Artifact.open(source)
    artifact.map_weights()
    places = {name: artifact.store.place(name) for name in sorted(artifact.store.names())}
    sizes = [(name, place.size) for name, place in places.items()]
    header = packed_header(sizes)
    packed = packed_places(len(header), sizes)
    with built(out, folder=False) as aside, named(Path(out)), aside.open("wb") as file:
        file.write(header)
        for name, place in places.items():
            file.seek(packed[name][0])
            _copy(place, file)


def unpack(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes a verified packed artifact as a folder, whole or not at all. Raises ArtifactError as `Artifact.open` and
    `writing` do."""
    if not is_packed(Path(source)):
        raise ArtifactError("not-an-artifact", f"{source} is no packed artifact; `xllm pack` makes one")
    artifact = Artifact.open(source)
    artifact.map_weights()
    with writing(out) as writer:
        for name in sorted(artifact.store.names()):
            file = writer.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with named(file), file.open("wb") as sink:
                _copy(artifact.store.place(name), sink)


def _copy(place: Place, sink: BinaryIO) -> None:
    assert place.offset % PAGE_BYTES == 0
    with place.file.open("rb") as source:
        source.seek(place.offset)
        left = place.size
        while left:
            data = source.read(min(left, _COPY_BYTES))
            if not data:
                raise ArtifactError("artifact-incomplete", f"{place.file} became shorter while it was read")
            sink.write(data)
            left -= len(data)
