"""What machine this is, and what this process may use of it: cores by affinity, NUMA nodes, and the limits of its
control groups, version 1 and 2, its own group's and those of every group around it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MOST_THREADS = 256  # that one plan runner takes


@dataclass(frozen=True)
class Threads:
    """How many threads compute, and the sentence that says why."""

    count: int
    why: str


def threads(asked: int | None = None, root: Path = ROOT) -> Threads:
    """`asked` where given; else the cores this process may run on, within the CPU quota of its control groups and
    MOST_THREADS."""
    total = os.cpu_count() or 1
    cores = usable_cores()
    granted = cpu_quota(root)
    found = f"{cores} of {total} cores" if cores < total else f"all {total} cores"
    found += f", CPU quota of {granted:.3g}" if granted is not None else ", no CPU quota"
    most = min(cores if granted is None else min(cores, max(1, int(granted))), MOST_THREADS)
    if asked is None:
        return Threads(most, found)
    wait = "; more than there are wait for each other" if asked > most else ""
    return Threads(asked, f"as --threads says; {found}{wait}")


def trim() -> None:
    """What was freed goes back to the system now: the C library (glibc) would keep it for ever."""
    import ctypes

    if give := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give(0)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the narrowest control group grants; None where none sets a limit."""
    granted = []
    for version, folder in groups("cpu", root):
        if version == 2:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and "-1" are no limit
            granted.append(int(quota) / int(period))
    return min(granted, default=None)


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes that the control groups still grant: the least of each limit less what its group holds and can't drop."""
    left = []
    for version, folder in groups("memory", root):
        limit = _text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        kept = ("anon", "shmem") if version == 2 else ("total_rss", "total_shmem")
        held = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
        if limit.isdigit():
            left.append(max(0, int(limit) - sum(int(held.get(name, 0)) for name in kept)))
    return min(left, default=None)


def cpu_model(root: Path = ROOT) -> str:
    """As the system names it; on Arm, where it has no name, by implementer and part."""
    text = _text(root / "proc/cpuinfo")
    for field in ("model name", "Model"):
        if found := re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    parts = [re.search(rf"^CPU {field}\s*:\s*(\S+)$", text, re.MULTILINE) for field in ("implementer", "part")]
    return " ".join(part[1] for part in parts if part) or platform.processor() or platform.machine()


def numa_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Nodes that have a core this process may run on."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    nodes = []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cores = set()
        for part in filter(None, _text(folder / "cpulist").split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        if cores & usable:
            nodes.append(int(folder.name.removeprefix("node")))
    return tuple(sorted(nodes))


def groups(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group that limits this process by `controller`, from its own outwards.

    A container may see its group under another name than its mount has, or only its own part of the tree: what lies
    beyond the mount can't be read, and what isn't there sets no limit.
    """
    own: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        part, place = before.split()[3:5]
        kind, *_, options = after.split()  # what is mounted may have no name
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        path = own.get(controller if version == 1 else "")
        if version is None or path is None or (version == 1 and controller not in options.split(",")):
            continue
        inner = PurePosixPath(path)
        inside = inner.relative_to(part) if inner.is_relative_to(part) else PurePosixPath()
        top = root / place.lstrip("/")
        for folder in (inside, *inside.parents):
            if (found := top / folder).is_dir() and ".." not in folder.parts:
                yield version, found


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
