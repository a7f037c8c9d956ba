"""What every benchmark reports alike: spreads, ceilings of the machine, one table on the terminal, one JSON file.

A result names the hardware, the versions and the load it ran beside; never a host, a user, a path or a date, so that a
file can be committed and compared with one from elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from xllm.kernels import cpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE_COLUMNS = 150
PACKAGES = ("xllm", "numpy", "torch", "transformers", "uvicorn", "uvloop", "tokenizers")


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of `count` measurements of one thing."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        held = sorted(values)
        if not held:
            return Spread(math.nan, math.nan, math.nan, 0)
        return Spread(statistics.median(held), held[0], held[-1], len(held))

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """The median, with the range behind it where there is one."""
        middle, low, high = (f"{value * scale:,.{digits}f}" for value in (self.median, self.low, self.high))
        return middle if self.count < 2 else f"{middle} ({low}-{high})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linear between neighbours; NaN of nothing."""
    if not values:
        return math.nan
    held = sorted(values)
    at = (len(held) - 1) * share
    below = math.floor(at)
    above = min(below + 1, len(held) - 1)
    return held[below] + (held[above] - held[below]) * (at - below)


@dataclass(frozen=True)
class Ceiling:
    """What the machine could do at that moment with so many threads: bytes and float32 operations per second."""

    threads: int
    read_bytes_per_second: float
    flops_per_second: float

    @staticmethod
    def measure(threads: int) -> Ceiling:
        """About half a second, the best of many short runs: a long one on a busy machine would share its cores."""
        with cpu.Runner(threads) as runner:
            return Ceiling(threads, runner.read_bandwidth(512 << 20, repeats=6), runner.fma_peak(20_000, repeats=50))

    @staticmethod
    def best(held: Sequence[Ceiling]) -> Ceiling:
        """The greatest of several: the ceiling that flatters least."""
        read = max(ceiling.read_bytes_per_second for ceiling in held)
        return Ceiling(held[0].threads, read, max(ceiling.flops_per_second for ceiling in held))


def machine() -> dict[str, Any]:
    """Hardware facts, and how busy the machine was: the load average counts this process too."""
    huge = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor(),
        "architecture": platform.machine(),
        "level": cpu.level(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "huge_pages": huge[1] if huge else "unknown",
        "load_average": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the commit ("+" where the working tree differs from it)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "xllm", "kernels")
        found["commit"] = commit + ("+" if changed else "")
    return found


def save(path: str | Path, benchmark: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes one result file: {benchmark, settings, results, machine, versions}, floats to 5 digits."""
    body = {
        "benchmark": benchmark, "settings": settings, "results": results, "machine": machine(), "versions": versions(),
    }  # fmt: skip
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_plain(body), indent=1, ensure_ascii=False) + "\n")


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def console() -> Console:
    """The terminal, or pages wide enough for a table where output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else PAGE_COLUMNS)


def footer(out: Console) -> None:
    """The line below every table: what it ran on."""
    facts = machine()
    out.print(
        f"{facts['cpu']}, {facts['level']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB, "
        f"huge pages {facts['huge_pages']}, load average {facts['load_average']}; median (least-greatest)",
        highlight=False,
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
