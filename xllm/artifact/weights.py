"""The weight file: where each weight lies, and its mapping into memory.

It is a safetensors file. A weight's region runs to the next weight, so that digests cover the gaps too.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xllm.artifact.store import PAGE_BYTES, Place
from xllm.plan import ALIGN_BYTES, Plan, StoredWeight

WEIGHTS = "weights/model.safetensors"
_MAP_FIXED, _MADV_POPULATE_READ = 0x10, 22
HUGE_PAGE_BYTES = 2 << 20


class MappedWeights:
    """A read-only mapping of the weight file. Addresses stay valid as long as the object lives."""

    def __init__(self, place: Place) -> None:
        self._skip = place.offset % mmap.ALLOCATIONGRANULARITY  # a packed file is aligned to 4 KiB, pages may be larger
        self._hold(os.open(place.file, os.O_RDONLY), place.offset - self._skip)
        self._map = mmap.mmap(
            self._file, self._skip + place.size, access=mmap.ACCESS_READ, offset=place.offset - self._skip
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8, offset=self._skip)
        self.address = self.bytes.ctypes.data

    def _hold(self, file: int, offset: int) -> None:
        self._file, self._offset = file, offset
        self._close = weakref.finalize(self, os.close, file)

    def _advise(self, advice: int) -> None:
        try:
            self._map.madvise(advice)
        except OSError:
            return  # advice only: kernels without file huge pages refuse it

    def enlarge(self, start: int, stop: int) -> None:
        """Before bytes of a new file are written: has the system cache them in huge pages, where it can, so that who
        maps them reads a few percent faster. They would lie in pieces as small as they are written in."""
        self.bytes[start:stop:HUGE_PAGE_BYTES].max(initial=0)
        self.release(start, stop)

    def release(self, start: int, stop: int) -> None:
        """Says that bytes are not needed soon: they leave the resident set and are read again if touched."""
        release(self._map, self._skip + start, self._skip + stop)

    def rest(self, everywhere: bool) -> None:
        """Leave the memory of this process: touched again, the bytes are read again. everywhere: the system's cache of
        files as well, where nobody else maps them."""
        release(self._map, 0, len(self._map))
        if everywhere and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, self._offset, len(self._map), os.POSIX_FADV_DONTNEED)

    def become(self, other: MappedWeights) -> None:
        """Show the bytes of `other` from now on, at the same addresses: nothing that was bound to them is bound again.
        Nobody may read meanwhile. Raises ValueError when it does not lie as this one does, OSError."""
        if (len(other._map), other._skip) != (len(self._map), self._skip):
            raise ValueError(f"{len(other.bytes)} bytes of weights cannot take the place of {len(self.bytes)}")
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        flags, at = mmap.MAP_SHARED | _MAP_FIXED, self.address - self._skip
        file = os.dup(other._file)
        if libc.mmap(at, len(self._map), mmap.PROT_READ, flags, file, other._offset) != at:
            os.close(file)
            raise OSError(ctypes.get_errno(), "the new weights cannot be mapped")
        self._close()
        self._hold(file, other._offset)
        self._advise(mmap.MADV_HUGEPAGE)
        self._advise(_MADV_POPULATE_READ)  # at once: else the next steps meet a fault for every few pages

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
