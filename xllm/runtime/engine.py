"""The engine's thread: takes requests from any thread, drives the core with one of two loops, delivers outputs.

The overlapped loop launches step i+1 before it commits step i, so that all host work happens while the device computes.
The plain loop commits each step at once: the same outputs, and the oracle to compare with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import get_args

from xllm.runtime.arrival import new_sequence
from xllm.runtime.config import EngineConfig, EngineStats
from xllm.runtime.core import Core, Flight
from xllm.runtime.errors import InvariantBroken, RequestRefused, RuntimeFault
from xllm.runtime.executor import Executor
from xllm.runtime.groups import BeamGroup
from xllm.runtime.kv import KvPool
from xllm.runtime.ordered import Ordered
from xllm.runtime.pages import plan_pool
from xllm.runtime.policies.state import Budget
from xllm.runtime.request import FinishReason, Request, TokenOutput
from xllm.runtime.sequence import Sequence
from xllm.runtime.store import PageStore
from xllm.runtime.tiered import TieredPool
from xllm.runtime.tiers import Tiers, open_tiers
from xllm.runtime.xtensor import LinuxMemory, PageMemory

log = logging.getLogger("xllm.runtime")


class Engine(Ordered):
    """Continuous batching over one executor, which ends with the engine.

    `sink` is called from the engine thread, at most once per step, with the outputs of that step in no particular order
    of requests; a slow sink slows generation, one that raises ends the engine. Every accepted request gets exactly one
    output with a finish_reason, also on stop and on failure. `memory` is where KV pages come from (Linux by default),
    or a store of them that engines share; `clock` what Request.arrival is measured with, in seconds. Raises MemoryFault
    when the KV pool cannot be made, RuntimeFault when a tier cannot.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        sink: Callable[[list[TokenOutput]], None],
        memory: PageMemory | PageStore | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        limits = executor.limits
        max_seqs = min(config.max_seqs or limits.max_seqs, limits.max_seqs)
        plan = plan_pool(executor.kv, limits.max_len, max_seqs, config.kv_bytes, config.page_bytes)
        memory = memory or LinuxMemory(plan.page_bytes)
        store = memory if isinstance(memory, PageStore) else PageStore(memory, plan.pages)
        self._tiers: Tiers | None = None
        if config.tiers is None or executor.kv.fixed_bytes:
            pool = KvPool(plan, store)
        else:
            pool = TieredPool(plan, store)
            try:
                self._tiers = open_tiers(config.tiers, pool, self._wake)
            except BaseException:
                pool.close()  # or others would leave it room for ever
                raise
        super().__init__(Core(executor, config, pool, clock, self._tiers))
        pool.on_room = self._wake
        self._limits = limits
        self._config = config
        self._sink = sink
        self._turn = self._overlapped_turn if config.async_scheduling else self._plain_turn
        self._submitted: list[Sequence] = []
        self._cancelled: list[tuple[Sequence, FinishReason]] = []
        self._accepted = 0
        self._quiet = True
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)

    @property
    def executor(self) -> Executor:
        return self._core.executor

    @property
    def budget(self) -> Budget:
        """Limits of a step, as they are now."""
        return self._core.budget

    def start(self) -> None:
        """Start the engine thread. Requests may be submitted before."""
        if self._config.premap:
            self.pool.start_premapping()
        if self._tiers is not None:
            self._tiers.start()
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accept a request, from any thread. Raises RequestRefused (the codes are listed there)."""
        rows = min(self.pool.plan.spans, self._core.budget.tokens)
        plan = replace(self.pool.plan, pages=self.pool.promises.most)
        sequence = new_sequence(request, plan, self._limits, rows, self._config.eos_ids)
        with self._lock:
            if self._refusal is not None:
                raise RequestRefused(self._refusal.code, self._refusal.message)
            if self._falling or self._orders.asleep:
                raise RequestRefused("asleep", "the engine sleeps; wake it, or try again later")
            if request.id in self._live:
                raise RequestRefused("duplicate_request", f"request {request.id} is still running")
            waiting = len(self._submitted) + len(self._core.waiting)
            limit = self._config.queue_limit
            if request.urgency.offline:
                limit -= limit // 10  # a backlog of them leaves room for online ones
            if waiting >= limit:
                raise RequestRefused("queue_full", f"{waiting} requests wait already; try again later")
            sequence.order = self._accepted
            self._accepted += 1
            self._live[request.id] = sequence
            self._submitted.append(sequence)
            self._quiet = False
            self._changed.notify_all()

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """End a request before the next step is built, from any thread; its slot and pages are free when the steps
        launched by then have ended. Its last output has `reason` and no token. Unknown or ended ids are ignored."""
        if reason not in get_args(FinishReason):
            raise RequestRefused("invalid_parameter", f"a request cannot end with {reason}")
        with self._lock:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self._cancelled.append((sequence, reason))
                self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait until all accepted ones have ended and everything they held is given back; a
        pause ends. False if that took longer than `timeout` seconds; the engine then still works on them."""
        with suppress(RequestRefused):
            self.resume()
        with self._lock:
            self._refuse("shutting_down", "the engine is draining and takes no new requests")
            return self._changed.wait_for(lambda: self._quiet or not self._thread.is_alive(), timeout)

    def stop(self) -> None:
        """End every request (error shutting_down), the thread, the pool and the executor, as an engine that failed has
        done by itself. Waits for launched steps. Calling it again does nothing; not for the sink to call."""
        with self._lock:
            self._refuse("shutting_down", "the engine is stopping")
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""
        figures = self._core.stats()
        with self._lock:
            pending = len(self._submitted)
            refusal = str(self._refusal) if self._refusal is not None else None
            told = {"paused": self._orders.paused, "asleep": self._orders.asleep}
            waiting = figures.waiting + pending
            return replace(figures, accepted=self._accepted, waiting=waiting, pending=pending, refusal=refusal, **told)

    @property
    def why(self) -> tuple[str, ...]:
        """What the latest step left undone, a sentence each."""
        return self._core.why

    def _run(self) -> None:
        flight = None
        try:
            while self._take_requests(flight):
                flight = self._turn(flight)
            self._core.commit(flight)
            self._refuse_orders()
            self._end_all("shutting_down: the engine stopped")
        except Exception as error:  # the boundary: whatever it is, nobody may wait for ever
            log.exception("the engine failed")
            self._die(error)
        finally:
            self._close()

    def _overlapped_turn(self, flight: Flight | None) -> Flight | None:
        launched = self._core.launch(self._next_step())
        self._core.commit(flight)
        self._deliver(progress=flight is not None or launched is not None)
        return launched

    def _plain_turn(self, _: Flight | None) -> Flight | None:
        launched = self._core.launch(self._next_step())
        self._core.commit(launched)
        self._deliver(progress=launched is not None)
        return None

    def _take_requests(self, flight: Flight | None) -> bool:
        """Move what other threads left into the core, waiting for it when there is nothing else. False: stop."""
        with self._lock:
            while (self._orders.resting or self._starved) and flight is None and not self._told:
                self._quiet = self._core.idle
                self._changed.notify_all()
                self._changed.wait(None if self._quiet else 1.0)  # a load that is stuck does not say so
            self._quiet = False
            stopping = self._stopping
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            ordered, self._ordered = self._ordered, []
        for sequence in submitted:
            self._core.add(sequence)
        for sequence, reason in cancelled:
            self._core.cancel(sequence, reason)
        for order in ordered:
            self._orders.take(order)
        return not stopping

    @property
    def _told(self) -> bool:
        return bool(self._submitted or self._cancelled or self._ordered or self._stopping)

    def _deliver(self, progress: bool) -> None:
        outputs = self._core.take_outputs()
        if outputs:
            self._forget(outputs)
            self._sink(outputs)
        elif not (
            progress or self._core.idle or self._core.loading or self._starved or self._outdated or self._orders.active
        ):
            raise InvariantBroken(f"engine: nothing can run: {'; '.join(self._core.why)}")
        self._orders.carry_out()

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()

    def _forget(self, outputs: list[TokenOutput]) -> None:
        """Ended ids may be used again as soon as the sink has seen the end."""
        with self._lock:
            ended = [self._live.pop(output.request_id) for output in outputs if output.finish_reason is not None]
        if any(isinstance(sequence, BeamGroup) for sequence in ended):
            self.pool.store.unclaim(self.pool)

    def _end_all(self, error: str) -> None:
        with self._lock:
            left = list(self._live.values())
        for sequence in left:
            self._core.cancel(sequence, "error", error)
        self._deliver(progress=True)
        with self._lock:
            self._quiet = True
            self._changed.notify_all()

    def _die(self, error: Exception) -> None:
        """The core's state is not to be trusted any more: end what lives without it."""
        code = error.code if isinstance(error, RuntimeFault) else "internal_error"
        with self._lock:
            self._refuse("engine_failed", "the engine failed and must be restarted; the log says why")
            left, self._live = list(self._live.values()), {}
            self._quiet = True
            self._changed.notify_all()
        self._refuse_orders()
        outputs = self._core.take_outputs() + [
            TokenOutput(
                sequence.id,
                None,
                len(sequence.tokens) - sequence.prompt_tokens,
                finish_reason="error",
                error=f"{code}: the engine failed",
                prompt_tokens=sequence.prompt_tokens,
            )
            for sequence in left
            if sequence.finish is None
        ]
        self._core.forget_all()
        try:
            self._sink(outputs)
        except Exception:
            log.exception("the sink failed as well; %d requests got no last output", len(left))

    def _close(self) -> None:
        """Give back what the engine had, which other models may wait for, once nothing launched or loaded uses it."""
        pool, tiers = self.pool, self._tiers
        done = _done("executor", self._core.executor.close)
        if tiers is not None:
            _done("KV tiers", tiers.close)
        _done("KV pool", pool.close if done else pool.abandon)

    def _refuse(self, code: str, message: str) -> None:
        if self._refusal is None or code == "engine_failed":
            self._refusal = RequestRefused(code, message)


def _done(what: str, end: Callable[[], None]) -> bool:
    """Whether something ended as it should. If not, the others are to end all the same."""
    try:
        end()
    except Exception:
        log.exception("the %s of an engine did not end as it should: what it has stays until the process ends", what)
        return False
    return True
