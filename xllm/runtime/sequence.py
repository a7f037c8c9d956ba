"""One request inside the engine: what is known of its tokens, what was launched, and when it ends.

`computed` tokens have their KV written or being written by a launched step; `pending` sampled tokens are in flight,
their ids not known here yet. `remaining` tokens must still pass through the model; a row that covers all of them
samples the next token. A decode is just the case where one remains. `written` tokens have their KV written by steps
that have ended well: these others may start on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Ordered
from enum import Enum
from typing import TYPE_CHECKING

from xllm.runtime.executor import Row
from xllm.runtime.pages import PoolPlan
from xllm.runtime.request import FinishReason, PromptLogprobs, Request, TokenOutput

if TYPE_CHECKING:
    from xllm.runtime.beams import Found
    from xllm.runtime.kv import KvPool
    from xllm.runtime.tiers import Load


class State(Enum):
    """WAITING: queued, no slot. RUNNING: has a slot. LEAVING: preempted or finished while a launched step still refers
    to its slot. DONE: has neither slot nor future; its last output was delivered."""

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    DONE = "done"


class Sequence:
    """Mutable, owned by the engine thread. `order` is the place of its submission among all (lower is older);
    `max_outputs` the most tokens it may generate, known at submission. `arrived` and `first_at` are when it came and
    when its first token was known here, in seconds of the engine's clock.

    It takes `rows` rows of a step, all of them alike, and `width` slots, which is one and one but for a group of beams
    (see groups): 0 rows while it can't go on before a launched step has ended. Of the pages that a prompt fills `stem`
    are in all of its slots."""

    __slots__ = (
        "arrived",
        "behind",
        "cached",
        "capacity",
        "chain",
        "computed",
        "facts",
        "finish",
        "first_at",
        "flights",
        "kept",
        "load",
        "max_outputs",
        "order",
        "pages",
        "pending",
        "pending_row",
        "prompt_tokens",
        "prompted",
        "publish_at",
        "queued",
        "recompute",
        "request",
        "rows",
        "slot",
        "state",
        "stem",
        "tokens",
        "width",
        "written",
    )

    def __init__(self, request: Request, max_outputs: int, order: int = 0):
        self.request = request
        self.order = order
        self.max_outputs = max_outputs
        self.prompt_tokens = len(request.prompt)
        self.tokens = [*request.prompt]  # prompt and generated, as far as known
        self.rows = self.width = 1
        self.stem = 0
        self.state = State.WAITING
        self.finish: FinishReason | None = None
        self.arrived = request.arrival
        self.queued: float | None = None  # seconds until it was admitted first
        self.first_at: float | None = None
        self.slot = -1
        self.facts = b""  # what ranking needs of it and does not change, once it was asked
        self.pages = 0
        self.capacity = 0  # tokens that `pages` pages hold
        self.computed = 0
        self.pending = 0
        self.pending_row = -1  # of the last sampled token in flight, in its step's vector
        self.flights = 0  # launched steps that refer to the slot
        self.recompute = 0  # tokens whose KV preemption has thrown away
        self.written = 0
        self.publish_at = sys.maxsize  # `written` then completes a page for the prefix cache
        self.behind: tuple[int, int] | None = None  # order and `publish_at` of the older prompt it waits for
        self.chain: list[bytes] = []  # digests of the text, as far as somebody asked
        self.prompted: list[PromptLogprobs] = []  # of what was computed of the prompt, where asked for
        self.cached = 0  # prompt tokens found in the prefix cache
        self.load: Load | None = None  # what it waited or waits for since it waits
        self.kept = 0  # groups of its text offered to the tiers since it runs

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def outputs(self) -> int:
        """Generated tokens, known or in flight."""
        return len(self.tokens) + self.pending - self.prompt_tokens

    @property
    def begun(self) -> bool:
        """It has tokens of its own, or others of its group have."""
        group = self.request.group
        return self.first_at is not None or (group is not None and group.begun)

    @property
    def slots(self) -> Ordered[int]:
        """All that it has; `slot` is where the first `computed` of its tokens are."""
        return (self.slot,)

    @property
    def drawn(self) -> int:
        """Rows of the result of its launched step, where that samples."""
        return 1

    def step_rows(self, pool: KvPool, tokens: int, sample: bool) -> list[Row]:
        """What it adds to a step that computes so many of its tokens."""
        return [Row(self.slot, pool.base(self.slot), self.computed, self.tokens_of(tokens), sample)]

    @property
    def open(self) -> bool:
        """May more be launched?"""
        return self.rows > 0 and self.outputs < self.max_outputs

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens the model has not seen."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def scored(self) -> bool:
        """Is every place of the prompt to be computed, because its logprobs are asked for?"""
        return self.request.params.prompt_logprobs is not None and len(self.tokens) == self.prompt_tokens

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt_tokens and self.remaining == 1

    def pages_at(self, pool: PoolPlan, tokens: int) -> int:
        """Pages it is promised when so many tokens are computed: from its whole prompt on in each of its slots, apart
        from those that are in all of them."""
        pages = pool.pages_for(tokens)
        if self.width == 1 or tokens < self.prompt_tokens:
            return pages
        return self.stem + self.width * (pages - self.stem)

    def tokens_in(self, pool: PoolPlan, pages: int) -> int:
        """Most tokens that so many pages allow."""
        if self.width == 1:
            return pool.tokens_for(pages)
        each = pool.tokens_for(self.stem + max(0, pages - self.stem) // self.width)
        return each if each >= self.prompt_tokens else min(pool.tokens_for(pages), self.prompt_tokens - 1)

    def pieces(self, count: int) -> list[tuple[int, int]]:
        """What a cost model is told of its next `count` tokens, in each of its rows."""
        return [(self.computed, count)] * self.rows

    def tokens_of(self, count: int) -> Ordered[int]:
        """Ids of the next `count` tokens; one in flight is named by its row of the previous step."""
        if self.pending:
            return (-1 - self.pending_row,)
        return self.tokens[self.computed : self.computed + count]

    def output(
        self,
        token: int | None,
        index: int,
        reason: FinishReason | None,
        weights: str = "",
        error: str | None = None,
        logprob: float | None = None,
        best: tuple[tuple[int, float], ...] = (),
        prompt: PromptLogprobs | None = None,
        found: tuple[Found, ...] = (),
    ) -> TokenOutput:
        """A token of it, or its end."""
        known = self.cached, self.prompt_tokens
        queued = self.queued or 0.0
        return TokenOutput(
            self.id, token, index, logprob, best, reason, error, *known, None, weights, prompt, found, queued
        )

    def end_reason(self, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
        """Does the token just appended end the sequence, and how? EOS and stop ids count from min_tokens on, or
        when a grammar left nothing else."""
        params = self.request.params
        generated = len(self.tokens) - self.prompt_tokens
        stops = token in params.stop_token_ids or (token in eos_ids and not params.ignore_eos)
        if stops and (generated >= params.min_tokens or params.grammar is not None):
            return "stop"
        return "length" if generated >= self.max_outputs else None
