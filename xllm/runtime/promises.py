"""Promises: how many pages each sequence may have whenever it asks. Counts alone decide what fits; which pages these
are is the pool's, whose they were before is the store's.

Pages are promised to a slot. A group of beams has one promise for all of its slots, in one of them: each has one page
more at most at every place where they differ, whoever forks from whom. Each pool is kept the share of a longest request
of its model, which no other may be promised: so whoever is first in line in its own model can always go on. The rest is
first come, first served. A pool that rests is kept nothing. A search may need more than a share: its pool then claims
all that is no share of others, until it has ended; one at a time. A pool may reserve what its sequences will need in
all: no other is promised that, but for a search.
"""

from __future__ import annotations

from xllm.runtime.errors import InvariantBroken


class Ledger:
    """All that is promised of one store's `pages` pages."""

    def __init__(self, pages: int):
        self.pages = pages
        self.accounts: tuple[Promises, ...] = ()
        self.claimant: Promises | None = None

    def open(self, account: Promises) -> None:
        self.accounts += (account,)

    def close(self, account: Promises) -> None:
        self.accounts = tuple([other for other in self.accounts if other is not account])
        if self.claimant is account:
            self.claimant = None

    def check(self) -> None:
        """Raises InvariantBroken."""
        if sum(account.total for account in self.accounts) > self.pages:
            raise InvariantBroken("page store: more is promised than there is")


class Promises:
    """Those of one pool, of which at most `pages` pages are promised, `longest` to one request. A step is planned from
    what there is room for, with `planning` of the store held until all of it is promised."""

    def __init__(self, ledger: Ledger, pages: int, longest: int):
        self._ledger, self._pages, self._longest = ledger, pages, longest
        self._of: dict[int, int] = {}
        self.total = self._reserved = 0
        self.resting = False  # no page is to be touched

    def of(self, slot: int) -> int:
        return self._of.get(slot, 0)

    def add(self, slot: int, pages: int) -> None:
        """So many more. There must be room for them."""
        self._of[slot] = self.of(slot) + pages
        self.total += pages

    def end(self, slot: int) -> None:
        self.total -= self._of.pop(slot, 0)

    def end_all(self) -> None:
        self._of.clear()
        self.total = self._reserved = 0

    def hand_on(self, source: int, target: int) -> None:
        """What one slot was promised is another's from now on."""
        self._of[target] = self._of.pop(source, 0) + self.of(target)

    def reserve(self, pages: int) -> bool:
        """What its sequences will need in all, as far as there is room now. Is that less than before?"""
        before = self.reserved
        self._reserved = min(pages, self.total + max(0, self.room))
        return self.reserved < before

    @property
    def reserved(self) -> int:
        """Pages that its sequences will need. A search comes before that, and nothing is when there are none."""
        return self._reserved if self.total and not self.shut_out else 0

    @property
    def room(self) -> int:
        """Pages that may be promised still. Below zero after another pool woke up, for which there is no room yet."""
        return min(self._pages, self._ledger.pages - self._held_by_others) - self.total

    @property
    def share(self) -> int:
        """Pages that no other pool may be promised, whatever it claims."""
        return 0 if self.resting else self._longest

    @property
    def kept(self) -> int:
        """Pages that no other pool may be promised now."""
        claims = self._ledger.claimant is self
        return self._ledger.pages - sum(other.share for other in self._others) if claims else self.share

    @property
    def most(self) -> int:
        """Pages that it has for sure in the end, whoever else is awake."""
        return min(self._pages, self._ledger.pages - sum(other._longest for other in self._others))

    @property
    def owed(self) -> bool:
        """Others still have what is kept for it: after it claimed that, or it or another one woke up, until their
        sequences end or give way to each other."""
        return self._ledger.pages - self._held_by_others < self.kept

    @property
    def shut_out(self) -> bool:
        """Does another one claim all that is not its share?"""
        return self._ledger.claimant not in (None, self)

    @property
    def _held_by_others(self) -> int:
        return sum(max(other.total, other.kept, other.reserved) for other in self._others)

    @property
    def _others(self) -> list[Promises]:
        return [other for other in self._ledger.accounts if other is not self]

    def check(self, live: set[int]) -> None:
        """Assert that the live slots, and no others, have promises, which can all be kept. Raises InvariantBroken."""
        if self.total != sum(self._of.values()) or min(self._of.values(), default=0) < 0:
            raise InvariantBroken("KV pool: promises are miscounted")
        if not self._of.keys() <= live:
            raise InvariantBroken("KV pool: pages are promised to who has ended")
        if self.total > self._pages:
            raise InvariantBroken("KV pool: more is promised than there is")
