"""Which tokens of which sequences make up the next step. A pure function: it reads the state, changes nothing, looks at
no clock, and gives the same decision for the same state.

Order: decodes, then prefills that run, then waiting requests first come first served; older before younger everywhere.
Beside decodes, prompts get at most `beside_decodes` tokens: a long prompt does not hold up everybody's next token.
Each prompt gets a chunk of at most `max_chunk`; tokens then left go back to the prompts, oldest first, as long as
memory is ample: the pages taken leave one free page for every running sequence. When pages run out, the last-arrived
sequence gives up its own (recompute), never for a younger one; the oldest can always go on, so everything ends.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import NamedTuple

from xllm.runtime.pages import PoolPlan
from xllm.runtime.sequence import Sequence


@dataclass(frozen=True)
class Budget:
    """Limits of one step. `beside_decodes`: prompt tokens in a step that also decodes. `admit_pages`: pages that may
    be in use or promised after an admission, while anything runs."""

    tokens: int
    beside_decodes: int
    max_chunk: int
    admit_pages: int
    pool: PoolPlan


@dataclass(frozen=True)
class Queues:
    """The scheduler's view. `running` (they hold slots) and `waiting` are in order of arrival; what is `computed` of a
    waiting one is cached."""

    running: Ordered[Sequence]
    waiting: Ordered[Sequence]
    free_slots: int


class Grant(NamedTuple):
    """`tokens` next tokens of a sequence, for which it will hold `pages` pages in all; `sample` if they are its
    last."""

    sequence: Sequence
    tokens: int
    pages: int
    sample: bool


@dataclass(frozen=True)
class Decision:
    """The step: rows in `grants`; `admitted` (a prefix of waiting) need a slot first, `preempted` give theirs up
    (youngest first). `why` has one sentence for each thing not done; `oldest_wait` is the age of the first request left
    waiting."""

    grants: tuple[Grant, ...]
    admitted: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...]
    why: tuple[str, ...]
    oldest_wait: float


def chunk(done: int, total: int, limit: int, budget: int) -> int:
    """Tokens of a prompt to compute now: `done` of `total` are, at most `limit` and `budget` may be."""
    return max(0, min(total - done, limit, budget))


def decide(queues: Queues, budget: Budget, free_pages: int, now: float) -> Decision:
    """The next step. `free_pages` are pages promised to nobody, `now` is in seconds like Request.arrival. An empty
    `grants` means that nothing can run before a launched step is committed (or that there is nothing)."""
    step = _Step(queues, budget, free_pages)
    prefills: list[Sequence] = []
    grants, preempted = step.grants, step.preempted
    # The one loop over all sequences: properties are spelled out and the common case is dealt with in place.
    for sequence in queues.running:
        computed, known = sequence.computed, len(sequence.tokens) + sequence.pending
        if known - sequence.prompt_tokens >= sequence.max_outputs:
            continue
        if known - computed > 1 or computed < sequence.prompt_tokens:
            prefills.append(sequence)
        elif computed < sequence.capacity and step.tokens > 0 and not preempted:
            grants[sequence.order] = Grant(sequence, 1, sequence.pages, True)
            step.tokens -= 1
        else:
            step.give_decode(sequence)
    if grants:
        step.tokens = min(step.tokens, budget.beside_decodes)
    for sequence in prefills:
        step.give_chunk(sequence)
    admitted = step.admit(prefills)
    step.give_leftover(prefills + admitted)
    if step.skipped:
        step.why.append(f"{step.skipped} running sequences: no tokens left in the step")
    waiting = queues.waiting[len(admitted) :]
    oldest_wait = max(0.0, now - waiting[0].request.arrival) if waiting else 0.0
    return Decision(tuple(step.grants.values()), tuple(admitted), tuple(step.preempted), tuple(step.why), oldest_wait)


class _Step:
    """A step in the making."""

    def __init__(self, queues: Queues, budget: Budget, free_pages: int):
        self.queues = queues
        self.limits = budget
        self.pool = budget.pool
        self.tokens = budget.tokens
        self.free = free_pages
        self.coming = 0  # pages of victims that a launched step still uses
        self.grants: dict[int, Grant] = {}  # by order
        self.preempted: list[Sequence] = []
        self.victims = len(queues.running)  # running[victims:] was preempted
        self.stalled = False
        self.skipped = 0
        self.why: list[str] = []

    def give_decode(self, sequence: Sequence) -> None:
        if self.tokens < 1:
            self.skipped += 1
            return
        if self.is_victim(sequence):
            return
        pages = self.pool.pages_for(sequence.computed + 1)
        if pages > sequence.pages and not self.find_pages(sequence, pages - sequence.pages):
            return
        self.grant(sequence, 1, pages)

    def give_chunk(self, sequence: Sequence) -> None:
        tokens = chunk(0, sequence.remaining, self.limits.max_chunk, self.tokens)
        if tokens < 1:
            self.skipped += 1
            return
        if self.is_victim(sequence):
            return
        tokens = self.affordable(sequence, tokens)
        if tokens < 1:
            if not self.find_pages(sequence, self.pool.pages_for(sequence.computed + 1) - sequence.pages):
                return
            tokens = self.affordable(sequence, chunk(0, sequence.remaining, self.limits.max_chunk, self.tokens))
        self.grant(sequence, tokens, self.pool.pages_for(sequence.computed + tokens))

    def admit(self, prefills: list[Sequence]) -> list[Sequence]:
        """First come first served, none overtakes: a request whose whole text has no room keeps the ones behind it
        waiting, or small ones could starve it for ever."""
        admitted: list[Sequence] = []
        if self.stalled or self.preempted or not self.queues.waiting:
            return admitted
        promised = sum(self.promise(sequence) for sequence in prefills)
        used = self.pool.pages - self.free
        for sequence in self.queues.waiting:
            if self.tokens < 1:
                self.why.append(f"{sequence.id}: no tokens left in the step")
                break
            if len(admitted) == self.queues.free_slots:
                self.why.append(f"{sequence.id}: no free slot")
                break
            needed = self.pool.pages_for(sequence.computed + sequence.remaining)
            alone = not self.queues.running and not admitted
            limit = self.pool.pages if alone else self.limits.admit_pages
            if used + promised + needed > limit:
                self.why.append(f"{sequence.id}: needs {needed} pages, {limit - used - promised} may be promised")
                break
            tokens = chunk(0, sequence.remaining, self.limits.max_chunk, self.tokens)
            pages = self.pool.pages_for(sequence.computed + tokens)
            self.grant(sequence, tokens, pages)
            used, promised = used + pages, promised + needed - pages
            admitted.append(sequence)
        return admitted

    def give_leftover(self, prompts: list[Sequence]) -> None:
        """Tokens that nobody else can use shorten the prompts' way, unless decodes may soon need the memory."""
        for sequence in prompts:
            if self.tokens < 1:
                return
            grant = self.grants.get(sequence.order)
            if grant is None or grant.sample:
                continue
            reserve = len(self.queues.running) + self.coming
            tokens = grant.tokens + chunk(grant.tokens, sequence.remaining, self.tokens, self.tokens)
            pages = self.pool.pages_for(sequence.computed + tokens)
            if self.free - (pages - grant.pages) < reserve:
                self.why.append(f"{sequence.id}: keeps to its chunk, memory is scarce")
                return
            self.tokens += grant.tokens
            self.free += grant.pages - sequence.pages
            self.grant(sequence, tokens, pages)

    def grant(self, sequence: Sequence, tokens: int, pages: int) -> None:
        pages = max(pages, sequence.pages)
        self.grants[sequence.order] = Grant(sequence, tokens, pages, tokens == sequence.remaining)
        self.tokens -= tokens
        self.free -= pages - sequence.pages

    def affordable(self, sequence: Sequence, tokens: int) -> int:
        """The part of a chunk that free pages can hold."""
        room = self.pool.tokens_for(sequence.pages + self.free) - sequence.computed
        return max(0, min(tokens, room))

    def promise(self, sequence: Sequence) -> int:
        """Pages a running prompt still needs for the tokens it is known to have."""
        grant = self.grants.get(sequence.order)
        held = grant.pages if grant else sequence.pages
        return max(0, self.pool.pages_for(len(sequence.tokens)) - held)

    def is_victim(self, sequence: Sequence) -> bool:
        return bool(self.preempted) and sequence.order >= self.preempted[-1].order

    def find_pages(self, sequence: Sequence, pages: int) -> bool:
        """Take pages from the youngest until there are enough; False if the sequence has to wait for them."""
        running = self.queues.running
        while self.free < pages and self.free + self.coming < pages and running[self.victims - 1] is not sequence:
            self.victims -= 1
            self.preempt(running[self.victims])
        if self.free >= pages:
            return True
        self.stalled = True
        if self.free + self.coming >= pages:
            # Its victims' pages come with the next commit; nobody younger may take what it waits for.
            self.free, self.coming = 0, self.free + self.coming - pages
        self.why.append(f"{sequence.id}: waits for {pages} pages")
        return False

    def preempt(self, victim: Sequence) -> None:
        grant = self.grants.pop(victim.order, None)
        if grant:
            self.tokens += grant.tokens
            self.free += grant.pages - victim.pages
        if victim.flights:
            self.coming += victim.pages
        else:
            self.free += victim.pages
        self.preempted.append(victim)
        self.why.append(f"{victim.id}: preempted, the pool has no page left for older requests")
