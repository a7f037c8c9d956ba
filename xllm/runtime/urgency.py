"""How urgent a request is: its class, its priority, and the latencies it asks for. The scheduler reads it, nothing else
does: no token depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from xllm.runtime.errors import RequestRefused

Priority = Literal["DEFAULT", "HIGH", "NORMAL", "LOW"]
LONGEST_MS = 1e9  # eleven days


@dataclass(frozen=True)
class Urgency:
    """DEFAULT is NORMAL. An offline request gives way to every online one. ttft_slo_ms and tpot_slo_ms: milliseconds
    until the first token, and per token after it, that count as good; None asks for nothing. Raises RequestRefused
    (invalid_parameter) naming the field."""

    priority: Priority = "DEFAULT"
    offline: bool = False
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None

    def __post_init__(self) -> None:
        if self.priority not in get_args(Priority):
            allowed = ", ".join(get_args(Priority))
            raise RequestRefused("invalid_parameter", f"priority is {self.priority!r:.64}, allowed are {allowed}")
        if not isinstance(self.offline, bool):
            raise RequestRefused("invalid_parameter", f"offline is {self.offline!r:.64}, it must be true or false")
        for name in ("ttft_slo_ms", "tpot_slo_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            # Written so that NaN fails too.
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LONGEST_MS:
                text = f"{name} is {value!r:.64}, it must be above 0 and at most {LONGEST_MS:.0f}"
                raise RequestRefused("invalid_parameter", text)

    @cached_property
    def ttft(self) -> float:
        """Seconds to the first token, infinity when nothing is asked."""
        return math.inf if self.ttft_slo_ms is None else self.ttft_slo_ms / 1000

    @cached_property
    def tpot(self) -> float:
        """Seconds per token after the first, infinity when nothing is asked."""
        return math.inf if self.tpot_slo_ms is None else self.tpot_slo_ms / 1000


ORDINARY = Urgency()
NAMES = tuple(field.name for field in fields(Urgency))


def take_urgency(options: dict[str, Any]) -> Urgency:
    """Removes these fields from a mapping of options and checks them."""
    given = {name: options.pop(name) for name in NAMES if name in options}
    return urgency_of(given)


def urgency_of(given: Mapping[str, Any]) -> Urgency:
    """Of fields that may be None, which is not given. Raises RequestRefused naming the field."""
    held = {name: value for name, value in given.items() if value is not None}
    return Urgency(**held) if held else ORDINARY
