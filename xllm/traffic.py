"""Which sizes of steps a server saw: what `--traffic FILE` holds, a JSON object

    {"schema": 1, "steps": {"1": 9120, "17": 40, "512": 300}}

where a key is the tokens of a step and a value says how often such a step ran, or any weight in proportion to it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

SCHEMA = 1
MAX_SIZES, MAX_TOKENS, MAX_FILE_BYTES = 4096, 1 << 20, 4 << 20


def read_traffic(path: str | Path) -> tuple[tuple[int, float], ...]:
    """(tokens of a step, weight) from small to large. Raises ValueError naming the file and what is wrong in it."""
    file = Path(path)
    with file.open("rb") as source:
        raw = source.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        held = json.loads(raw)
        if not isinstance(held, dict) or set(held) != {"schema", "steps"} or held["schema"] != SCHEMA:
            raise ValueError(f'it must be {{"schema": {SCHEMA}, "steps": {{TOKENS: COUNT}}}}')
        steps = held["steps"]
        if not isinstance(steps, dict) or not 1 <= len(steps) <= MAX_SIZES:
            raise ValueError(f"steps must hold 1 to {MAX_SIZES} sizes")
        found = tuple(sorted((_tokens(size), _weight(size, count)) for size, count in steps.items()))
        if len({size for size, _ in found}) < len(found) or not math.fsum(weight for _, weight in found):
            raise ValueError("sizes must be spelled once, and some of them must occur")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no traffic histogram: {error}") from None
    return found


def _tokens(size: str) -> int:
    if not (size.isascii() and size.isdigit() and len(size) <= 7 and 1 <= int(size) <= MAX_TOKENS):
        raise ValueError(f"{size!r} is not a number of tokens from 1 to {MAX_TOKENS}")
    return int(size)


def _weight(size: str, count: object) -> float:
    if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count <= 1e15:
        raise ValueError(f"the count of {size} is {count!r}, not a number from 0 on")
    return float(count)
