"""Where tuning tables lie: a folder of the cache, one file for each CPU model and number of threads."""

from __future__ import annotations

import re
from pathlib import Path

from xllm import config
from xllm.targets import host
from xllm.targets.cpu.tuning import MAX_BYTES, Tuning

CACHED = "cached"


def table_path(cpu: str, threads: int) -> Path:
    """The file of one machine's table in the cache. Names hold letters, digits and dashes only."""
    name = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-") or "cpu"
    return config.environment().cache / "tuning" / f"{name}-{threads}.json"


def read_tuning(which: str) -> Tuning:
    """The table in the file `which`, or, for CACHED, this machine's. Raises ValueError when there is none."""
    file = table_path(host.cpu_model(), host.threads().count) if which == CACHED else Path(which)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return Tuning.from_json(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"there is no tuning table {file}; run `xllm tune`") from None
    except ValueError as error:
        raise ValueError(f"{file} is no tuning table: {error}; run `xllm tune`") from error
