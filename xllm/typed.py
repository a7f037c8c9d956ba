"""Builds typed values from parsed ones and from JSON, from any thread: where all of xllm does it.

msgspec fills the tables of a type at its first use and lets other threads see them half filled, which ends the process
(0.22: two first requests at the same time). So one thread at a time uses a type first."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

Value = TypeVar("Value")
_filling = threading.Lock()
_filled: set[Any] = set()


def convert(value: Any, kind: type[Value]) -> Value:
    """What msgspec.convert gives; raises msgspec.ValidationError."""
    _fill(kind)
    return msgspec.convert(value, kind)


def decode(data: bytes | msgspec.Raw, kind: type[Value]) -> Value:
    """What msgspec.json.decode gives; raises msgspec.DecodeError, UnicodeDecodeError, RecursionError."""
    _fill(kind)
    return msgspec.json.decode(data, type=kind)


def _fill(kind: Any) -> None:
    if kind not in _filled:
        with _filling:
            msgspec.json.Decoder(kind)
            _filled.add(kind)
