"""The weight file: where each weight lies, and its mapping into memory.

It is a safetensors file. A weight's region runs to the next weight, so that digests cover the gaps too.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xllm.artifact.store import PAGE_BYTES, Place
from xllm.plan import ALIGN_BYTES, Plan, StoredWeight

WEIGHTS = "weights/model.safetensors"


class MappedWeights:
    """A read-only mapping of the weight file. Addresses stay valid as long as the object lives."""

    def __init__(self, place: Place) -> None:
        self._skip = place.offset % mmap.ALLOCATIONGRANULARITY  # a packed file is aligned to 4 KiB, pages may be larger
        with place.file.open("rb") as handle:
            self._map = mmap.mmap(
                handle.fileno(),
                self._skip + place.size,
                access=mmap.ACCESS_READ,
                offset=place.offset - self._skip,
            )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8, offset=self._skip)
        self.address = self.bytes.ctypes.data

    def _advise(self, advice: int) -> None:
        try:
            self._map.madvise(advice)
        except OSError:
            return  # advice only: kernels without file huge pages refuse it

    def release(self, start: int, stop: int) -> None:
        """Says that bytes are not needed soon: they leave the resident set and are read again if touched."""
        release(self._map, self._skip + start, self._skip + stop)

    def array(self, weight: StoredWeight) -> np.ndarray:
        """A plain weight as float32 [shape], without a copy."""
        raw = self.bytes[weight.offset : weight.offset + weight.bytes]
        return raw.view(np.float32).reshape(weight.shape)


def release(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Drops whole pages of a read-only mapping from the resident set of this process."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def layout(plan: Plan) -> tuple[dict[str, StoredWeight], bytes]:
    """Where each weight goes, and the safetensors header that says so. Gaps are named: the format allows no holes."""
    relative: dict[str, tuple[int, int]] = {}
    at = 0
    for key, weight in sorted(plan.weights.items()):
        align = PAGE_BYTES if weight.bytes >= PAGE_BYTES else ALIGN_BYTES
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


def regions(plan: Plan, header_digest: str, size: int) -> Iterator[tuple[str, int, int, str]]:
    """What the writer hashed: (name, start, stop, digest) over every byte of a file of `size` bytes."""
    weights = sorted(plan.weights.items(), key=lambda item: item[1].offset)
    header = min((weight.offset for _, weight in weights), default=size)
    yield "header", 0, header, header_digest
    start = header
    for index, (key, weight) in enumerate(weights):
        stop = weights[index + 1][1].offset if index + 1 < len(weights) else size
        yield f"weight {key}", start, stop, weight.digest
        start = stop
