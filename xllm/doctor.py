"""Decides whether this machine can serve and compile: one line per fact, each OK, WARN or FAIL with what to do about
it."""

from __future__ import annotations

import mmap
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xllm.targets import host

OK, WARN, FAIL = "OK", "WARN", "FAIL"
FLAGS = ("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm")
SERVING = (
    "blake3", "httptools", "jinja2", "msgspec", "numpy", "prometheus-client", "rich", "safetensors", "tokenizers",
    "uvicorn", "uvloop",
)  # fmt: skip
COMPILING = ("torch", "transformers", "networkx")
LEAST_MAPS = 65530  # Linux's default; each KV page of a running sequence is a mapping
LEAST_BYTES = 2 << 30


@dataclass(frozen=True)
class Check:
    """One fact. `advice` says what to do unless the status is OK."""

    status: str
    name: str
    found: str
    advice: str = ""

    def line(self) -> str:
        advice = f": {self.advice}" if self.advice and self.status != OK else ""
        return f"{self.status:<5}{self.name:<18}{self.found}{advice}"


def checks() -> Iterator[Check]:
    """All checks, quick ones first; the last ones measure for about a second."""
    yield _python()
    yield _cpu()
    yield _threads()
    yield _memory()
    yield _huge_pages()
    yield _shared_memory()
    yield _mappings()
    yield from _packages()
    yield from _native()


def _python() -> Check:
    enough = sys.version_info >= (3, 11)
    return Check(OK if enough else FAIL, "python", platform.python_version(), "install Python 3.11 or newer")


def _cpu() -> Check:
    text = _read("/proc/cpuinfo")
    present = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[:1])))
    flags = " ".join(flag for flag in FLAGS if flag in present) or "no known vector flags"
    status = OK if {"avx2", "fma"} <= present or "asimd" in present else WARN
    return Check(status, "cpu", f"{platform.machine()}, {flags}", "a CPU with AVX2 and FMA is several times faster")


def _threads() -> Check:
    chosen, nodes = host.threads(), host.numa_nodes()
    found = f"{chosen.count}: {chosen.why}"
    if len(nodes) > 1:
        advice = "memory of another node is slower; serve one process per node, under numactl -N 0 -m 0 for the first"
        return Check(WARN, "threads", f"{found}, on NUMA nodes {' '.join(map(str, nodes))}", advice)
    granted = host.cpu_quota()
    advice = "a step that uses up the quota waits for the next period; give whole cores where you can"
    return Check(WARN if granted is not None and granted < host.usable_cores() else OK, "threads", found, advice)


def _memory() -> Check:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    total, free = (int(fields.get(name, 0)) * 1024 for name in ("MemTotal", "MemAvailable"))
    found = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    return Check(OK if free >= LEAST_BYTES else WARN, "memory", found, "close something, or serve with --memory")


def _huge_pages() -> Check:
    shared = _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    private = _chosen("/sys/kernel/mm/transparent_hugepage/enabled")
    reserved = re.search(r"^HugePages_Total:\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE)
    count = int(reserved[1]) if reserved else 0
    found = f"transparent {private}, for shared memory {shared}, reserved {count}"
    usable = count > 0 or shared in ("always", "advise", "within_size", "force")
    advice = "KV pages take longer to touch; echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (as root)"
    return Check(OK if usable else WARN, "huge pages", found, advice)


def _shared_memory() -> Check:
    try:
        descriptor = os.memfd_create("xllm-doctor")
        try:
            os.ftruncate(descriptor, 1 << 21)
            with mmap.mmap(descriptor, 1 << 21) as memory:
                memory[0] = 1
        finally:
            os.close(descriptor)
    except (AttributeError, OSError) as error:
        return Check(FAIL, "shared memory", f"memfd does not work: {error}", "the KV pool needs Linux with memfd")
    return Check(OK, "shared memory", "memfd can be created and mapped")


def _mappings() -> Check:
    text = _read("/proc/sys/vm/max_map_count").strip()
    count = int(text) if text.isdigit() else 0
    advice = f"sysctl vm.max_map_count={LEAST_MAPS} (as root)"
    return Check(OK if count >= LEAST_MAPS else WARN, "vm.max_map_count", text or "unknown", advice)


def _packages() -> Iterator[Check]:
    for kind, names, status, advice in (
        ("packages", SERVING, FAIL, "pip install xllm"),
        ("compile extra", COMPILING, WARN, "only artifacts can be served; pip install 'xllm[compile]' to compile here"),
    ):
        found = {name: _installed(name) for name in names}
        missing = [name for name, number in found.items() if number is None]
        listed = " ".join(f"{name} {number}" for name, number in found.items() if number is not None)
        if missing:
            yield Check(status, kind, "missing " + " ".join(missing), advice)
        else:
            yield Check(OK, kind, listed)


def _native() -> Iterator[Check]:
    advice = "reinstall xllm where a C++17 compiler is present"
    try:
        from xllm.kernels.cpu import Runner, level, levels

        yield Check(OK, "native library", f"{level()} of {', '.join(levels())}")
        threads = host.threads().count
        with Runner(threads) as runner:
            gigabytes, operations = runner.read_bandwidth() / 1e9, runner.fma_peak() / 1e9
        found = f"reads {gigabytes:.1f} GB/s, multiplies {operations:.0f} GFLOP/s on {threads} threads"
        slow = "decoding reads all weights for each token: expect bytes of weights / bandwidth per token"
        yield Check(OK if gigabytes >= 1 else WARN, "speed", found, slow)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        yield Check(FAIL, "native library", str(error), advice)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _chosen(path: str) -> str:
    """The bracketed word of a kernel setting."""
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
