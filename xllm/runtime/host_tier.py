"""Groups of keys and values in memory of this process, beside the pool: a budget of bytes, the oldest use goes first.

Each group lies in a slot of its size and carries a checksum: what does not match it any more is a miss, and counted.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from blake3 import blake3

from xllm.runtime.config import TierFigures
from xllm.runtime.errors import MemoryFault, RuntimeFault


class HostTier:
    """`put` and `get` are for one thread; the index may be asked and refreshed from any. What `get` returns is to be
    read before the next `put`. Raises RuntimeFault (invalid_config) where not one group fits,
    MemoryFault where there is no such memory."""

    name = "host"

    def __init__(self, size: int, group_bytes: int):
        slots = size // group_bytes
        if slots < 1:
            raise RuntimeFault("invalid_config", f"a host cache of {size} bytes holds no group of {group_bytes}")
        self._group_bytes = group_bytes
        try:
            memory = mmap.mmap(-1, slots * group_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryFault("memory_unavailable", f"mmap of a host cache of {size} bytes: {error.strerror}") from None
        self._memory = memoryview(memory)  # taken from the system as slots are filled
        self._free = list(reversed(range(slots)))
        self._held: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # digest -> slot and checksum; oldest first
        self._lock = threading.Lock()
        self._figures = TierFigures("host", group_bytes, slots * group_bytes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def lacks(self, key: bytes) -> bool:
        """Would it take this group?"""
        return key not in self._held

    def refresh(self, keys: Sequence[bytes]) -> None:
        """These are in use; the first of them stay longest."""
        with self._lock:
            for key in reversed(keys):
                if key in self._held:
                    self._held.move_to_end(key)

    def put(self, key: bytes, data: memoryview) -> None:
        """Keep a copy of a group."""
        with self._lock:
            if not self.lacks(key):
                return
            if not self._free:
                self._free.append(self._held.popitem(last=False)[1][0])
                self._count(evictions=1)
            slot = self._free.pop()
        self._slot(slot)[:] = data
        with self._lock:
            self._held[key] = slot, checksum(key, data)
            self._count(stored=1)

    def get(self, key: bytes) -> memoryview | None:
        """The bytes of a group, as they were put."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            slot, sealed = self._held[key]
        data = self._slot(slot)
        good = checksum(key, data) == sealed
        with self._lock:
            if not good:
                self._free.append(self._held.pop(key)[0])
            self._count(loaded=good, corrupt=not good)
        return data if good else None

    def figures(self) -> TierFigures:
        return replace(self._figures, held_bytes=len(self._held) * self._group_bytes)

    def close(self) -> None:
        """Give the memory back. Calling it again does nothing."""
        self._held.clear()
        self._memory = memoryview(b"")  # with the last slice of it the memory goes

    def _slot(self, slot: int) -> memoryview:
        return self._memory[slot * self._group_bytes : (slot + 1) * self._group_bytes]

    def _count(self, **more: int) -> None:
        self._figures = self._figures.plus(**more)


def checksum(key: bytes, data: memoryview) -> bytes:
    """Of the bytes of a group, 32 bytes; the same bytes under another digest have another."""
    return blake3(data, key=key + key).digest()
