"""Decides the life of one request to the model: slot, task, body, job, sequences in the engine, answer. Whatever ends
it, its sequences are out of the engine when this returns. A generation's status waits for the first output, so that
what fails before has its own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from xllm.runtime import Request, TokenOutput
from xllm.service.body import NOT_SUPPORTED, Body, OfModel, parse
from xllm.service.dispatch import Dispatcher, Engine, Subscription
from xllm.service.errors import ApiError, Hint, busy, draining
from xllm.service.gate import Receive, Record, Scope, Send, record
from xllm.service.generation import Choice, Delta
from xllm.service.metrics import Recorder
from xllm.service.openai import Format, Usage, Whole
from xllm.service.params import Job, ModelFacts
from xllm.service.parsers.reading import NO_DIALECT, Dialect
from xllm.service.tokenizer import TextCodec

if TYPE_CHECKING:
    from xllm.service.grammar import Grammars
    from xllm.service.template import ChatTemplate

# A client that takes nothing for so long is gone, and a failed stream waits only so long to say why.
STALL_SECONDS = 60.0
FAREWELL_SECONDS = 5.0
PIECE_BYTES = 64 << 10  # of an answer that is sent whole: only so much of it lies in a connection's buffer
_TASKS = {  # what an artifact does, and the routes for it
    "generate": ("generates text", "/v1/chat/completions or /v1/completions"),
    "embed": ("computes embeddings", "/v1/embeddings, /v1/rerank or /v1/score"),
    "classify": ("computes scores of labels", "/v1/rerank, /v1/score or /v1/classify"),
}
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class Limits:
    """What one server takes. Seconds and bytes."""

    max_concurrent_requests: int = 200  # 0 = no limit
    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    keep_alive_seconds: float = 15.0


@dataclass
class Service:
    """All that requests share. Belongs to the event loop; `pool` runs what takes long (JSON, templates,
    tokenisation)."""

    facts: ModelFacts
    codec: TextCodec
    chat_template: Callable[[], ChatTemplate]
    grammars: Callable[[], Grammars]
    engine: Engine
    dispatcher: Dispatcher
    recorder: Recorder
    limits: Limits = Limits()
    dialect: Dialect = NO_DIALECT
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="xllm-prepare"))

    def warm_up(self) -> None:
        """Loads what the first chat would wait for. A template that is missing or broken is reported to who asks for a
        chat."""
        with suppress(ApiError):
            self.chat_template()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """One of max_concurrent_requests. Raises ApiError 429 when all are taken, 503 while draining."""
        if self.draining:
            raise draining()
        limit = self.limits.max_concurrent_requests
        if limit and self.recorder.concurrent >= limit:
            hint = Hint("all slots are taken", "xllm serve --max-concurrent-requests", "retry, or raise the limit")
            raise busy(f"the server answers {limit} requests already", hint)
        self.recorder.concurrent += 1
        try:
            yield
        finally:
            self.recorder.concurrent -= 1


JobOf = TypeVar("JobOf")


class Endpoint(Generic[JobOf]):
    """One POST route. `kind` names it in metrics; `tasks` are those of artifacts that it is for; `body` is what it
    takes, and `refused` are fields of its API that it does not, with the values that ask for nothing."""

    kind = ""
    tasks: tuple[str, ...] = ("generate",)
    body: type[OfModel]
    refused: Mapping[str, tuple[Any, ...]] = NOT_SUPPORTED

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        with service.slot():
            entry = record(scope)
            entry.kind = self.kind
            check_task(service.facts, self.tasks, scope["path"])
            data = await read_body(scope, receive, service.limits)
            begin = time.monotonic()
            job = await asyncio.get_running_loop().run_in_executor(service.pool, self.plan, data, entry)
            service.recorder.tokenization_seconds += time.monotonic() - begin
            await self.run(job, entry, receive, send)

    def plan(self, data: bytes, entry: Record) -> JobOf:
        """The body as what is to be done; runs in the pool. Raises ApiError."""
        raise NotImplementedError

    async def run(self, job: JobOf, entry: Record, receive: Receive, send: Send) -> None:
        """Does it and answers."""
        raise NotImplementedError

    def parse(self, data: bytes, kind: type[Body]) -> Body:
        """The body, which is for the model that is served. Raises ApiError 400, or 404 for another model."""
        body = parse(data, kind, self.refused)
        _check_model(body.model, self.service.facts)
        return body

    @asynccontextmanager
    async def submitted(self, requests: Sequence[Request], receive: Receive) -> AsyncIterator[Subscription]:
        """The requests in the engine, as long as the client is there."""
        subscription = self.service.dispatcher.open(requests)
        watcher = asyncio.create_task(_watch(receive, subscription))
        try:
            yield subscription
        finally:
            watcher.cancel()
            self.service.dispatcher.close(subscription)


class Generate(Endpoint[Job]):
    """A route whose answers are generated: what is asked for, and what the answer looks like."""

    def job(self, data: bytes, entry: Record) -> Job:
        """The body as what is to be generated. Raises ApiError."""
        raise NotImplementedError

    def format(self, job: Job) -> Format:
        """The bodies of the answer."""
        raise NotImplementedError

    def plan(self, data: bytes, entry: Record) -> Job:
        job = self.job(data, entry)
        if job.form is None:
            return job
        grammar = self.service.grammars().compile(job.form)
        return replace(job, params=tuple(replace(params, grammar=grammar) for params in job.params))

    async def run(self, job: Job, entry: Record, receive: Receive, send: Send) -> None:
        async with self.submitted(_requests(job, entry), receive) as subscription:
            answer = _Answer(self.service, job, self.format(job), subscription, entry)
            try:
                await (answer.stream(send) if job.stream else answer.whole(send))
            finally:
                answer.report()


class _Answer:
    def __init__(self, service: Service, job: Job, form: Format, subscription: Subscription, entry: Record) -> None:
        self._service, self._job, self._format = service, job, form
        self._subscription, self._entry = subscription, entry
        self._choices = [
            Choice(service.codec, job.stops, job.skip_special_tokens, job.reading) for _ in subscription.ids
        ]
        self._last = [entry.started] * len(self._choices)

    async def whole(self, send: Send) -> None:
        results = [Whole() for _ in self._choices]
        while not self._done:
            for index, delta in self._take(await self._subscription.next()):
                self._format.gather(results[index], delta)
        data = self._format.whole(results, self._usage)
        await send_whole(send, data, self._subscription, self._entry)

    async def stream(self, send: Send) -> None:
        pending = self._take(await self._subscription.next(self._service.limits.keep_alive_seconds))
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        loop = asyncio.get_running_loop()
        said = loop.time()
        try:
            async with asyncio.timeout(None) as patience:
                self._subscription.on_failure = lambda: patience.reschedule(loop.time() + FAREWELL_SECONDS)
                data = self._format.first(len(self._choices), self._usage)
                while True:
                    data += b"".join(self._format.chunk(index, delta) for index, delta in pending if _shows(delta))
                    if self._done:
                        data += self._format.last(self._usage)
                    if data:
                        patience.reschedule(loop.time() + STALL_SECONDS)
                        await send({"type": "http.response.body", "body": data, "more_body": not self._done})
                        said = loop.time()
                    if self._done:
                        return
                    patience.reschedule(None)
                    outputs = await self._subscription.next(self._service.limits.keep_alive_seconds)
                    pending = self._take(outputs)
                    # A call is held until it is complete, which may take longer than a client waits.
                    quiet = loop.time() - said >= self._service.limits.keep_alive_seconds
                    data = self._format.idle if quiet or not outputs else b""
        except ApiError as error:
            self._entry.status = error.status
            if error.status == 499:
                raise
            await self._farewell(send, error)
        except TimeoutError:  # returning without a last chunk makes the server drop the connection
            self._entry.status = 499

    async def _farewell(self, send: Send, error: ApiError) -> None:
        """The headers are gone: the error travels as an event, as long as the client reads at all."""
        data = self._format.failed(error, self._entry.id)
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": False})
        except TimeoutError:
            pass

    def report(self) -> None:
        """Writes what happened into the record of the request and the metrics."""
        self._entry.generated_tokens = sum(choice.tokens for choice in self._choices)
        reasons = [choice.finish_reason or "abort" for choice in self._choices]
        self._service.recorder.samples.observe(self._job.n)
        report(self._service.recorder, self._entry, self._job.prompts, reasons)

    @property
    def _done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self._job.prompts)),
            completion_tokens=sum(choice.tokens for choice in self._choices),
            cached_tokens=sum(choice.cached_tokens for choice in self._choices[:: self._job.n]),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self._choices),
        )

    def _take(self, outputs: Sequence[tuple[int, TokenOutput]]) -> list[tuple[int, Delta]]:
        now = time.monotonic()
        deltas = []
        for index, output in outputs:
            choice = self._choices[index]
            if choice.finish_reason is not None:  # steps that were on their way when a stop string hit
                continue
            recorder = self._service.recorder
            (recorder.inter_token if choice.tokens else recorder.first_token).observe(now - self._last[index])
            self._last[index] = now
            deltas.append((index, choice.push(output)))
            if choice.cut:
                self._service.dispatcher.cancel(self._subscription, output.request_id)
        return deltas


async def send_whole(send: Send, data: bytes, subscription: Subscription | None, entry: Record) -> None:
    """Sends a JSON answer in pieces, as long as the client takes them and what it subscribes to has not failed."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as patience:
            if subscription is not None:
                subscription.on_failure = lambda: patience.reschedule(loop.time())
            for at in range(0, len(data), PIECE_BYTES):
                end = at + PIECE_BYTES
                patience.reschedule(loop.time() + STALL_SECONDS)
                await send({"type": "http.response.body", "body": data[at:end], "more_body": end < len(data)})
    except TimeoutError:  # as in a stream
        entry.status = 499


