"""Decides how a running engine is controlled over HTTP: what is asked for, what is answered. The gate lets none but
admins here, except to /abort, which ends what the caller asked for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import msgspec

from xllm.runtime import RequestRefused
from xllm.service.answer import Endpoint, Service, check_task, read_body
from xllm.service.body import OfModel
from xllm.service.errors import ApiError, draining, from_engine, invalid
from xllm.service.gate import App, Receive, Record, Scope, Send, record, send_json

Pausing = Literal["keep", "wait", "abort"]


class Controls(Protocol):
    """What can be told to an engine, from any thread; a future says whether that changed anything. What is refused is
    raised, at once or by the future: RequestRefused."""

    def pause(self, mode: Pausing = "keep") -> Future[bool]: ...
    def resume(self) -> Future[bool]: ...
    @property
    def paused(self) -> bool: ...


class OrderBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that all orders share."""

    model: str | None = msgspec.field(default=None, name="model_id")


class PauseBody(OrderBody, forbid_unknown_fields=True, kw_only=True):
    """POST /pause."""

    mode: Pausing = "keep"


class AbortBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /abort: the id of a request (header x-request-id) or of its answer, or all."""

    model: str | None = None
    request_id: str | None = None
    all: bool = False


class OrderRoute(Endpoint[Any]):
    """A route that is an order: takes no slot, and an empty body too."""

    refused: Mapping[str, tuple[Any, ...]] = {}
    body: type[OfModel] = OrderBody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.service.draining:
            raise draining()
        entry = record(scope)
        entry.kind = self.kind
        check_task(self.service.facts, self.tasks, scope["path"])
        data = await read_body(scope, receive, self.service.limits)
        body = self.parse(data.strip() or b"{}", self.body)
        try:
            answer = await self.answer(body, entry)
        except RequestRefused as error:
            raise from_engine(error.code, error.message) from None
        await send_json(send, 200, answer)

    async def answer(self, body: Any, entry: Record) -> dict[str, Any]:
        """Does it. Raises ApiError or RequestRefused."""
        raise NotImplementedError

    @property
    def controls(self) -> Controls:
        if self.service.controls is None:
            raise ApiError(501, "unimplemented", "this engine takes no orders")
        return self.service.controls


class Pause(OrderRoute):
    """POST /pause: computes nothing until /resume; mode keep, wait or abort is about the requests that run."""

    kind, body = "pause", PauseBody

    async def answer(self, body: PauseBody, entry: Record) -> dict[str, Any]:
        changed = await asyncio.wrap_future(self.controls.pause(body.mode))
        self.service.dispatcher.backlog.hold(self.controls.paused)
        return status(self.service) | {"changed": changed}


class Resume(OrderRoute):
    """POST /resume: goes on after /pause."""

    kind = "resume"

    async def answer(self, body: OrderBody, entry: Record) -> dict[str, Any]:
        changed = await asyncio.wrap_future(self.controls.resume())
        self.service.dispatcher.backlog.hold(self.controls.paused)
        return status(self.service) | {"changed": changed}


class Abort(OrderRoute):
    """POST /abort: ends requests of the caller's own key; with an admin's key, anybody's."""

    kind, body = "abort", AbortBody
    tasks = ("generate", "embed", "classify")

    async def answer(self, body: AbortBody, entry: Record) -> dict[str, Any]:
        if (body.request_id is None) != body.all:
            raise invalid("missing_parameter", "give either `request_id` or `all`: true", "request_id")
        found = self.service.dispatcher.abort(body.request_id, None if entry.admin else entry.tenant)
        if not found and not body.all:
            raise ApiError(404, "request_not_found", "no request of this id runs for this key", "request_id")
        return {"aborted": found}


def status(service: Service) -> dict[str, Any]:
    return {"status": "paused" if service.controls is not None and service.controls.paused else "running"}


def routes(service: Service) -> dict[str, App]:
    """The paths that are asked."""
    return {"/pause": Pause(service), "/resume": Resume(service), "/abort": Abort(service)}


def go_on(controls: Controls) -> None:
    """Whoever waits in a pause is answered before the server ends."""
    try:
        controls.resume()
    except RequestRefused:
        return  # it has ended already
