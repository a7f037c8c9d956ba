"""Decides how running engines are controlled over HTTP: what is asked for, of which model, what is answered. The gate
lets none but admins here, except to /abort, which ends what the caller asked for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from xllm.runtime import RequestRefused, RuntimeFault
from xllm.service.body import OfModel
from xllm.service.endpoint import Endpoint, Service, by_name, check_task, read_body
from xllm.service.errors import ApiError, Hint, draining, from_engine, invalid
from xllm.service.gate import Receive, Record, Scope, Send, record, send_json

Pausing = Literal["keep", "wait", "abort"]
Leaving = Literal["wait", "abort"]
Level = Literal["light", "deep"]
LEVELS: dict[int | str, Level] = {1: "light", 2: "deep", "light": "light", "deep": "deep"}


class Controls(Protocol):
    """What can be told to an engine, from any thread; a future says whether that changed anything. What is refused is
    raised, at once or by the future: RequestRefused."""

    def pause(self, mode: Pausing = "keep") -> Future[bool]: ...
    def resume(self) -> Future[bool]: ...
    def sleep(self, level: Level = "light", mode: Leaving | None = None) -> Future[bool]: ...
    def wake(self) -> Future[bool]: ...
    def update_weights(self, path: Path, checksum: str | None = None, mode: Leaving = "wait") -> Future[bool]: ...
    @property
    def paused(self) -> bool: ...
    @property
    def asleep(self) -> str: ...
    @property
    def weights(self) -> str: ...


class OrderBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that all orders share."""

    model: str | None = msgspec.field(default=None, name="model_id")


class PauseBody(OrderBody, forbid_unknown_fields=True, kw_only=True):
    """POST /pause."""

    mode: Pausing = "keep"


class SleepBody(OrderBody, forbid_unknown_fields=True, kw_only=True):
    """POST /sleep. level: 1 is light, 2 is deep. mode: what becomes of requests; without one they refuse it."""

    level: Literal["light", "deep", 1, 2] = "light"
    mode: Leaving | None = None


class UpdateBody(OrderBody, forbid_unknown_fields=True, kw_only=True):
    """POST /update_weights. path: of an artifact, inside --weights-dir. checksum: the digest its manifest must have."""

    path: str
    checksum: str | None = None
    mode: Leaving = "wait"


class AbortBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /abort: the id of a request (header x-request-id) or of its answer, or all."""

    model: str | None = None
    request_id: str | None = None
    all: bool = False


class OrderRoute(Endpoint[Any]):
    """A route that is an order: takes no slot, and an empty body too. One that names no model is for all that it can be
    for."""

    refused: Mapping[str, tuple[Any, ...]] = {}
    body: type[OfModel] = OrderBody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.service.front.draining:
            raise draining()
        entry = record(scope)
        entry.kind = self.kind
        data = (await read_body(scope, receive, self.service.limits)).strip() or b"{}"
        chosen = self.of(data)
        assert isinstance(chosen, OrderRoute)
        check_task(chosen.service.facts, self.tasks, scope["path"])
        body = chosen.parse(data, self.body)
        told = [chosen] if body.model is not None else [o for o in self.among if o.service.facts.task in self.tasks]
        await send_json(send, 200, await self.tell([one for one in told if isinstance(one, OrderRoute)], body, entry))

    async def tell(self, routes: Sequence[OrderRoute], body: Any, entry: Record) -> dict[str, Any]:
        """Gives the order to these models, one after the other. The answer of one, or of each by its name."""
        answers: dict[str, Any] = {}
        for route in routes:
            name = route.service.facts.name
            try:
                answers[name] = await route.answer(body, entry)
            except RuntimeFault as error:
                whose = f"{name}: " if len(routes) > 1 else ""
                raise from_engine(error.code, whose + error.message) from None
        return by_name(answers)

    async def answer(self, body: Any, entry: Record) -> dict[str, Any]:
        """Does it, for this model. Raises ApiError or RuntimeFault."""
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


class Sleep(OrderRoute):
    """POST /sleep: gives memory back until /wakeup."""

    kind, body = "sleep", SleepBody

    async def answer(self, body: SleepBody, entry: Record) -> dict[str, Any]:
        changed = await asyncio.wrap_future(self.controls.sleep(LEVELS[body.level], body.mode))
        return sleeping(self.service) | {"changed": changed}


class Wake(OrderRoute):
    """POST /wakeup: reads the weights again after /sleep."""

    kind = "wakeup"

    async def answer(self, body: OrderBody, entry: Record) -> dict[str, Any]:
        changed = await asyncio.wrap_future(self.controls.wake())
        return sleeping(self.service) | {"changed": changed}


class Update(OrderRoute):
    """POST /update_weights: other weights of the same plan, between two steps; no answer mixes them."""

    kind, body = "update", UpdateBody

    async def tell(self, routes: Sequence[OrderRoute], body: UpdateBody, entry: Record) -> dict[str, Any]:
        if len(routes) > 1:
            raise invalid("missing_parameter", "say with `model_id` which model gets other weights", "model_id")
        return await super().tell(routes, body, entry)

    async def answer(self, body: UpdateBody, entry: Record) -> dict[str, Any]:
        controls, path = self.controls, allowed(self.service.weights_folder, body.path)
        try:
            ordered = await asyncio.to_thread(controls.update_weights, path, body.checksum, body.mode)
        except RequestRefused as error:  # of a file: where it lies is nobody's business
            raise from_engine(error.code, error.message.replace(str(path), body.path)) from None
        changed = await asyncio.wrap_future(ordered)
        return {"weights": controls.weights, "changed": changed}


class Abort(OrderRoute):
    """POST /abort: ends requests of the caller's own key; with an admin's key, anybody's."""

    kind, body = "abort", AbortBody
    tasks = ("generate", "embed", "classify")

    async def tell(self, routes: Sequence[OrderRoute], body: AbortBody, entry: Record) -> dict[str, Any]:
        if (body.request_id is None) != body.all:
            raise invalid("missing_parameter", "give either `request_id` or `all`: true", "request_id")
        whose = None if entry.admin else entry.tenant
        found = sum(route.service.dispatcher.abort(body.request_id, whose) for route in routes)
        if not found and not body.all:
            raise ApiError(404, "request_not_found", "no request of this id runs for this key", "request_id")
        return {"aborted": found}


def status(service: Service) -> dict[str, Any]:
    return {"status": "paused" if service.controls is not None and service.controls.paused else "running"}


def sleeping(service: Service) -> dict[str, Any]:
    """What GET /is_sleeping answers."""
    level = service.controls.asleep if service.controls is not None else ""
    return {"is_sleeping": bool(level), "level": level or None}


def allowed(folder: Path | None, path: str) -> Path:
    """The artifact of this name inside the folder. Raises ApiError 403 for any other place, links followed."""
    hint = Hint("weights are taken from one folder only", "xllm serve --weights-dir", "name an artifact inside it")
    if folder is None:
        raise ApiError(403, "path_refused", "this server was started without a folder of weights", "path", hint)
    root = folder.resolve()
    try:
        found = (root / path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, too long a name, a circle of links
        raise invalid("weights_unusable", "path is no name of a file", "path") from None
    if root not in found.parents:
        raise ApiError(403, "path_refused", "path leads out of the folder of weights", "path", hint)
    return found


ABORT = "/abort"  # of one's own requests: no order to the engine
ORDERS: Mapping[str, type[OrderRoute]] = {
    "/pause": Pause,
    "/resume": Resume,
    "/sleep": Sleep,
    **dict.fromkeys(("/wakeup", "/wake_up"), Wake),
    "/update_weights": Update,
}


def go_on(controls: Controls) -> None:
    """Whoever waits in a pause is answered before the server ends."""
    try:
        controls.resume()
    except RequestRefused:
        return  # it has ended already
