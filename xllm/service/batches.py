"""Decides what /v1/batches takes, and how batches run: beside the requests of clients, a few lines at a time and only
while none of those waits. A line is asked as its route is asked. Whatever ends the process, a batch goes on with the
lines that have no result on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from xllm.service.batch_lines import Fault, Journal, Line, Reader, Result, check
from xllm.service.body import parse
from xllm.service.endpoint import Endpoint, Service, check_task
from xllm.service.errors import ApiError, busy, invalid
from xllm.service.files import page_of, query
from xllm.service.gate import App, Receive, Record, Scope, Send, api_error, record, send_json
from xllm.service.shelf import STORAGE_FAILED, Files, new_id, read_record, write_record

PATH = "/v1/batches"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
WINDOW_SECONDS = 24 * 3600
LINES = 16  # of all batches, in the engine of a model at a time
MAX_OPEN = 64  # batches that are not at their end, of all keys
MAX_KEPT = 1000  # batches of one key
AGAIN = (429, 503)  # nobody's fault: asked again later
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 2.0
REPAIR_SECONDS = 10.0  # until a disk that is full or gone is tried again
OPEN = ("validating", "in_progress", "cancelling")

log = logging.getLogger("xllm.batch")


class BatchBody(msgspec.Struct, forbid_unknown_fields=True):
    """What a batch is made of."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class Batch(msgspec.Struct):
    """One batch as it lies on disk. output, errors: the files it writes, which become files when it ends; times:
    seconds since 1970, by the name of the field that has them."""

    id: str
    tenant: str
    endpoint: str
    input: str
    output: str
    errors: str
    expires_at: int
    times: dict[str, int]
    status: str = "validating"
    metadata: dict[str, str] | None = None
    faults: list[Fault] = []
    total: int = 0
    completed: int = 0
    failed: int = 0

    def body(self) -> dict[str, Any]:
        ended = self.status in ("completed", "expired", "cancelled")
        moments = ("created", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": msgspec.to_builtins(self.faults)} if self.faults else None,
            "input_file_id": self.input,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output if ended and self.completed else None,
            "error_file_id": self.errors if ended and self.failed else None,
            "expires_at": self.expires_at,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
            **{f"{name}_at": self.times.get(name) for name in moments},
        }

    def enter(self, status: str) -> None:
        self.status = status
        self.times[status] = int(time.time())


