"""The engine of programs that give rows: prompts from any thread, whole, first come first served, offline ones behind
all others; as many as fit go into one step, and each gets one output. What `Engine` is for tokens, with the same rules
for requests and for failures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from xllm.runtime.config import EngineStats
from xllm.runtime.encoding import Encoder, check_prompt
from xllm.runtime.errors import RequestRefused, RuntimeFault, StepError
from xllm.runtime.executor import Limits
from xllm.runtime.policies.state import AGED_SECONDS, OFFLINE_AGED
from xllm.runtime.request import FinishReason, Request, TokenOutput
from xllm.runtime.spent import Spent

log = logging.getLogger("xllm.runtime")

QUEUE_LIMIT = 4096


class RowEngine:
    """Batches prompts over one encoder, which ends with the engine. Sampling parameters of requests are not looked at.

    `sink` is called from the engine's thread, at most once per step. Every accepted request gets exactly one output:
    its row, or an end without one. `queue_limit`: accepted requests that may wait, a tenth less for offline ones.
    `clock`: what Request.arrival is measured with, in seconds.
    """

    def __init__(
        self,
        encoder: Encoder,
        sink: Callable[[list[TokenOutput]], None],
        queue_limit: int = QUEUE_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder, self._sink, self._queue_limit, self._clock = encoder, sink, queue_limit, clock
        # The lock guards all below; a request is in one of the two tables, in order of arrival.
        self._changed = threading.Condition()
        self._waiting: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        self._ended: list[TokenOutput] = []  # outputs of requests that ended by themselves
        self._cancelled: set[str] = set()  # of those that run
        self._stats, self._spent = EngineStats(), Spent(clock)
        self._refusal: RequestRefused | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="xllm-rows", daemon=True)

    @property
    def limits(self) -> Limits:
        """Of a step."""
        return self._encoder.executor.limits

    def start(self) -> None:
        """Start the engine's thread. Requests may be submitted before."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accept a request, from any thread. Raises RequestRefused."""
        check_prompt(request.prompt, self._encoder.executor.limits)
        with self._changed:
            if self._refusal is not None:
                raise RequestRefused(self._refusal.code, self._refusal.message)
            if request.id in self._waiting or request.id in self._running:
                raise RequestRefused("duplicate_request", f"request {request.id} is still running")
            limit = self._queue_limit - (self._queue_limit // 10 if request.urgency.offline else 0)
            if len(self._waiting) >= limit:
                raise RequestRefused("queue_full", f"{len(self._waiting)} prompts wait already; try again later")
            self._waiting[request.id] = request
            self._count(accepted=1)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request, from any thread: before it runs, or without its row. Unknown or ended ids are ignored."""
        with self._changed:
            if request := self._waiting.pop(request_id, None):
                self._ended.append(_end(request, "cancelled"))
                self._count(cancelled=1)
                self._changed.notify()
            elif request_id in self._running:
                self._cancelled.add(request_id)

    def stop(self) -> None:
        """End every request (error shutting_down), the thread and the encoder; waits for the step that runs. Calling it
        again does nothing."""
        with self._changed:
            self._refusal = self._refusal or RequestRefused("shutting_down", "the engine is stopping")
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._run()
        self._encoder.close()

    def stats(self) -> EngineStats:
        """A snapshot, from any thread. There are no pages."""
        with self._changed:
            first = next(iter(self._waiting.values()), None)
            return replace(
                self._stats,
                running=len(self._running),
                waiting=len(self._waiting),
                oldest_wait_s=self._clock() - first.arrival if first else 0.0,
                refusal=str(self._refusal) if self._refusal else None,
                seconds=self._spent.seconds,
                step_sizes=self._spent.steps,
            )

    def _run(self) -> None:
        try:
            while self._take():
                self._deliver(self._compute())
            self._end_all("shutting_down: the engine stopped")
        except Exception as error:  # the boundary: whatever it is, nobody may wait for ever
            log.exception("the engine failed")
            with self._changed:
                self._refusal = RequestRefused("engine_failed", "the engine failed and must be restarted; see the log")
            code = error.code if isinstance(error, RuntimeFault) else "internal_error"
            try:
                self._end_all(f"{code}: the engine failed")
            except Exception:
                log.exception("the sink failed as well")

    def _take(self) -> bool:
        """Move what fits in one step from waiting to running; a longer prompt runs alone. False: stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended or self._stopping)
            limits = self._encoder.executor.limits
            tokens = 0
            for request in self._line()[: limits.max_seqs]:
                tokens += len(request.prompt)
                if self._running and tokens > limits.max_tokens_per_step:
                    break
                self._running[request.id] = self._waiting.pop(request.id)
            return not self._stopping

    def _line(self) -> list[Request]:
        """Those that wait, online ones first; but the very first is an offline one that has waited too long."""
        line = sorted(self._waiting.values(), key=lambda request: request.urgency.offline)
        aged = self._clock() - AGED_SECONDS * OFFLINE_AGED
        first = next((request for request in line if request.urgency.offline and 0 < request.arrival < aged), None)
        return line if first is None else [first, *(request for request in line if request is not first)]

    def _compute(self) -> Mapping[str, TokenOutput]:
        """One output for every running request."""
        requests = list(self._running.values())
        prompts = [request.prompt for request in requests]
        outputs: dict[str, TokenOutput] = {}
        try:
            for step in self._encoder.steps(prompts):
                if self._unwanted():
                    break
                tokens = sum(piece.stop - piece.start for piece in step)
                rows = self._encoder.run(step, prompts)
                with self._changed:
                    self._count(steps=1, rows=len(step), tokens=tokens)
                    self._spent.computed(tokens, self._encoder.took)
                ends = [requests[piece.index] for piece in step if piece.ends]
                outputs |= {request.id: _row(request, row) for request, row in zip(ends, rows, strict=True)}
        except StepError as error:
            with self._changed:
                self._count(failed_steps=1)
            return {request.id: _end(request, "error", str(error)) for request in requests}
        return outputs

    def _unwanted(self) -> bool:
        """Nobody waits for the step any more."""
        with self._changed:
            return self._stopping or self._cancelled >= self._running.keys()

    def _deliver(self, found: Mapping[str, TokenOutput]) -> None:
        with self._changed:
            outputs, self._ended = self._ended, []
            for request in self._running.values():
                output = found.get(request.id) or _end(request, "error", "shutting_down: the engine stopped")
                if request.id in self._cancelled:
                    output = _end(request, "cancelled")
                if output.row is not None:
                    self._count(finished=1, prompt_tokens=len(request.prompt))
                else:
                    self._count(**{"cancelled" if output.finish_reason == "cancelled" else "failed": 1})
                outputs.append(output)
            self._running.clear()
            self._cancelled.clear()
        if outputs:
            self._sink(outputs)

    def _end_all(self, error: str) -> None:
        with self._changed:
            self._running |= self._waiting
            self._waiting.clear()
            found = {request.id: _end(request, "error", error) for request in self._running.values()}
        self._deliver(found)

    def _count(self, **more: int) -> None:
        counted = {name: getattr(self._stats, name) + count for name, count in more.items()}
        self._stats = replace(self._stats, **counted)


def _row(request: Request, row: np.ndarray) -> TokenOutput:
    """A row with NaN or infinity fails alone: nothing of it is anybody else's."""
    if not np.isfinite(row).all():
        return _end(request, "error", "numeric_error: the row holds NaN or infinity")
    return TokenOutput(request.id, None, 0, finish_reason="stop", prompt_tokens=len(request.prompt), row=row)


def _end(request: Request, reason: FinishReason, error: str | None = None) -> TokenOutput:
    return TokenOutput(request.id, None, 0, finish_reason=reason, error=error, prompt_tokens=len(request.prompt))
