"""Decides what comes from outside the command line: the only module that reads the environment. Sizes and settings are
typed here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LOOPBACK = ("localhost", "::1")


@dataclass(frozen=True)
class Environment:
    """XLLM_CACHE (else XDG_CACHE_HOME/xllm, else ~/.cache/xllm): compiled artifacts. XLLM_DEBUG: 0 to 5, see `xllm
    --help`."""

    cache: Path
    debug: int


def environment() -> Environment:
    """Reads the environment now. Raises ValueError for a value that means nothing."""
    debug = os.environ.get("XLLM_DEBUG", "0") or "0"
    if debug not in ("0", "1", "2", "3", "4", "5"):
        raise ValueError(f"XLLM_DEBUG is {debug!r}, allowed are 0 to 5")
    return Environment(cache=_cache(), debug=int(debug))


def leave_the_cores_alone() -> None:
    """Before numpy is imported: its linear algebra, which serving never calls, would start a thread for each core and
    keep them busy for a tenth of a second. A setting that is there stays."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _cache() -> Path:
    if own := os.environ.get("XLLM_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "xllm"
    return Path.home() / ".cache" / "xllm"


def size_bytes(text: str) -> int:
    """Bytes from "4GiB", "512MiB", "1.5G", "4096". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 4GiB, 512MiB or 1500MB")
    return int(float(match[1]) * UNITS[match[2]])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host in LOOPBACK or re.fullmatch(r"127\.\d+\.\d+\.\d+", host) is not None


def api_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and lines with # are skipped. Raises ValueError when there is none,
    or one that no client could send."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no API key; write one key a line")
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError(f"{path}: key {number} has characters that a header can't carry; use ASCII without spaces")
    return keys
