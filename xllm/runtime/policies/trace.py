"""Decisions to keep, and to take again: a JSON line of the policy and the cost model, then one a step, of all else that
its decision depends on and of what was decided. No text and no token is in it, only lengths."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xllm.runtime import cost as fitted
from xllm.runtime.errors import RuntimeFault
from xllm.runtime.executor import KVSpec
from xllm.runtime.pages import PoolPlan
from xllm.runtime.policies import choose
from xllm.runtime.policies.policy import Policy
from xllm.runtime.policies.state import Budget, Decision, Queues, Scaled, StepCost, TokenCost
from xllm.runtime.request import Request
from xllm.runtime.scheduler import decide
from xllm.runtime.sequence import Sequence, State
from xllm.runtime.urgency import Urgency

SCHEMA = 1
STEPS, BYTES = 10_000, 32 << 20  # a crowded step takes a hundred kilobytes
_COUNTS = (
    *("order", "prompt_tokens", "computed", "pending", "flights", "pages", "capacity", "max_outputs"),
    *("rows", "width", "stem"),
)


class Trace:
    """The latest decisions of one engine: `steps` of them, and `size` bytes. The engine adds, any thread may ask."""

    def __init__(self, steps: int = STEPS, size: int = BYTES):
        self.lines: deque[str] = deque()
        self._steps, self._room = steps, size
        self._head = ""
        self._lock = threading.Lock()

    def begin(self, scheduler: str, model: StepCost | None) -> None:
        """Called by the engine before its first decision. A model of somebody else's is not written down."""
        known = asdict(model) if isinstance(model, fitted.StepCost) else None
        head = {"schema": SCHEMA, "scheduler": scheduler, "modelled": model is not None, "model": known}
        self._head = json.dumps(head)

    def add(
        self, queues: Queues, budget: Budget, free_pages: int, now: float, cost: StepCost, decision: Decision
    ) -> None:
        """Called by the engine, with what `decide` was called with."""
        waits = {sequence.order for sequence in queues.waiting}
        line = queues.line or (*queues.running, *queues.waiting)
        held = {
            "now": now,
            "free_pages": free_pages,
            "slots": queues.free_slots,
            "budget": asdict(budget),
            "of_token": cost.of_token if isinstance(cost, TokenCost) else None,
            "factor": cost.factor if isinstance(cost, Scaled) else 1.0,
            "line": bool(queues.line),
            "online": [min(queues.online_running, len(queues.running)), min(queues.online_waiting, len(waits))],
            "sequences": [_state(sequence, sequence.order in waits) for sequence in line],
            "decision": summary(decision),
        }
        line = json.dumps(held, separators=(",", ":"))
        with self._lock:
            self.lines.append(line)
            self._room -= len(line)
            while len(self.lines) > 1 and (self._room < 0 or len(self.lines) > self._steps):
                self._room += len(self.lines.popleft())

    def text(self) -> bytes | None:
        """What a file of it holds; None as long as nothing was decided."""
        with self._lock:
            lines = list(self.lines)
        return "".join(f"{line}\n" for line in (self._head, *lines)).encode() if lines else None

    def write(self, path: str | Path) -> None:
        """One line a decision, behind that of the policy."""
        Path(path).write_bytes(self.text() or b"")


def summary(decision: Decision) -> dict[str, Any]:
    """A decision as a trace has it: sequences by their order."""
    return {
        "grants": [[grant.sequence.order, grant.tokens, grant.pages, grant.sample] for grant in decision.grants],
        "admitted": [sequence.order for sequence in decision.admitted],
        "preempted": [sequence.order for sequence in decision.preempted],
        "causes": list(decision.causes),
        "why": list(decision.why),
        "seconds": decision.seconds,
    }


@dataclass(frozen=True)
class Replayed:
    """Decisions that were taken again, of which `differing` are not what was recorded; the first of those in words."""

    scheduler: str
    decisions: int
    differing: int
    first: str = ""


def replay(lines: Iterable[str], model: StepCost | None = None) -> Replayed:
    """Take the decisions of a trace again, as this version takes them. Raises ValueError as `recorded`."""
    source = iter(lines)
    head = _head(next(source, ""))
    count, differing, first = 0, 0, ""
    model = model or head.model
    if head.modelled and model is None:
        raise ValueError("decisions went by a cost model that is not in the trace: give it")
    for queues, budget, free_pages, now, cost, decided in recorded(source, model):
        again = summary(decide(queues, budget, free_pages, now, head.policy, cost))
        if again != decided:
            name = next(name for name in decided if again.get(name) != decided[name])
            first = first or f"decision {count} at {now:.3f} s, {name}: was {decided[name]}, is {again.get(name)}"
            differing += 1
        count += 1
    return Replayed(head.policy.name, count, differing, first)


def recorded(
    lines: Iterable[str], model: StepCost | None = None
) -> Iterator[tuple[Queues, Budget, int, float, StepCost, dict[str, Any]]]:
    """What `decide` takes but the policy, and the summary of what it said, line by line behind the first. `model` is
    the engine's, where it had one. Raises ValueError for other lines."""
    for line in lines:
        try:
            held = json.loads(line)
            sizes = held["budget"]
            pool = PoolPlan(**(sizes["pool"] | {"kv": KVSpec(**sizes["pool"]["kv"])}))
            every = [_sequence(state) for state in held["sequences"]]
            runs = [sequence for sequence in every if sequence.state is State.RUNNING]
            waits = [sequence for sequence in every if sequence.state is State.WAITING]
            running, waiting = held["online"]
            queues = Queues(runs, waits, held["slots"], running, waiting, every if held["line"] else ())
            cost = Scaled(model, held["factor"]) if model is not None else TokenCost(held["of_token"])
            yield queues, Budget(**(sizes | {"pool": pool})), held["free_pages"], held["now"], cost, held["decision"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a line of a schedule's trace: {error}") from None


@dataclass(frozen=True)
class _Head:
    """modelled: decisions went by a cost model, and it is here unless it was somebody else's."""

    policy: Policy
    modelled: bool
    model: StepCost | None


def _head(line: str) -> _Head:
    try:
        head = json.loads(line)
        if head["schema"] != SCHEMA:
            raise ValueError(f"it is not of schema {SCHEMA}")
        return _Head(choose(head["scheduler"]), head["modelled"], _model(head["model"]))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeFault) as error:
        raise ValueError(f"not a schedule's trace: {error}") from None


def _model(held: dict[str, Any] | None) -> StepCost | None:
    if held is None:
        return None
    basis = fitted.Basis(**{name: tuple(figures) for name, figures in held["basis"].items()})
    return fitted.StepCost(basis, tuple(held["seconds_of"]))


def _state(sequence: Sequence, waits: bool) -> dict[str, Any]:
    urgency = {name: value for name, value in asdict(sequence.request.urgency).items() if value is not None}
    return {name: getattr(sequence, name) for name in _COUNTS} | {
        "id": sequence.id,
        "tokens": len(sequence.tokens),
        "arrived": sequence.arrived,
        "first_at": sequence.first_at,
        "waits": waits,
        "urgency": urgency,
    }


def _sequence(state: dict[str, Any]) -> Sequence:
    request = Request(state["id"], (0,) * state["prompt_tokens"], urgency=Urgency(**state["urgency"]))
    sequence = Sequence(request, state["max_outputs"], state["order"])
    for name in (*_COUNTS, "arrived", "first_at"):
        setattr(sequence, name, state[name])
    sequence.tokens = [0] * state["tokens"]
    sequence.state = State.WAITING if state["waits"] else State.RUNNING
    return sequence
