"""The prefix cache: which pages hold the state of which text, so that a sequence starts on what others computed.

Text is named by a chain of digests, one per whole group of tokens, each over the one before; the first is over the
tenant's salt. A group is what a kernel writes as one run, and a page border may cut it: so the unit of a hit is the
group, the unit of sharing is the page, and a page is known under (digest, index in the span) for every group that
touches it. A page whose groups are all written never changes again and is shared; what a hit has beyond its last such
page is copied, because the sequence goes on writing there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.runtime.errors import InvariantBroken
from xllm.runtime.executor import KVSpec


def extend_chain(chain: list[bytes], tokens: Sequence[int], group_tokens: int, salt: str) -> None:
    """Add the digests (16 bytes each) of the whole groups of `tokens` that `chain` does not have yet."""
    first, groups = len(chain), len(tokens) // group_tokens
    if first >= groups:
        return
    last = chain[-1] if chain else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    text = np.asarray(tokens[first * group_tokens : groups * group_tokens], np.int32).tobytes()
    size = 4 * group_tokens
    for at in range(0, len(text), size):
        last = hashlib.blake2b(last + text[at : at + size], digest_size=16).digest()
        chain.append(last)


@dataclass(frozen=True)
class Match:
    """The first `groups` groups of a text are cached: `shared` are whole pages of them, front to back; the `size` bytes
    after those are the first ones of page `tail` (-1: there are none)."""

    groups: int = 0
    shared: tuple[int, ...] = ()
    tail: int = -1
    size: int = 0


NO_MATCH = Match()


class PrefixIndex:
    """Cached pages of one pool, which spans use them, and in which order the unused ones go. Not thread-safe. A page is
    here from `add` until `evict` gives it back, or `drop` or `add` when nothing leads to it any more. `clock` counts
    uses, in all pools that share pages."""

    def __init__(self, kv: KVSpec, page_bytes: int, clock: Iterator[int]):
        self.kv, self.page_bytes, self._clock = kv, page_bytes, clock
        self._pages: dict[tuple[bytes, int], int] = {}
        self._keys: dict[int, set[tuple[bytes, int]]] = {}  # of every cached page
        self.uses: dict[int, int] = {}  # spans that use each cached page
        self._unused: OrderedDict[int, int] = OrderedDict()  # oldest use first, and when that was
        self._entries: dict[int, int] = {}  # of every cached page: how many were cached before it, since start
        self._added = 0

    def __contains__(self, page: int) -> bool:
        return page in self.uses

    def __len__(self) -> int:
        return len(self.uses)

    @property
    def unused(self) -> int:
        """Cached pages that no span uses: any of them can go."""
        return len(self._unused)

    @property
    def oldest_use(self) -> int | None:
        """When the last use of the page was that `evict` would take."""
        return next(iter(self._unused.values()), None)

    def groups_of(self, index: int) -> range:
        """The groups that touch page `index` of a span; the page is complete when the last one is written."""
        size, group = self.page_bytes, self.kv.group_bytes
        return range(index * size // group, -(-(index + 1) * size // group))

    def match(self, chain: Sequence[bytes]) -> Match:
        """The longest cached part of a text."""
        size, group = self.page_bytes, self.kv.group_bytes
        groups = 0
        for digest in chain:
            first, last = groups * group // size, ((groups + 1) * group - 1) // size
            if any((digest, index) not in self._pages for index in range(first, last + 1)):
                break
            groups += 1
        whole, rest = divmod(groups * group, size)
        shared = tuple([self._pages[chain[self.groups_of(index)[-1]], index] for index in range(whole)])
        return Match(groups, shared, self._pages[chain[groups - 1], whole] if rest else -1, rest)

    def locate(self, digest: bytes, index: int) -> tuple[int, int] | None:
        """The page known under this, and a number that is another one when the page was evicted and cached again."""
        page = self._pages.get((digest, index))
        return None if page is None else (page, self._entries[page])

    def add(self, page: int, index: int, chain: Sequence[bytes]) -> tuple[bool, list[int]]:
        """Cache page `index` of a span whose written text is `chain`, used by that span; again when more is written. It
        takes the place of pages that know less of the same text; the second result are those that nothing leads to now.
        False: all is cached already, or the page itself is."""
        keys = {(chain[group], index) for group in self.groups_of(index) if group < len(chain)}
        if all(key in self._pages for key in keys):
            return False, []
        gone = []
        for key in keys:
            before = self._pages.get(key, page)
            if before != page:
                self._keys[before].discard(key)
                if not self._keys[before] and not self.uses[before]:
                    self._remove(before)
                    gone.append(before)
            self._pages[key] = page
        self._keys.setdefault(page, set()).update(keys)
        if page not in self._entries:
            self._added += 1
            self._entries[page] = self._added
        return self.uses.setdefault(page, 0) == 0, gone

    def hold(self, page: int) -> None:
        """One more span uses a cached page."""
        self.uses[page] += 1
        self._unused.pop(page, None)

    def drop(self, page: int) -> bool:
        """One span less uses it. False: nobody does and nothing leads to it, it is cached no more."""
        self.uses[page] -= 1
        if self.uses[page]:
            return True
        self._unused[page] = next(self._clock)
        if not self._keys[page]:
            self._remove(page)
        return page in self.uses

    def refresh(self, page: int) -> None:
        """A page that may be unused goes last."""
        if self._unused.pop(page, None) is not None:
            self._unused[page] = next(self._clock)

    def evict(self) -> int:
        """Take the page whose last use is longest ago out of the cache; at least one must be unused."""
        page = next(iter(self._unused))
        self._remove(page)
        return page

    def take(self, page: int) -> int:
        """Take a page that one span uses out of the cache."""
        if self.uses[page] != 1:
            raise InvariantBroken(f"KV pool: cached page {page} was to be had by one of {self.uses[page]} users")
        if self.drop(page):
            self._remove(page)
        return page

    def _remove(self, page: int) -> None:
        for key in self._keys.pop(page):
            del self._pages[key]
        del self.uses[page], self._unused[page], self._entries[page]
