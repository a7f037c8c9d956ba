"""A policy: five plug-ins, each a pure function of what it is given."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.runtime.policies.orders import Order
from xllm.runtime.policies.state import Budget
from xllm.runtime.sequence import Sequence

if TYPE_CHECKING:
    from xllm.runtime.policies.step import Step

# Why a waiting sequence is not admitted beside these, which run; None: it is, as far as memory and tokens allow.
Admission = Callable[["Step", Ordered[Sequence], Sequence], str | None]


@dataclass(frozen=True)
class Policy:
    """order: who goes first. batching: what a step is asked for, and in which sequence. chunking: most tokens of one
    prompt in a step. admission: who may start. preemption: whether who needs pages ("online_decode", ...) takes them
    from those behind it. timed: a step ends at the latencies that are asked for."""

    name: str
    order: Order
    batching: Callable[[Step], None]
    chunking: Callable[[Budget], int]
    admission: Admission
    preemption: Callable[[str], bool]
    timed: bool = False

    @property
    def plain(self) -> bool:
        """Queues in order of arrival are in rank order, as long as nobody is offline."""
        return self.order.keys is None and not self.timed
