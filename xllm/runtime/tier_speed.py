"""How fast slower memory gives keys and values back on this machine: measured when an engine with tiers opens, in some
milliseconds, by the tiers themselves."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from xllm.runtime.disk_tier import DiskTier
from xllm.runtime.host_tier import HostTier

SAMPLE_BYTES, SAMPLE_GROUPS = 4 << 20, 8  # at most, of either
REPEATS = 3
NEVER = 1e6  # seconds a byte of what can't be used: loading then never pays


def host_seconds(group_bytes: int) -> float:
    """Seconds a byte of a load from memory: it is checked, and copied into pages."""
    return _seconds(HostTier(SAMPLE_GROUPS * group_bytes, group_bytes), group_bytes, lambda: None)


def disk_seconds(folder: str | os.PathLike[str], group_bytes: int) -> float:
    """The same from files in a folder, which the system is asked to forget before; NEVER of one that can't be used."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder, prefix="speed-") as scratch:
            tier = DiskTier(scratch, 2 * SAMPLE_GROUPS * (group_bytes + 4096), group_bytes, "0" * 32)
            return _seconds(tier, group_bytes, lambda: _forget(Path(scratch)))
    except OSError:
        return NEVER


def _seconds(tier: HostTier | DiskTier, group_bytes: int, forget: Callable[[], None]) -> float:
    """The least of several times: others that use the machine only add to it."""
    count = min(max(1, SAMPLE_BYTES // group_bytes), SAMPLE_GROUPS)
    keys = [at.to_bytes(16, "little") for at in range(count)]
    group, page = memoryview(os.urandom(group_bytes)), memoryview(bytearray(group_bytes))
    try:
        for key in keys:
            tier.put(key, group)
        taken = []
        for _ in range(REPEATS):
            forget()
            began = time.perf_counter()
            for key in keys:
                if (found := tier.get(key)) is None:
                    return NEVER
                page[:] = found
            taken.append(time.perf_counter() - began)
        return min(taken) / (len(keys) * group_bytes)
    finally:
        tier.close()


def _forget(folder: Path) -> None:
    for file in folder.rglob("*.kv"):
        held = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(held)  # what is not on the disk yet can't be forgotten
            os.posix_fadvise(held, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(held)
