"""Decides how one POST route begins: a slot, a body of bounded size and time, a task the artifact has, a job; and that
its sequences are out of the engine when it ends, whatever ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import parse_qsl

import msgspec

from xllm import typed
from xllm.runtime import Request
from xllm.service.body import NOT_SUPPORTED, Body, parse
from xllm.service.dispatch import Dispatcher, Engine, Subscription
from xllm.service.errors import GONE, ApiError, Hint, busy, draining
from xllm.service.gate import Receive, Record, Scope, Send, record
from xllm.service.metrics import Front, Recorder
from xllm.service.parsers.reading import NO_DIALECT, Dialect
from xllm.service.sampling import ModelFacts
from xllm.service.tokenizer import TextCodec

if TYPE_CHECKING:
    from xllm.service.batches import Batches
    from xllm.service.control import Controls
    from xllm.service.grammar import Grammars
    from xllm.service.profiling import Profiling
    from xllm.service.template import ChatTemplate

PREPARERS = 2  # threads that prepare requests
AT_ONCE_BYTES = 16 << 10  # of a body that is looked through in less time than a thread takes to begin
OFFLINE = b'"offline"'  # in a body that may ask to give way to everybody

_TASKS = {  # what an artifact does, and the routes for it
    "generate": ("generates text", "/v1/chat/completions or /v1/completions"),
    "embed": ("computes embeddings", "/v1/embeddings, /v1/rerank or /v1/score"),
    "classify": ("computes scores of labels", "/v1/rerank, /v1/score or /v1/classify"),
}


@dataclass(frozen=True)
class Limits:
    """What one server takes. Seconds and bytes."""

    max_concurrent_requests: int = 200  # 0 = no limit
    max_wait: float | None = None  # for what is ahead of a request
    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0


@dataclass
class Service:
    """All that requests to a model share. Belongs to the event loop; `pool` runs what takes long (JSON, templates,
    tokenisation). `front`, `limits` and `batches` are those of all models of a server."""

    facts: ModelFacts
    codec: TextCodec
    chat_template: Callable[[], ChatTemplate]
    grammars: Callable[[], Grammars]
    engine: Engine
    dispatcher: Dispatcher
    recorder: Recorder
    limits: Limits = Limits()
    dialect: Dialect = NO_DIALECT
    batches: Batches | None = None  # None: nothing is kept on disk
    front: Front = field(default_factory=Front)
    created: int = field(default_factory=lambda: int(time.time()))
    controls: Controls | None = None
    weights_folder: Path | None = None  # where other weights may lie
    profiling: Profiling | None = None  # where it is enabled
    answering: int = 0  # requests for this model
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PREPARERS, "xllm-prepare"))

    def warm_up(self) -> None:
        """Loads what the first chat would wait for. A template that is missing or broken is reported to who asks for a
        chat."""
        with suppress(ApiError):
            self.chat_template()

    def render(self, *arguments: Any, **named: Any) -> str:
        """As ChatTemplate.render, in the pool; the time that it takes is counted."""
        with self.recorder.rendering():
            return self.chat_template().render(*arguments, **named)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """One of max_concurrent_requests. Raises ApiError 429 when all are taken, 503 while draining."""
        front = self.front
        if front.draining:
            raise draining()
        limit = self.limits.max_concurrent_requests
        if limit and front.concurrent >= limit:
            hint = Hint("all slots are taken", "xllm serve --max-concurrent-requests", "retry, or raise the limit")
            raise busy(f"the server answers {limit} requests already", hint)
        front.concurrent += 1
        try:
            yield
        finally:
            front.concurrent -= 1

    @contextmanager
    def share(self) -> Iterator[None]:
        """One of the slots that this model may have: each of the others is kept some, whatever comes for this one.
        Raises ApiError 429 when it has all of its own."""
        limit, models = self.limits.max_concurrent_requests, len(self.front.names)
        most = limit - (models - 1) * (limit // (2 * models))
        if limit and self.answering >= most:
            hint = Hint(
                "the other slots are kept for the other models",
                "xllm serve --max-concurrent-requests",
                "retry, or raise the limit",
            )
            raise busy(f"{self.facts.name} answers {most} requests already", hint)
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1


JobOf = TypeVar("JobOf")


class Endpoint(Generic[JobOf]):
    """One POST route of one model. `kind` names it in metrics; `tasks` are those of artifacts that it is for; `body` is
    what it takes, and `refused` are fields of its API that it does not, with the values that ask for nothing. queues:
    it asks the engine for something, and waits its turn. `among` are those of all models on this route: any of them
    takes its requests, each answers those that are for its model."""

    kind = ""
    tasks: tuple[str, ...] = ("generate",)
    body: type[Any]
    refused: Mapping[str, tuple[Any, ...]] = NOT_SUPPORTED
    queues = True

    def __init__(self, service: Service) -> None:
        self.service = service
        self.among: Sequence[Endpoint[JobOf]] = (self,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.slot():
            entry = record(scope)
            entry.kind = self.kind
            data = await read_body(scope, receive, self.service.limits)
            one = await self.find(data)
            with one.service.share():
                await one._answer(scope["path"], data, entry, receive, send)

    async def _answer(self, path: str, data: bytes, entry: Record, receive: Receive, send: Send) -> None:
        service = self.service
        check_task(service.facts, self.tasks, path)
        backlog, begin = service.dispatcher.backlog, time.monotonic()
        hurries = self.queues and not entry.offline and OFFLINE not in data  # others wait as long as they have to
        if hurries:
            backlog.check()
        with backlog.preparing(PREPARERS) as took:
            timed = asyncio.get_running_loop().run_in_executor(service.pool, self._timed_plan, data, entry)
            job, seconds = await timed
            took(seconds)
        if hurries:
            backlog.check(time.monotonic() - begin - seconds)
        await self.run(job, entry, receive, send)

    async def find(self, data: bytes) -> Endpoint[JobOf]:
        """As `of`; a large body is read beside the event loop."""
        if len(self.among) == 1 or len(data) <= AT_ONCE_BYTES:
            return self.of(data)
        return await asyncio.to_thread(self.of, data)

    def of(self, data: bytes) -> Endpoint[JobOf]:
        """The endpoint of the model that a body names; where it names none, of the first that the route is for. What no
        model is found for is for that one to refuse."""
        if len(self.among) == 1:
            return self
        name = named(data)
        fitting = [one for one in self.among if one.service.facts.task in self.tasks] or self.among
        return next((one for one in self.among if one.service.facts.name == name), fitting[0])

    def _timed_plan(self, data: bytes, entry: Record) -> tuple[JobOf, float]:
        """The job, and the seconds that it took without those of waiting."""
        begin = time.monotonic()
        with self.service.recorder.preparing():
            return self.plan(data, entry), time.monotonic() - begin

    def plan(self, data: bytes, entry: Record) -> JobOf:
        """The body as what is to be done; runs in the pool. Raises ApiError."""
        raise NotImplementedError

    async def run(self, job: JobOf, entry: Record, receive: Receive, send: Send) -> None:
        """Does it and answers."""
        raise NotImplementedError

    def parse(self, data: bytes, kind: type[Body]) -> Body:
        """The body, which is for this model. Raises ApiError 400, or 404 for another one."""
        body = parse(data, kind, self.refused)
        check_model(body.model, self.service)
        return body

    @asynccontextmanager
    async def submitted(
        self, requests: Sequence[Request], receive: Receive, entry: Record, *names: str
    ) -> AsyncIterator[Subscription]:
        """The requests in the engine, as long as the client is there and nobody aborts them by the id of the request or
        one of these names."""
        subscription = self.service.dispatcher.open(requests)
        subscription.names, subscription.tenant = (entry.id, *names), entry.tenant
        watcher = asyncio.create_task(_watch(receive, subscription))
        try:
            yield subscription
        finally:
            watcher.cancel()
            self.service.dispatcher.close(subscription)


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a POST. Raises ApiError 413, 415, 408, or 499 when the client left."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    empty = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
    # Other types, and none, are what a page of any site may send without asking first.
    if kind != b"application/json" and (kind or not empty):
        raise ApiError(415, "unsupported_media_type", "the body must be sent as content-type: application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "unsupported_encoding", "compressed bodies are not supported")
    too_large = ApiError(413, "body_too_large", f"the body has more than {limits.max_body_bytes} bytes")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, GONE, "the client left before its request was complete")
                body += message.get("body", b"")
                if len(body) > limits.max_body_bytes:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, "slow_upload", text, headers={"connection": "close"}) from None


async def _watch(receive: Receive, subscription: Subscription) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    subscription.fail(ApiError(499, GONE, "the client left"))


def check_task(facts: ModelFacts, tasks: Sequence[str], path: str) -> None:
    """Raises ApiError 400 for a route that is not for what the artifact computes."""
    if facts.task in tasks:
        return
    does, instead = _TASKS[facts.task]
    wanted = " or ".join(tasks)
    raise ApiError(
        400,
        "wrong_task",
        f"{facts.name} {does} (task {facts.task}), {path} needs an artifact of task {wanted}: try {instead}",
        hint=Hint("an artifact computes one task", "xllm compile --task", f"serve one compiled with --task {wanted}"),
    )


class _Named(msgspec.Struct):
    model: str | None = None
    model_id: str | None = None


def named(data: bytes) -> str | None:
    """The model that a body names, if it is one."""
    try:
        body = typed.decode(data, _Named)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return body.model or body.model_id


def addressed(services: Sequence[Service], scope: Scope) -> Sequence[Service]:
    """Those that `?model=NAME` names; without it, all. Raises ApiError 404."""
    name = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("model")
    if name is None:
        return services
    found = [service for service in services if service.facts.name == name]
    if not found:
        check_model(name, services[0])
    return found


def by_name(answers: Mapping[str, Any]) -> Any:
    """The answer of the one model that was asked, or of each by its name."""
    [*each] = answers.values()
    return each[0] if len(each) == 1 else {"models": answers}


def check_model(name: str | None, service: Service) -> None:
    """Raises ApiError 404 for the name of another model."""
    if name is not None and name != service.facts.name:
        shown = name if name.isprintable() and len(name) <= 128 else "of this name"
        served = ", ".join(service.front.names)
        raise ApiError(404, "model_not_found", f"the model {shown} is not served here; it serves {served}", "model")
