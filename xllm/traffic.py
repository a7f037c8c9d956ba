"""Which sizes of steps a server saw: what `--traffic FILE` holds, a JSON object

    {"schema": 1, "steps": {"1": 9120, "17": 40, "512": 300}}

where a key is the tokens of a step and a value says how often such a step ran, or any weight in proportion to it. What
`xllm serve --record-traffic FILE` writes has "seen" beside them, figures for people (see `Traffic`).
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path

SCHEMA = 1
MAX_SIZES, MAX_TOKENS, MAX_FILE_BYTES = 4096, 1 << 20, 4 << 20


class Traffic:
    """What steps a server runs, in bounded memory. One thread adds, any may ask for the text.

    "steps": steps by their tokens. "rows": by their sequences. decodes, prompts: sequences of one token that follows
    others, and of any other piece; prompt_tokens: of the latter. bucket_misses: by the tokens of the bucket that a step
    ran in, those that had fewer, so that a bucket of their own size would have held less.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: Counter[int] = Counter()
        self._rows: Counter[int] = Counter()
        self._misses: Counter[int] = Counter()
        self._decodes = self._prompts = self._prompt_tokens = 0

    def add(self, tokens: int, rows: int, decodes: int, bucket: int) -> None:
        """A step of so many tokens and sequences, `decodes` of which decode, in a bucket of so many tokens."""
        with self._lock:
            self._steps[counted(tokens)] += 1
            self._rows[counted(rows)] += 1
            self._decodes += decodes
            self._prompts += rows - decodes
            self._prompt_tokens += tokens - decodes
            if tokens < bucket:
                self._misses[bucket] += 1

    def to_json(self) -> bytes | None:
        """The file; None as long as no step ran, since that would be no histogram."""
        with self._lock:
            if not self._steps:
                return None
            seen = {
                "rows": _ordered(self._rows),
                "decodes": self._decodes,
                "prompts": self._prompts,
                "prompt_tokens": self._prompt_tokens,
                "bucket_misses": _ordered(self._misses),
            }
            body = {"schema": SCHEMA, "steps": _ordered(self._steps), "seen": seen}
        return json.dumps(body, indent=1).encode() + b"\n"


def counted(size: int) -> int:
    """The size under which another is counted: not less, and at most a 256th more."""
    apart = max(1, 1 << max(0, (size - 1).bit_length() - 9))
    return -(-size // apart) * apart


def read_traffic(path: str | Path) -> tuple[tuple[int, float], ...]:
    """(tokens of a step, weight) from small to large. Raises ValueError naming the file and what is wrong in it."""
    file = Path(path)
    with file.open("rb") as source:
        raw = source.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        held = json.loads(raw)
        if not isinstance(held, dict) or held.keys() - {"seen"} != {"schema", "steps"} or held["schema"] != SCHEMA:
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


def _ordered(counts: Counter[int]) -> dict[str, int]:
    return {str(size): counts[size] for size in sorted(counts)}
