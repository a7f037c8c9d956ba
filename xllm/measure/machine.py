"""What this machine is, and the two limits that kernels meet on it."""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xllm.kernels import cpu

SHORT = 0.01  # seconds: of less, a thread that was about to sleep counts more than it should; some run is undisturbed
WRITTEN = 0x3C  # small numbers of every type; what nobody wrote is one page of zeros, again and again
_CACHES, _THREADS = Path("/sys/devices/system/cpu/cpu0/cache"), Path("/proc/self/task")


@dataclass(frozen=True)
class Machine:
    """CPU model, instruction set level, threads; bytes read and float32 operations per second of all threads."""

    cpu: str
    level: str
    threads: int
    read_bytes_per_second: float
    flops_per_second: float


def cache_bytes() -> dict[str, int]:
    """Bytes of the first core's data caches, "L1d", "L2", "L3"; empty where the system does not say."""
    found = {}
    for entry in sorted(_CACHES.glob("index*")):
        level, kind, size = (_read(entry / name).strip() for name in ("level", "type", "size"))
        if kind in ("Data", "Unified") and (match := re.fullmatch(r"(\d+)([KM]?)", size)):
            found[f"L{level}" + ("d" if kind == "Data" else "")] = int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]]
    return found


def ceilings(runner: cpu.Runner) -> tuple[float, float]:
    """Bytes read and float32 operations per second, in a quarter of a second: the best of several short runs."""
    return runner.read_bandwidth(128 << 20, repeats=5), runner.fma_peak(20_000, repeats=20)


def state_memory(size: int) -> np.ndarray:
    """Written uint8 memory for keys and values, shared as the engine's pages are: as large pages as the system gives
    to those, which decides how fast short runs far apart are read."""
    memory = np.frombuffer(mmap.mmap(-1, max(size, mmap.PAGESIZE)), np.uint8)
    memory[:] = WRITTEN
    return memory


ThreadTimes = Mapping[str, tuple[int, int]]


def thread_times() -> ThreadTimes:
    """Nanoseconds that each other thread of this process has run, and has been ready to run while others had the cores;
    nothing where the system does not say."""
    found, own = {}, str(threading.get_native_id())  # which is busy asking
    for folder in _THREADS.glob("*"):
        if folder.name != own and len(figures := _read(folder / "schedstat").split()) == 3:
            found[folder.name] = int(figures[0]), int(figures[1])
    return found


def undisturbed(took: float, before: ThreadTimes, after: ThreadTimes, threads: int) -> float:
    """Of `took` seconds between two readings, those without what each of so many threads, those that ran most, waited
    for a core: where others take their turns on all cores, what these took. Where they disturb one thread alone it is
    all of them, since that may have kept the rest waiting or not. Never less than a thread ran."""
    spans = sorted(
        (run - before[name][0], wait - before[name][1]) for name, (run, wait) in after.items() if name in before
    )[-threads:]
    if not spans or took < SHORT:
        return took
    return min(took, max(took - min(wait for _, wait in spans) / 1e9, spans[-1][0] / 1e9))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
