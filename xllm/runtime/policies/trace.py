"""Decisions to keep, and to take again: all that a decision depends on but policy and cost model, as one JSON line a
step, and what was decided. No text and no token is in it, only lengths."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xllm.runtime.executor import KVSpec
from xllm.runtime.pages import PoolPlan
from xllm.runtime.policies.state import Budget, Decision, Queues, Scaled, StepCost, TokenCost
from xllm.runtime.request import Request
from xllm.runtime.sequence import Sequence, State
from xllm.runtime.urgency import Urgency

STEPS = 10_000
_COUNTS = (
    *("order", "prompt_tokens", "computed", "pending", "flights", "pages", "capacity", "max_outputs"),
    *("rows", "width", "stem"),
)


class Trace:
    """The last `steps` decisions of one engine."""

    def __init__(self, steps: int = STEPS):
        self.lines: deque[str] = deque(maxlen=steps)

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
        self.lines.append(json.dumps(held, separators=(",", ":")))

    def write(self, path: str | Path) -> None:
        """One line a decision."""
        Path(path).write_text("".join(f"{line}\n" for line in self.lines))


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


def recorded(
    lines: Iterable[str], model: StepCost | None = None
) -> Iterator[tuple[Queues, Budget, int, float, StepCost, dict[str, Any]]]:
    """What `decide` takes but the policy, and the summary of what it said, line by line. `model` is the engine's, where
    it had one. Raises ValueError for other lines."""
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
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a line of a schedule's trace: {error}") from None


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
