"""Decides how a server starts and ends: socket first, then the engine, then requests. The first SIGTERM or SIGINT
drains (running requests finish, new ones get 503), the second ends every stream with an error and exits within a
second."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xllm.service.app import build_app
from xllm.service.control import go_on
from xllm.service.endpoint import Service
from xllm.service.errors import ApiError
from xllm.service.gate import EVERYBODY, Access
from xllm.service.listener import url

MAX_HEADER_BYTES = 64 << 10
HEADER_SECONDS = 30.0
WARM_UP_SECONDS = 1.0
ACCEPTED_AT_ONCE = 16  # connections in a turn of the loop
FORCED_EXIT_SECONDS = 1.0


def serve(
    services: Sequence[Service],
    listener: socket.socket,
    access: Access,
    on_listening: Callable[[str], None],
    loop: str = "uvloop",
    control: socket.socket | None = None,
) -> None:
    """Answers for these models until a signal ends it. `on_listening(url)` is called once requests are accepted.
    control: listens for the control routes, on access.control_port."""
    server = Server(services, access, loop)
    server.on_listening = lambda: on_listening(url(listener))
    server.run(sockets=[listener] if control is None else [listener, control])


class Server(uvicorn.Server):
    """Uvicorn with a drain: it keeps listening until the last answer is complete, so that newcomers are told 503."""

    def __init__(self, services: Sequence[Service], access: Access = EVERYBODY, loop: Any = "uvloop") -> None:
        self.services, self.front = services, services[0].front
        self.on_listening: Callable[[], None] = lambda: None
        self._signals = 0
        super().__init__(
            uvicorn.Config(
                build_app(services, access),
                loop=loop,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=None,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        for service in self.services:
            service.dispatcher.bind(service.engine, loop)
        # The loop takes one connection of a socket a turn: under overload the others would wait there for seconds,
        # where nobody counts them.
        await super().startup([sock.dup() for sock in sockets or () for _ in range(ACCEPTED_AT_ONCE)])
        self.on_listening()
        if (batches := self.services[0].batches) is not None:
            batches.resume()
        # Importing the sandbox costs tens of milliseconds, which neither the start nor the first request should pay.
        for service in self.services:
            loop.call_later(WARM_UP_SECONDS, loop.run_in_executor, service.pool, service.warm_up)

    async def on_tick(self, counter: int) -> bool:
        for service in self.services if self.front.draining else ():
            if service.controls is not None and service.controls.paused:
                go_on(service.controls)
        if self.front.draining and self.front.concurrent == 0:
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        self.front.draining = True
        if self._signals == 2:
            for service in self.services:
                service.dispatcher.fail_all(ApiError(503, "shutting_down", "the server was stopped"))
            self.should_exit = self.force_exit = True
            timer = threading.Timer(FORCED_EXIT_SECONDS, os._exit, (128 + sig,))
            timer.daemon = True
            timer.start()
        elif self._signals > 2:
            os._exit(128 + sig)


class BoundedProtocol(HttpToolsProtocol):
    """Headers of bounded size that must arrive in bounded time, which uvicorn leaves open."""

    _header_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Bytes between requests end uvicorn's wait for the next one, even those that begin none.
        if self.cycle is None or self.cycle.response_complete:
            self._start_clock()
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._start_clock()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_clock()
        super().on_headers_complete()

    def _count(self, data: bytes) -> None:
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise httptools.HttpParserError("the headers are too large")

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