def report(recorder: Recorder, entry: Record, prompts: Sequence[Sequence[int]], reasons: Sequence[str]) -> None:
    """Writes how the sequences of a request ended into its record and the metrics."""
    seconds = time.monotonic() - entry.started
    entry.prompt_tokens = sum(map(len, prompts))
    entry.finish_reasons = ",".join(dict.fromkeys(reasons))
    recorder.finished.update(reasons)
    recorder.handling_seconds[entry.kind] += seconds
    recorder.end_to_end.observe(seconds)
    recorder.prompt_tokens.observe(entry.prompt_tokens)
    recorder.generated_tokens.observe(entry.generated_tokens)


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a POST. Raises ApiError 413, 415, 408, or 499 when the client left."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind != b"application/json":
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
                    raise ApiError(499, "client_disconnected", "the client left before its request was complete")
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
    subscription.fail(ApiError(499, "client_disconnected", "the client left"))


def _requests(job: Job, entry: Record) -> list[Request]:
    name = uuid.uuid4().hex
    return [
        Request(f"{name}-{at * job.n + sample}", prompt, params, sample, entry.started, entry.tenant, job.urgency)
        for at, (prompt, params) in enumerate(zip(job.prompts, job.params, strict=True))
        for sample in range(job.n)
    ]


def _shows(delta: Delta) -> bool:
    return bool(delta.text or delta.logprobs or delta.finish_reason)


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


def _check_model(name: str | None, facts: ModelFacts) -> None:
    if name is not None and name != facts.name:
        shown = name if name.isprintable() and len(name) <= 128 else "of this name"
        raise ApiError(404, "model_not_found", f"the model {shown} is not served here; it serves {facts.name}", "model")
