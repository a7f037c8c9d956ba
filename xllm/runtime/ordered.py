"""The half of an engine that takes orders, from any thread: what is asked for, and what it does to core and pool when
its turn has come; `orders` decides when that is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from xllm.runtime.core import Core
from xllm.runtime.errors import RequestRefused
from xllm.runtime.executor import Batch
from xllm.runtime.groups import BeamGroup
from xllm.runtime.orders import Mode, Order, Orders, Recall, busy
from xllm.runtime.policies.admission import peak_of, zero_evict
from xllm.runtime.rest import forget, give_back, take_back
from xllm.runtime.scheduler import Grant
from xllm.runtime.sequence import Sequence


class Ordered:
    """The lock guards what other threads touch: the inboxes, the live requests and the flags."""

    def __init__(self, core: Core) -> None:
        self._core, self.pool = core, core.pool
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ordered: list[Order | Recall] = []  # the inbox
        self._orders = Orders(core)
        self._falling = 0  # orders to sleep that are not carried out yet
        self._live: dict[str, Sequence] = {}
        self._refusal: RequestRefused | None = None
        self._stuck = False  # the latest plan was none, with nothing launched that may change that
        self._seen = 0  # of the store's changes, by that plan

    def pause(self, mode: Mode = "keep") -> Future[bool]:
        """Compute nothing from now on, until `resume`; requests that come meanwhile wait. "keep": those that run give
        their slots and pages up, and go on later to the same text; "wait": they are finished first; "abort": all end
        (cancelled). Done when nothing runs any more: whether it ran before. From any thread, as are all orders."""
        return self._order(Order("pause", lambda: self._set_paused(True), mode, everyone=mode == "abort"))

    def resume(self) -> Future[bool]:
        """Go on after a pause, or take back one that still waits. Done: whether it was paused."""
        return self._order(Recall("pause", lambda: self._set_paused(False)))

    @property
    def paused(self) -> bool:
        return self._orders.paused

    def sleep(self, level: str, rest: Callable[[], None], mode: Mode | None = None) -> Future[bool]:
        """Give the memory of the KV pool back and call `rest`, which does so for what the engine does not know; new
        requests are refused (asleep) until `wake`. level: light or deep. Mode None is refused (engine_busy) when there
        are any; "wait" answers all of them first, "abort" ends them. Done: whether it did not sleep like this."""
        order = Order("sleep", lambda: self._fall_asleep(level, rest), mode or "abort", everyone=True)
        with self._lock:
            if mode is None and self._live:
                raise busy(len(self._live), "give the mode wait or abort")
            self._give(order)
            self._falling += 1
        order.done.add_done_callback(self._fell)
        return order.done

    def wake(self, rouse: Callable[[], None]) -> Future[bool]:
        """Undo `sleep`, or take back one that still waits; `rouse` undoes its `rest`. What either raises the future
        has: the engine then sleeps on. Done: whether it slept."""
        return self._order(Recall("sleep", lambda: self._wake_up(rouse)))

    @property
    def asleep(self) -> str:
        """The level of its sleep; empty while it is awake."""
        return self._orders.asleep

    def swap(self, weights: str, load: Callable[[], None], mode: Mode = "wait") -> Future[bool]:
        """Call `load` between two steps, which gives the executor weights of this version. No request is computed with
        two: those that have begun are finished before (or ended, mode "abort"), all others wait. The prefix cache is
        emptied. Done: whether the version is another. Refused (engine_busy) while it sleeps, and where requests that
        have begun are paused."""
        return self._order(Order("weights", lambda: self._swap(weights, load), mode))

    def _order(self, order: Order | Recall) -> Future[bool]:
        with self._lock:
            self._give(order)
        return order.done

    def _give(self, order: Order | Recall) -> None:
        if self._refusal is not None:
            raise RequestRefused(self._refusal.code, self._refusal.message)
        order.done.set_running_or_notify_cancel()  # nobody can cancel it
        self._ordered.append(order)
        self._changed.notify_all()

    def _fell(self, _: Future[bool]) -> None:
        with self._lock:
            self._falling -= 1

    def _set_paused(self, paused: bool) -> bool:
        before, self._orders.paused = self._orders.paused, paused
        return before != paused

    def _fall_asleep(self, level: str, rest: Callable[[], None]) -> bool:
        if self._orders.asleep in (level, "deep"):  # deeper than which there is none
            return False
        give_back(self.pool)
        rest()
        self._orders.asleep = level
        return True

    def _wake_up(self, rouse: Callable[[], None]) -> bool:
        if not self._orders.asleep:
            return False
        take_back(self.pool)
        rouse()
        self._orders.asleep = ""
        return True

    def _swap(self, weights: str, load: Callable[[], None]) -> bool:
        if self._orders.asleep:
            raise RequestRefused("engine_busy", "the engine sleeps: wake it first")
        if weights == self._core.weights:
            return False
        load()
        forget(self.pool)
        self._core.take_weights(weights)
        return True

    def _refuse_orders(self) -> None:
        with self._lock:
            ordered, self._ordered = self._ordered, []
            refusal = self._refusal or RequestRefused("shutting_down", "the engine stopped")
        for order in ordered:
            order.done.set_exception(refusal)
        self._orders.refuse(refusal)

    def _next_step(self) -> tuple[Batch, tuple[Grant, ...]] | None:
        store, core = self.pool.store, self._core
        with store.planning:
            self._seen = store.changes
            room = self.pool.promises.total + max(0, self.pool.free_pages)
            reach = min(self.pool.plan.pages, room) if store.shared else None
            if reach != core.budget.reach_pages:
                core.budget = replace(core.budget, reach_pages=reach)
            step = None if self._orders.holding else core.plan()
            if store.shared and core._policy.admission is zero_evict:
                store.reserve(self.pool, peak_of(core.running, core.budget) if core.running else 0)
            self._stuck = step is None and not (core.leaving or any(sequence.flights for sequence in core.running))
            waits = self._stuck and not (self._orders.holding or core.loading or self.pool.promises.owed)
            searches = waits and any(isinstance(one, BeamGroup) for one in (*core.running, *core.waiting))
            if searches and not store.claim(self.pool):
                core.preempt_all()  # a search of another model has claimed what this one needs
        return step

    @property
    def _starved(self) -> bool:
        """Nothing could run, as another model still has pages that are kept for this one, or has claimed the rest; and
        none has given anything up since."""
        promises = self.pool.promises
        return self._stuck and not self._outdated and (promises.owed or promises.shut_out)

    @property
    def _outdated(self) -> bool:
        """Somebody gave something up, or claimed it, since the latest step was planned."""
        return self.pool.store.changes != self._seen
