"""Decides what POST /start_profile and /stop_profile answer: 403 unless the server was started with a folder for
profiles, which no request can name; asking for what is so already changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from xllm.service.body import parse_json
from xllm.service.endpoint import Service, addressed, by_name, read_body
from xllm.service.errors import ApiError, Hint, invalid
from xllm.service.gate import App, Receive, Scope, Send, send_json

Answer = Mapping[str, Any]


class Profiling(Protocol):
    """Starts and stops a profile; both may be called from any thread, and say what they did. Raises OSError when a
    profile can't be written."""

    def start(self) -> Answer: ...
    def stop(self) -> Answer: ...


def routes(services: Sequence[Service]) -> dict[str, App]:
    return {
        "/start_profile": _Switch(services, lambda profiling: profiling.start()),
        "/stop_profile": _Switch(services, lambda profiling: profiling.stop()),
    }


class _Switch:
    def __init__(self, services: Sequence[Service], act: Callable[[Profiling], Answer]) -> None:
        self._services, self._act = services, act

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = addressed(self._services, scope)
        if any(service.profiling is None for service in services):
            hint = Hint("it writes files", "xllm serve --profile-dir", "start the server with a folder for profiles")
            raise ApiError(403, "profiling_disabled", "profiling is not enabled on this server", hint=hint)
        _check_empty(await read_body(scope, receive, services[0].limits))
        loop = asyncio.get_running_loop()
        answers: dict[str, Any] = {}
        try:
            for service in services:
                assert service.profiling is not None
                name = service.facts.name
                answers[name] = await loop.run_in_executor(service.pool, self._act, service.profiling)
        except OSError as error:
            message = f"the profile was not written ({error.strerror}); stop again to try again"
            raise ApiError(500, "profile_not_written", message) from None
        await send_json(send, 200, by_name(answers))


def _check_empty(data: bytes) -> None:
    """Nothing can be asked for: the body is empty, or {}."""
    body = parse_json(data) if data else {}
    if not isinstance(body, dict):
        raise invalid("invalid_request", "the body must be empty, or a JSON object")
    for name in body:
        raise invalid("invalid_request", f"`{name}` is not a field here: the body takes none", name)