class Batches:
    """The batches of all keys; belongs to the event loop. `bind` follows when service and routes exist."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._folder = files.folder / "batches"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        found = [held for file in self._folder.glob("batch_*.json") if (held := read_record(file, Batch)) is not None]
        self._held = {batch.id: batch for batch in sorted(found, key=lambda batch: batch.id)}
        files.sweep({name for batch in self._open for name in (batch.output, batch.errors)})
        self._over: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._places: dict[str, asyncio.Semaphore] = {}  # by model
        self._check = asyncio.Lock()  # it may take the ids of a file in memory

    def bind(self, service: Service, asked: Mapping[str, App]) -> None:
        """asked: the handlers of POST routes."""
        self._service = service
        self._places = {name: asyncio.Semaphore(LINES) for name in service.front.names}
        self._endpoints = {path: handler for path in ENDPOINTS if isinstance(handler := asked[path], Endpoint)}

    def resume(self) -> None:
        """Goes on with what an earlier process began; the loop runs now."""
        for batch in self._open:
            self._start(batch)

    def in_use(self, tenant: str, name: str) -> bool:
        return any(batch.tenant == tenant and batch.input == name for batch in self._open)

    async def create(self, body: BatchBody, tenant: str) -> Batch:
        """Raises ApiError 400, 404, or 429 when too many are open."""
        if body.endpoint not in self._endpoints:
            text = f"a batch is for one of {', '.join(ENDPOINTS)}"
            raise invalid("invalid_request", text, "endpoint")
        endpoint = self._endpoints[body.endpoint]
        check_task(endpoint.of(b"").service.facts, endpoint.tasks, body.endpoint)
        self.files.find(tenant, body.input_file_id, "input_file_id")
        if len(self._open) >= MAX_OPEN:
            raise busy(f"{MAX_OPEN} batches wait or run already")
        now = int(time.time())
        batch = Batch(new_id("batch_"), tenant, body.endpoint, body.input_file_id, new_id("file-"), new_id("file-"),
                      now + WINDOW_SECONDS, {"created": now}, metadata=body.metadata)  # fmt: skip
        self._held[batch.id] = batch
        mine = [held for held in self._held.values() if held.tenant == tenant and held.status not in OPEN]
        for old in mine[: max(0, len(mine) - MAX_KEPT + 1)]:
            del self._held[old.id]
            await self.files.do((self._folder / f"{old.id}.json").unlink)
        try:
            await self._save(batch)
        except ApiError:
            del self._held[batch.id]
            raise
        self._start(batch)
        return batch

    def of(self, tenant: str) -> list[Batch]:
        return [batch for batch in self._held.values() if batch.tenant == tenant]

    def find(self, name: str, tenant: str) -> Batch:
        """Raises ApiError 404 for what is not there, or is another's."""
        batch = self._held.get(name)
        if batch is None or batch.tenant != tenant:
            raise ApiError(404, "batch_not_found", "there is no such batch of this key")
        return batch

    async def cancel(self, batch: Batch) -> None:
        """Ends it with the results it has. Raises ApiError 409 when it has ended otherwise."""
        if batch.status in ("cancelling", "cancelled"):
            return
        if batch.status not in OPEN:
            raise ApiError(409, "batch_ended", f"the batch is {batch.status} already")
        batch.enter("cancelling")
        await self._save(batch)
        self._over[batch.id].set()

    @property
    def _open(self) -> list[Batch]:
        return [batch for batch in self._held.values() if batch.status in OPEN]

    async def _save(self, batch: Batch) -> None:
        await self.files.do(write_record, self._folder / f"{batch.id}.json", batch)

    def _start(self, batch: Batch) -> None:
        self._over[batch.id] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
        while batch.status in OPEN:
            try:
                if batch.status == "validating":
                    await self._validate(batch)
                if batch.status in OPEN:
                    await self._work(batch)
            except Exception as error:  # the boundary: a batch must not seem to run when nothing does
                failure = api_error(error)
                if failure.code == STORAGE_FAILED and time.time() < batch.expires_at:
                    await asyncio.sleep(REPAIR_SECONDS)  # all there is lies on disk: it begins from that again
                    continue
                batch.faults = [Fault(failure.code, failure.message)]
                batch.enter("failed")
                with suppress(ApiError):
                    await self._save(batch)
        log.info("%s is %s: %d of %d answered", batch.id, batch.status, batch.completed, batch.total)

    async def _validate(self, batch: Batch) -> None:
        path, most = self.files.path(batch.tenant, batch.input), self._service.limits.max_body_bytes
        async with self._check:
            count, faults = await asyncio.to_thread(check, path, batch.endpoint, most)
        if batch.status != "validating":  # cancelled meanwhile
            return
        batch.total, batch.faults = count, faults
        batch.enter("failed" if faults else "in_progress")
        await self._save(batch)

    async def _work(self, batch: Batch) -> None:
        """Runs the lines that have no result yet, until all have one, the time is over, or it is cancelled."""
        do, path = self.files.do, lambda name: self.files.path(batch.tenant, name)
        with ExitStack() as opened:
            journal = await do(Journal, batch.id, path(batch.output), path(batch.errors))
            opened.callback(self.files.after, journal.close)
            readers: dict[Endpoint[Any], Reader] = {}
            for one in self._endpoints[batch.endpoint].among:
                reader = await do(
                    Reader, path(batch.input), self._service.limits.max_body_bytes, journal, _lines_of(one)
                )
                opened.callback(self.files.after, reader.close)
                readers[one] = reader
            if batch.status != "cancelling" and time.time() < batch.expires_at:
                await self._answer(batch, journal, readers)
            batch.completed, batch.failed = journal.counts
            if batch.status != "cancelling" and batch.completed + batch.failed < batch.total:
                await self._expire(batch, journal)
            await self._end(batch)

    async def _answer(self, batch: Batch, journal: Journal, readers: Mapping[Endpoint[Any], Reader]) -> None:
        """A model that sleeps, rests or is slow holds up its own lines only."""
        over = asyncio.create_task(self._over[batch.id].wait())

        def ask(one: Endpoint[Any]) -> asyncio.Task[Result | None]:
            return asyncio.create_task(self._next(batch, one, readers[one]))

        asking = {ask(one): one for one in readers for _ in range(LINES)}
        try:
            while asking and not over.done() and (left := batch.expires_at - time.time()) > 0:
                await asyncio.wait({*asking, over}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                done = [(asking.pop(task), task.result()) for task in [*asking] if task.done()]
                found = [(one, result) for one, result in done if result is not None]
                await self._write(journal, [result for _, result in found])
                batch.completed, batch.failed = journal.counts
                asking |= {ask(one): one for one, _ in found}
        finally:
            for task in (over, *asking):
                task.cancel()

    async def _write(self, journal: Journal, results: list[Result]) -> None:
        """Answers are not thrown away because a disk is full: somebody makes room."""
        while True:
            try:
                return await self.files.do(journal.write, results)
            except ApiError:
                await asyncio.sleep(REPAIR_SECONDS)

    async def _expire(self, batch: Batch, journal: Journal) -> None:
        """Every line without a result gets an error."""
        error = {"code": "batch_expired", "message": "the completion window ended before this request was run"}
        path, most = self.files.path(batch.tenant, batch.input), self._service.limits.max_body_bytes

        def write() -> None:
            reader = Reader(path, most, journal)
            try:
                journal.write([Result(at, line.custom_id, error=error) for at, line in iter(reader.next, None)])
            finally:
                reader.close()

        await self.files.do(write)
        batch.completed, batch.failed = journal.counts
        batch.times["expired"] = int(time.time())

    async def _end(self, batch: Batch) -> None:
        """Its results become files, and then it is at its end: done again after a crash, this gives the same."""
        batch.times["finalizing"] = int(time.time())
        for name, count, what in ((batch.output, batch.completed, "output"), (batch.errors, batch.failed, "errors")):
            if count:
                await self.files.adopt(batch.tenant, name, f"{batch.id}_{what}.jsonl", "batch_output")
            else:
                await self.files.do(self.files.path(batch.tenant, name).unlink)
        if batch.status == "cancelling":
            batch.enter("cancelled")
        else:
            batch.enter("expired" if "expired" in batch.times else "completed")
        await self._save(batch)

    async def _next(self, batch: Batch, one: Endpoint[Any], reader: Reader) -> Result | None:
        """The result of the next line of a model, which is read when there is a place for it; None after the last
        one."""
        async with self._places[one.service.facts.name]:
            found = await self.files.do(reader.next)
            return await self._ask(batch, one, *found) if found is not None else None

    async def _ask(self, batch: Batch, one: Endpoint[Any], at: int, line: Line) -> Result:
        """Asks again as long as the server has no room for it. The engine puts such requests behind all others and
        takes their memory back; what it has not begun waits here until nobody else does."""
        service, front, pause = one.service, one.service.front, PAUSE_SECONDS
        while True:
            if not front.draining and not (front.concurrent and service.engine.stats().waiting):
                status, request_id, body = await self._call(batch.tenant, one, line)
                if status not in AGAIN:
                    return Result(at, line.custom_id, status, request_id, body)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _call(self, tenant: str, endpoint: Endpoint[Any], line: Line) -> tuple[int, str, bytes]:
        """Asks what a client of the same key would ask the route, without taking the place of one: the status, the
        request's id, the body."""
        pool = endpoint.service.pool
        entry = Record(new_id("req-"), time.monotonic(), kind=endpoint.kind, tenant=tenant, offline=True)
        status, data = 0, bytearray()

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()  # this client never leaves
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            data.extend(message.get("body", b""))

        try:
            check_task(endpoint.service.facts, endpoint.tasks, line.url)
            job = await asyncio.get_running_loop().run_in_executor(pool, endpoint.plan, bytes(line.body), entry)
            await endpoint.run(job, entry, receive, send)
        except Exception as error:
            failure = api_error(error)
            return failure.status, entry.id, msgspec.json.encode(failure.body(entry.id))
        return status, entry.id, bytes(data)


def _lines_of(one: Endpoint[Any]) -> Callable[[Line], bool]:
    """Which lines are answered there."""
    return lambda line: len(one.among) == 1 or one.of(bytes(line.body)) is one


class Create(Endpoint[BatchBody]):
    """POST /v1/batches: runs the requests of a file."""

    body = BatchBody
    kind = "batch"
    queues = False
    tasks = ("generate", "embed", "classify")
    refused = MappingProxyType({"output_expires_after": (None,)})

    def __init__(self, service: Service, batches: Batches) -> None:
        super().__init__(service)
        self._batches = batches

    def plan(self, data: bytes, entry: Record) -> BatchBody:
        body = parse(data, BatchBody, self.refused)
        pairs = (body.metadata or {}).items()
        if len(pairs) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
            text = "metadata has at most 16 pairs, with keys of up to 64 characters and values of up to 512"
            raise invalid("invalid_request", text, "metadata")
        return body

    async def run(self, job: BatchBody, entry: Record, receive: Receive, send: Send) -> None:
        await send_json(send, 200, (await self._batches.create(job, entry.tenant)).body())


def routes(batches: Batches, create: Create) -> dict[str, Mapping[str, App]]:
    """The routes, by path and method."""

    async def listing(scope: Scope, receive: Receive, send: Send) -> None:
        given = query(scope, ("limit", "after"))
        held = [batch.body() for batch in batches.of(record(scope).tenant)]
        await send_json(send, 200, page_of(held, {"limit": "20"} | given, 100))

    async def one(scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(f"{PATH}/")
        await send_json(send, 200, batches.find(name, record(scope).tenant).body())

    async def cancel(scope: Scope, receive: Receive, send: Send) -> None:
        name, _, rest = scope["path"].removeprefix(f"{PATH}/").partition("/")
        if rest != "cancel":
            raise ApiError(404, "unknown_route", "there is no such route")
        batch = batches.find(name, record(scope).tenant)
        await batches.cancel(batch)
        await send_json(send, 200, batch.body())

    return {PATH: {"GET": listing, "POST": create}, f"{PATH}/": {"GET": one, "POST": cancel}}
