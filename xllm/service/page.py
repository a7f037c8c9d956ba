"""Decides what a browser gets at `/`: a page of plain files, which anyone may read and which the server reads when they
are asked for, and the figures of the engine that it draws."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xllm.service.endpoint import Service
from xllm.service.gate import Receive, Scope, Send, send_data

STATE = "/ui/state"
FOLDER = Path(__file__).parent / "page"
TYPES = {".html": b"text/html", ".css": b"text/css", ".js": b"text/javascript", ".svg": b"image/svg+xml"}
# The page loads its own files, talks to its own server, and is shown in no other page.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


async def send_page(scope: Scope, receive: Receive, send: Send) -> None:
    """GET /, or a file of the page: the table of routes names them all."""
    file = FOLDER / (scope["path"].removeprefix("/ui/").strip("/") or "index.html")
    await send_data(send, 200, file.read_bytes(), TYPES[file.suffix] + b"; charset=utf-8", HEADERS)


def state(services: Sequence[Service]) -> dict[str, Any]:
    """What GET /ui/state answers of these models. at: seconds of a clock that only moves forward; times of the last
    answers in seconds. Models that generate have their pages from one store, of `total_pages`."""
    draining = services[0].front.draining
    return {"at": time.monotonic(), "draining": draining, "models": [_figures(service) for service in services]}


def _figures(service: Service) -> dict[str, Any]:
    recorder = service.recorder
    return {
        "model": service.facts.name,
        "task": service.facts.task,
        "max_model_len": service.facts.max_len,
        "engine": asdict(service.engine.stats()),
        "first_token": _quantiles(recorder.recent_first),
        "per_token": _quantiles(recorder.recent_rest),
    }


def _quantiles(values: Iterable[float]) -> dict[str, float | None]:
    """The nearest-rank quantiles of a few hundred values."""
    ranked = sorted(values)
    last = len(ranked) - 1
    found = {name: ranked[round(last * share)] if ranked else None for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {"count": len(ranked), **found}
