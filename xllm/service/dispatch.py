"""Decides which HTTP request an engine output belongs to. The engine thread hands over once per step; everything else
happens on the event loop. A reader that falls behind by more than its buffer is failed, never waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from xllm.runtime import EngineStats, Request, RequestRefused, TokenOutput
from xllm.service.backlog import Backlog
from xllm.service.errors import ApiError, from_engine

BUFFER_BYTES = 1 << 20
# What one output will take on the wire, roughly: the JSON around a token, and each alternative with its logprob.
OUTPUT_BYTES = 256
ALTERNATIVE_BYTES = 80


class Engine(Protocol):
    """What the service needs of the engine; all of it may be called from any thread."""

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def stats(self) -> EngineStats: ...


class Subscription:
    """The outputs of the sequences of one HTTP request. One reader; belongs to the event loop."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        self.live = set(ids)
        self.names: tuple[str, ...] = ()  # what its client knows it by
        self.tenant = ""
        self.failure: ApiError | None = None
        self.on_failure: Callable[[], None] | None = None  # for a reader that waits for its client, not for outputs
        self._outputs: list[tuple[int, TokenOutput]] = []
        self._bytes = 0
        self._reading = False
        self._wake = asyncio.Event()

    def put(self, index: int, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self.live.discard(output.request_id)
        self._outputs.append((index, output))
        self._bytes += OUTPUT_BYTES + ALTERNATIVE_BYTES * len(output.top_logprobs)
        self._wake.set()

    @property
    def overflown(self) -> bool:
        """Whether too much lies unread. A reader that waits right here is not slow: what has gathered since the loop
        last ran is the loop's lag, and nobody's fault."""
        return self._bytes > BUFFER_BYTES and not self._reading

    def fail(self, error: ApiError) -> None:
        """Ends the request for its reader; the first failure counts, outputs not read yet are dropped."""
        if self.failure is None:
            self.failure = error
            self._outputs.clear()
            if self.on_failure is not None:
                self.on_failure()
        self._wake.set()

    async def next(self, timeout: float | None = None) -> list[tuple[int, TokenOutput]]:
        """Waits for outputs: (index of the sequence, output). Empty after `timeout` seconds. Raises the failure."""
        if not self._outputs and self.failure is None:
            self._reading = True
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                return []
            finally:
                self._reading = False
        self._wake.clear()
        if self.failure is not None:
            raise self.failure
        outputs, self._outputs = self._outputs, []
        self._bytes = 0
        return outputs


class Dispatcher:
    """Routes outputs to subscriptions. `sink` goes to the engine's constructor, `bind` follows when engine and loop
    exist."""

    def __init__(self) -> None:
        self.backlog = Backlog()
        self._routes: dict[str, tuple[Subscription, int]] = {}
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop

    def sink(self, outputs: list[TokenOutput]) -> None:
        """Called by the engine thread, once per step."""
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:  # the loop is closed: the server is gone, and so is everyone who waited
            self._loop = None

    @property
    def live(self) -> int:
        """Sequences with a reader."""
        return len(self._routes)

    def open(self, requests: Sequence[Request]) -> Subscription:
        """Submits all or none. Raises ApiError for what the engine refuses, and for what would wait too long."""
        assert self._engine is not None
        self.backlog.add(requests)
        subscription = Subscription([request.id for request in requests])
        try:
            for index, request in enumerate(requests):
                self._routes[request.id] = (subscription, index)
                self._engine.submit(request)
        except BaseException as error:
            self._routes.pop(request.id)
            for later in requests[index:]:
                subscription.live.discard(later.id)
                self.backlog.drop(later.id)
            self.close(subscription)
            if isinstance(error, RequestRefused):
                raise from_engine(error.code, error.message) from None
            raise
        return subscription

    def cancel(self, subscription: Subscription, request_id: str, tokens: int | None = None) -> None:
        """Ends one sequence; tokens: of its answer, where that is complete (a stop string)."""
        self._routes.pop(request_id, None)
        if tokens is None:
            self.backlog.drop(request_id)
        else:
            self.backlog.ended(request_id, tokens)
        if request_id in subscription.live:
            subscription.live.discard(request_id)
            assert self._engine is not None
            self._engine.cancel(request_id)

    def close(self, subscription: Subscription) -> None:
        """Cancels what still runs and forgets the subscription."""
        for request_id in subscription.ids:
            self.cancel(subscription, request_id)

    def abort(self, name: str | None, tenant: str | None) -> int:
        """Ends what runs under this name, for this tenant; None stands for all of them. How many HTTP requests."""
        running = [subscription for subscription in {one for one, _ in self._routes.values()} if subscription.live]
        running = [one for one in running if name is None or name in one.names]
        running = [one for one in running if tenant is None or tenant == one.tenant]
        for subscription in running:
            subscription.fail(ApiError(499, "request_aborted", "the request was aborted"))
            self.close(subscription)
        return len(running)

    def fail_all(self, error: ApiError) -> None:
        for subscription in {subscription for subscription, _ in self._routes.values()}:
            subscription.fail(error)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        # What ended without a result was not computed, and says nothing of what that takes.
        computed = [output for output in outputs if output.finish_reason not in ("cancelled", "error")]
        for output in outputs:
            if output.finish_reason in ("cancelled", "error"):
                self.backlog.drop(output.request_id)
        self.backlog.started(*[output.request_id for output in computed])
        for output in computed:
            if output.finish_reason is not None:
                self.backlog.ended(output.request_id, output.index + 1)
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is None:
                continue
            subscription, index = route
            subscription.put(index, output)
            if subscription.overflown and subscription.failure is None:
                kib = BUFFER_BYTES >> 10
                error = ApiError(408, "slow_reader", f"the client left more than {kib} KiB of the answer unread")
                subscription.fail(error)
                self.close(subscription)
