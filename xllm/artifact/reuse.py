"""Weights of an earlier artifact: found by what they were made from, believed only after their bytes were digested."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from xllm.artifact.opened import Artifact
from xllm.artifact.seal import ArtifactError, digest
from xllm.artifact.store import is_artifact
from xllm.artifact.weights import MappedWeights, regions
from xllm.plan import StoredWeight

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Previous:
    """An earlier artifact. `by_origin`: origin of a weight -> where it lies and the digest of that region."""

    mapped: MappedWeights
    by_origin: Mapping[str, tuple[int, int, str]]

    def find(self, origin: str, weight: StoredWeight) -> Region | None:
        """The bytes of a weight with this origin, to be verified while they are read."""
        start, stop, claimed = self.by_origin.get(origin, (0, 0, ""))
        if not claimed or stop - start < weight.bytes:
            return None
        return Region(self.mapped, start, stop, weight.bytes, claimed)


@dataclass(frozen=True)
class Region:
    """A weight's `size` bytes in an earlier artifact, and behind them the gap that its digest covers too."""

    mapped: MappedWeights
    start: int
    stop: int
    size: int
    claimed: str

    def blocks(self) -> Iterator[np.ndarray]:
        end = self.start + self.size
        for start in range(self.start, end, _BLOCK_BYTES):
            yield self.mapped.bytes[start : min(start + _BLOCK_BYTES, end)]

    def intact(self, found: str, gap: int) -> bool:
        """Whether the bytes are what the earlier compiler wrote; `found` is their digest with `gap` zeros behind."""
        same = self.stop - self.start == self.size + gap
        held = found if same else digest(self.mapped.bytes[self.start : self.stop])
        self.mapped.release(self.start, self.stop)
        return held == self.claimed


def previous_weights(path: str | os.PathLike[str] | None) -> Previous | None:
    """The weights of the artifact at `path`; None where there is none, or none that this version reads."""
    if path is None or not is_artifact(path):
        return None
    with contextlib.suppress(ArtifactError):
        artifact = Artifact.open(path)
        origins = artifact.manifest.get("weight_origins", {})
        mapped = artifact.map_weights(verify=False)
        places = {}
        for name, start, stop, claimed in regions(
            artifact.plan, artifact.manifest["weights_header"], len(mapped.bytes)
        ):
            key = name.removeprefix("weight ")
            if key in origins:
                places[origins[key]] = (start, stop, claimed)
        return Previous(mapped, places)
    return None
