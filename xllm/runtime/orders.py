"""What an engine is told beside requests: to hold and go on, to sleep and wake, to compute with other weights.

An order is carried out between two steps, when nothing is launched and those have left whom it concerns. Until then
"wait" lets them finish and admits nobody else, "keep" takes their slots and pages away (they are computed again later,
to the same text), "abort" ends them. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from xllm.runtime.core import Core
from xllm.runtime.errors import RequestRefused
from xllm.runtime.sequence import Sequence

Mode = Literal["keep", "wait", "abort"]
ABORTED = "request_aborted: it was ended by an operator"


@dataclass(eq=False)
class Order:
    """`act` says whether anything changed, which `done` then has. `kind` tells what takes an order back that is not
    carried out yet. everyone: all requests accepted before are concerned, else those that have begun."""

    kind: Literal["pause", "sleep", "weights"]
    act: Callable[[], bool]
    mode: Mode = "wait"
    everyone: bool = False
    done: Future[bool] = field(default_factory=Future)


@dataclass(eq=False)
class Recall:
    """Carried out at once: orders of this kind are taken back, then `act`."""

    kind: Literal["pause", "sleep"]
    act: Callable[[], bool]
    done: Future[bool] = field(default_factory=Future)


class Orders:
    """paused: no step is planned. asleep: the level of a sleep, while it lasts."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._pending: list[Order] = []
        self.paused = False
        self.asleep = ""

    @property
    def holding(self) -> bool:
        """Nothing may be planned."""
        return self.paused or any(order.mode != "wait" for order in self._pending)

    @property
    def active(self) -> bool:
        """That nothing runs is meant."""
        return self.paused or bool(self._pending)

    @property
    def resting(self) -> bool:
        """There is nothing to do until somebody says something, or something is loaded."""
        core = self._core
        if core.running or core.leaving:
            return False
        return core.parked or not (self._pending or (core.waiting and not self.paused))

    def take(self, order: Order | Recall) -> None:
        """Begin to carry it out. The requests that were submitted before are known to the core."""
        if isinstance(order, Recall):
            self._recall(order)
            return
        if order.mode == "keep":
            self._core.preempt_all()
            self._core.pool.store.unclaim(self._core.pool)
        elif order.mode == "abort":
            for sequence in self._concerned(order):
                self._core.cancel(sequence, "cancelled", ABORTED)
        self._pending.append(order)
        self._narrow()

    def carry_out(self) -> None:
        """Act where nobody is in the way any more."""
        for order in list(self._pending):
            if self._core.running or self._core.leaving:
                return
            satisfied = order.mode != "wait" or (order.kind == "pause" and self.paused)
            left = [] if satisfied else self._concerned(order)
            if left and not self.paused:
                continue
            self._pending.remove(order)
            if left:
                fix = "they are paused: resume first, or give the mode abort"
                order.done.set_exception(busy(len(left), fix))
            else:
                _settle(order)
        self._narrow()

    def refuse(self, error: Exception) -> None:
        """Nothing is carried out any more."""
        pending, self._pending = self._pending, []
        for order in pending:
            order.done.set_exception(error)

    def _recall(self, recall: Recall) -> None:
        for order in [order for order in self._pending if order.kind == recall.kind]:
            self._pending.remove(order)
            order.done.set_result(False)
        self._narrow()
        _settle(recall)

    def _narrow(self) -> None:
        self._core.only_begun = any(order.mode == "wait" and not order.everyone for order in self._pending)

    def _concerned(self, order: Order) -> list[Sequence]:
        """Who must leave before it is carried out."""
        core = self._core
        waiting = [one for one in core.waiting if order.everyone or one.begun]
        return [*core.running, *(one for one in core.leaving if one.finish is None), *waiting]


def _settle(order: Order | Recall) -> None:
    try:
        order.done.set_result(order.act())
    except Exception as error:  # whoever gave the order is told; the engine goes on as it was
        order.done.set_exception(error)


def busy(requests: int, fix: str) -> RequestRefused:
    """What an order is told that can't be carried out beside requests."""
    return RequestRefused("engine_busy", f"{requests} requests are not finished; {fix}")
