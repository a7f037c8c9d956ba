"""A step in the making: tokens, time, pages and slots that are left, rows granted so far, and who gives way. Policies
say in which order it is asked; it never exceeds a limit whatever they ask.

When pages run out, the last in rank gives up its own (recompute), never for one behind it. Offline sequences rank last,
so they go first. An offline prompt takes from nobody, and one that waits takes from offline ones alone, when all of
theirs suffice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ordered
from itertools import islice

from xllm.runtime.policies.policy import Policy
from xllm.runtime.policies.state import Budget, Grant, Queues, StepCost
from xllm.runtime.sequence import Sequence

LEAST_PIECE = 50  # tokens of a prompt that time is cut for, unless they are its last
PATIENCE = 1.5  # a timed step may take so much longer than its decodes alone, however little they ask for


def chunk(done: int, total: int, limit: int, budget: int) -> int:
    """Tokens of a prompt to compute now: `done` of `total` are, at most `limit` and `budget` may be."""
    return max(0, min(total - done, limit, budget))


class Step:
    """Reads the queues, changes nothing of them. `prompt_tokens` of its `tokens` may be of prompts; `seconds` is what
    a timed step may take, infinity of others. A group of beams has several rows, and gets the same tokens for each."""

    def __init__(self, queues: Queues, limits: Budget, free_pages: int, policy: Policy, cost: StepCost, seconds: float):
        self.queues, self.limits, self.policy, self.cost = queues, limits, policy, cost
        self.pool = limits.pool
        self.tokens = self.prompt_tokens = limits.tokens
        self.seconds = seconds
        self.reserved: dict[int, list[tuple[int, int]]] = {}  # of decodes that a timed step keeps time for, by order
        self.counts: tuple[float, ...] | None = None  # sizes of what is reserved and of the first `counted` grants
        self.counted = 0
        self.free = free_pages
        self.coming = 0  # pages of victims that a launched step still uses
        self.slots = queues.free_slots
        self.late: Sequence | None = None  # who got less than asked for, as time was up
        self.online = min(queues.online_running, len(queues.running))
        self.online_waiting = min(queues.online_waiting, len(queues.waiting))
        self.grants: dict[int, Grant] = {}  # by order
        self.prefills: list[Sequence] = []  # running prompts
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.causes: list[str] = []
        self.gone: set[int] = set()  # orders of the preempted
        self.victims = len(queues.running)  # running[victims:] was preempted
        self.stalled = False
        self.skipped = 0
        self.why: list[str] = []

    def give_decodes(self, running: Ordered[Sequence]) -> list[Sequence]:
        """A token to each that decodes; the others, which are prompts, come back."""
        prefills: list[Sequence] = []
        grants, preempted = self.grants, self.preempted
        # The one loop over all sequences: properties are spelled out and the common case is dealt with in place.
        for sequence in running:
            computed, known, rows = sequence.computed, len(sequence.tokens) + sequence.pending, sequence.rows
            if not rows or known - sequence.prompt_tokens >= sequence.max_outputs:
                continue
            if known - computed > 1 or computed < sequence.prompt_tokens:
                prefills.append(sequence)
            elif computed < sequence.capacity and self.tokens >= rows and not preempted:
                grants[sequence.order] = Grant(sequence, 1, sequence.pages, True)
                self.tokens -= rows
            else:
                self.give_decode(sequence)
        self.prompt_tokens = min(self.prompt_tokens, self.tokens)
        return prefills

    def give_decode(self, sequence: Sequence) -> None:
        if self.tokens < sequence.rows:
            self.skipped += 1
            return
        if sequence.order in self.gone:
            return
        pages = sequence.pages_at(self.pool, sequence.computed + 1)
        if pages > sequence.pages and not self.find_pages(sequence, pages - sequence.pages, "decode"):
            return
        self.grant(sequence, 1, pages)

    def give_chunk(self, sequence: Sequence) -> None:
        tokens = self.chunk(sequence)
        if tokens < 1:
            self.skipped += 1
            return
        if sequence.order in self.gone:
            return
        fitting = self.affordable(sequence, tokens)
        if fitting < 1:
            if not self.find_pages(sequence, self.next_pages([sequence]), "prefill"):
                return
            fitting = self.affordable(sequence, self.chunk(sequence))
        self.grant(sequence, fitting, sequence.pages_at(self.pool, sequence.computed + fitting))

    def admit(self, waiting: Ordered[Sequence], online: bool, reserved: int = 0) -> list[Sequence]:
        """As many as fit beside `reserved` pages. None overtakes: a request whose whole text has no room keeps the ones
        behind it waiting, or small ones could starve it for ever."""
        admitted: list[Sequence] = []
        if self.stalled or self.preempted or not waiting:
            return admitted
        # Offline ones give way to online admissions, so what they hold and were promised does not count there.
        peers = self.queues.running[: self.online] if online else self.queues.running
        known = {sequence.order for sequence in peers} if self.prefills else ()
        promised = reserved + sum(self.promise(sequence) for sequence in self.prefills if sequence.order in known)
        promised += sum(self.promise(sequence) for sequence in self.admitted)
        for sequence in waiting:
            if (tokens := self.chunk(sequence)) < 1:
                self.why.append(f"{sequence.id}: no tokens left in the step")
                break
            yielding = self.queues.running[self.online : self.victims] if online else ()
            if self.slots < sequence.width and not (yielding and self.take_slots(sequence.width)):
                self.why.append(f"{sequence.id}: no free slot")
                break
            needed = sequence.pages_at(self.pool, sequence.computed + sequence.remaining)
            alone = not peers and not self.admitted
            limit = self.pool.pages if alone else self.limits.admit_pages
            used = self.pool.pages - self.free - self.coming - sum(other.pages for other in yielding)
            if used + promised + needed > limit:
                text = f"{sequence.id}: needs {needed} pages, {limit - used - promised} may be promised"
                self.why.append(text)
                break
            if not alone and (reason := self.policy.admission(self, peers, sequence)):
                self.why.append(f"{sequence.id}: {reason}")
                break
            while online and self.free + self.coming < promised + needed and self.victims > self.online:
                self.preempt(self.queues.running[self.victims - 1], "online_prefill")
            tokens = self.affordable(sequence, tokens)
            if self.coming and (self.free < promised + needed or tokens < 1):
                self.stall(sequence, needed)
                break
            pages = sequence.pages_at(self.pool, sequence.computed + tokens)
            self.grant(sequence, tokens, pages)
            self.slots -= sequence.width
            promised += needed - pages
            admitted.append(sequence)
            self.admitted.append(sequence)
        return admitted

    def give_leftover(self) -> None:
        """Tokens that nobody else can use shorten the prompts' way, unless decodes may soon need the memory."""
        for sequence in self.prefills + self.admitted:
            if min(self.tokens, self.prompt_tokens) < 1:
                return
            grant = self.grants.get(sequence.order)
            if grant is None or grant.sample or sequence.rows > 1:
                continue
            reserve = len(self.queues.running) + self.coming
            left = min(self.tokens, self.prompt_tokens)
            tokens = grant.tokens + chunk(grant.tokens, sequence.remaining, left, left)
            pages = sequence.pages_at(self.pool, sequence.computed + tokens)
            if self.free - (pages - grant.pages) < reserve:
                self.why.append(f"{sequence.id}: keeps to its chunk, memory is scarce")
                return
            self.take_back(grant)
            self.grant(sequence, tokens, pages)

    def free_the_first(self) -> None:
        """Where each waits for what another holds, the first in rank takes it, whatever its class."""
        if self.grants or self.tokens < 1 or any(sequence.flights for sequence in self.queues.running):
            return
        open_ended = (s for s in self.queues.running if s.open and s.order not in self.gone)
        first = next(open_ended, None)
        if first is None:
            return
        self.stalled = False
        needed = first.pages_at(self.pool, first.computed + 1) - first.pages
        while self.free < needed and self.queues.running[self.victims - 1] is not first:
            self.preempt(self.queues.running[self.victims - 1], self.needs(first, "prefill"))
        tokens = self.affordable(first, max(1, self.chunk(first)))
        if tokens:
            self.grant(first, tokens, first.pages_at(self.pool, first.computed + tokens))

    def chunk(self, sequence: Sequence) -> int:
        """Tokens of a prompt that this step has tokens and time for; of each row, where it has several."""
        left, limit = min(self.tokens, self.prompt_tokens), self.policy.chunking(self.limits)
        if sequence.rows > 1:
            # Decodes may leave prompts less than a group's next step needs, for as long as there are any.
            left, limit = max(left // sequence.rows, self.tokens >= sequence.rows), max(1, limit // sequence.rows)
        tokens = chunk(0, sequence.remaining, limit, left)
        return tokens if self.seconds == math.inf or tokens < 1 else self.in_time(sequence, tokens)

    def in_time(self, sequence: Sequence, tokens: int) -> int:
        """The longest piece that the step still has time for; no short one, unless it is the last or the step would be
        empty. Nobody gets any once somebody got less than asked for."""
        if self.late is not None and self.late is not sequence:
            return 0
        sizes, rows = self.sizes(), bool(self.grants or self.reserved)

        def seconds(count: int) -> float:
            return self.cost.of(_sum(sizes, self.cost.sizes(sequence.pieces(count) if count else [])))

        low, high = 0 if rows else min(tokens, LEAST_PIECE), tokens
        above = seconds(high)
        if low == high or above <= self.seconds:
            return tokens
        self.late, below = sequence, seconds(low)
        if below > self.seconds:
            return 0 if rows else low
        turn = 0
        while high - low > 1:
            # Times are almost linear: where a line would be, and each third time the middle.
            turn += 1
            share = 0.5 if turn % 3 == 0 else (self.seconds - below) / (above - below)
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
            if (found := seconds(middle)) <= self.seconds:
                low, below = middle, found
            else:
                high, above = middle, found
        return low if low > LEAST_PIECE or not rows else 0

    def sizes(self) -> tuple[float, ...]:
        """Of what a timed step has in it, the decodes it keeps time for included, as its cost goes by. Rows are counted
        once: those granted since the last call are added."""
        fresh = islice(self.grants.items(), self.counted, None)
        granted = [grant.sequence.pieces(grant.tokens) for order, grant in fresh if order not in self.reserved]
        rows = [piece for pieces in granted for piece in pieces]
        if self.counts is None:
            rows += [piece for pieces in self.reserved.values() for piece in pieces]
            self.counts = self.cost.sizes(rows)
        elif rows:
            self.counts = _sum(self.counts, self.cost.sizes(rows))
        self.counted = len(self.grants)
        return self.counts

    def recount(self) -> None:
        """Rows are not what they were."""
        self.counted, self.counts = 0, None

    def keep_time_for(self, decodes: Ordered[Sequence]) -> None:
        """Prompts get what these leave, and some in any case: a latency that cannot be kept stops nobody."""
        self.reserved = {sequence.order: sequence.pieces(1) for sequence in decodes}
        self.recount()
        self.seconds = max(self.seconds, PATIENCE * self.cost.of(self.sizes()))

    def keep_short(self) -> None:
        """Before offline work gets any, which goes by time under every policy: online sequences of this step wait for
        it, and so does an online request that comes meanwhile."""
        self.seconds = min(self.seconds, self.limits.step_seconds)
        self.prompt_tokens = min(self.prompt_tokens, self.limits.beside_decodes)

    def timely(self, decodes: Ordered[Sequence]) -> int:
        """How many of these decodes, the first ones, the step has time for."""
        sizes, low, high = self.sizes(), 0, len(decodes)
        while low < high and self.seconds < math.inf:
            middle = (low + high + 1) // 2
            added = _sum(sizes, self.cost.sizes([piece for one in decodes[low:middle] for piece in one.pieces(1)]))
            if self.cost.of(added) <= self.seconds:
                low, sizes = middle, added
            else:
                high = middle - 1
        return high

    def grant(self, sequence: Sequence, tokens: int, pages: int) -> None:
        pages = max(pages, sequence.pages)
        self.grants[sequence.order] = Grant(sequence, tokens, pages, tokens == sequence.remaining)
        self.tokens -= tokens * sequence.rows
        self.prompt_tokens -= tokens * sequence.rows
        self.free -= pages - sequence.pages

    def take_back(self, grant: Grant) -> None:
        self.recount()
        self.tokens += grant.tokens * grant.sequence.rows
        self.prompt_tokens += grant.tokens * grant.sequence.rows
        self.free += grant.pages - grant.sequence.pages

    def affordable(self, sequence: Sequence, tokens: int) -> int:
        """The part of a chunk that free pages can hold."""
        room = sequence.tokens_in(self.pool, sequence.pages + self.free) - sequence.computed
        return max(0, min(tokens, room))

    def next_pages(self, decodes: Ordered[Sequence]) -> int:
        """Pages that these need for their next token."""
        ends = (sequence for sequence in decodes if sequence.computed >= sequence.capacity)
        return sum(sequence.pages_at(self.pool, sequence.computed + 1) - sequence.pages for sequence in ends)

    def promise(self, sequence: Sequence) -> int:
        """Pages a prompt still needs for the tokens it is known to have."""
        grant = self.grants.get(sequence.order)
        held = grant.pages if grant else sequence.pages
        return max(0, sequence.pages_at(self.pool, len(sequence.tokens)) - held)

    def needs(self, sequence: Sequence, phase: str) -> str:
        """Class and phase of who needs something, as causes spell it. The aged count as online."""
        online = any(sequence is other for other in self.queues.running[: self.online])
        return f"{'online' if online else 'offline'}_{phase}"

    def find_pages(self, sequence: Sequence, pages: int, phase: str) -> bool:
        """Take pages from the last in rank until there are enough; False if the sequence has to wait for them."""
        running, needs = self.queues.running, self.needs(sequence, phase)
        takes = self.policy.preemption(needs)
        while takes and self.free + self.coming < pages and running[self.victims - 1] is not sequence:
            self.preempt(running[self.victims - 1], needs)
        if self.free >= pages:
            return True
        self.stall(sequence, pages)
        return False

    def stall(self, sequence: Sequence, pages: int) -> None:
        """Its victims' pages come with the next commit; nobody behind it may take what it waits for."""
        self.stalled = True
        if self.free + self.coming >= pages:
            self.free, self.coming = 0, self.free + self.coming - pages
        self.why.append(f"{sequence.id}: waits for {pages} pages")

    def take_slots(self, count: int) -> bool:
        """Offline sequences give their slots up to an online one that waits, when all of theirs suffice; False if they
        come a step later."""
        running, coming = self.queues.running, self.slots
        if coming + sum(other.width for other in running[self.online : self.victims]) < count:
            return False
        while coming < count:
            victim = running[self.victims - 1]
            self.preempt(victim, "online_prefill")
            coming += victim.width
            self.slots += 0 if victim.flights else victim.width
        return self.slots >= count

    def preempt(self, victim: Sequence, needs: str) -> None:
        self.victims -= 1
        if grant := self.grants.pop(victim.order, None):
            self.take_back(grant)
        if victim.flights:
            self.coming += victim.pages
        else:
            self.free += victim.pages
        self.gone.add(victim.order)
        self.preempted.append(victim)
        whose = "online" if self.victims < self.online else "offline"
        self.causes.append(f"{needs}_preempt_{whose}")
        self.why.append(f"{victim.id}: preempted, what it holds is needed by those before it")


def _sum(sizes: Ordered[float], more: Ordered[float]) -> tuple[float, ...]:
    return tuple([one + other for one, other in zip(sizes, more, strict=True)])
