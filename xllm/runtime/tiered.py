"""A pool whose cached pages can be read, and added to, by one thread beside the engine's: what goes to slower memory
and what comes back. Bytes move outside the lock. What was read counts only if its pages stayed cached meanwhile; a page
that is being filled is nobody's, and whoever needs the very last page waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.runtime.kv import KvPool


class TieredPool(KvPool):
    """As KvPool; the methods it lacks are for one thread at a time."""

    def groups_of(self, index: int) -> range:
        """The groups of a text that touch page `index` of its span."""
        return self.spans.cache.groups_of(index)

    def pieces_of(self, index: int, group: int) -> tuple[int, slice]:
        """Where the part of a group that lies in page `index` begins there, and which of the group's bytes it is."""
        page_bytes, group_bytes = self.plan.page_bytes, self.plan.kv.group_bytes
        begin = max(0, index * page_bytes - group * group_bytes)
        end = min(group_bytes, (index + 1) * page_bytes - group * group_bytes)
        return max(0, group * group_bytes - index * page_bytes), slice(begin, end)

    def read_group(self, digest: bytes, group: int, into: memoryview) -> bool:
        """Copy the bytes of group number `group` of a text. False: they are not cached, or did not stay so."""
        with self._lock:
            if self._closing:
                return False
            before = self._places(digest, group)
        for index, place in before.items():
            if place is None:
                return False
            offset, part = self.pieces_of(index, group)
            self._memory.copy_out(place[0], offset, into[part])
        with self._lock:
            return not self._closing and self._places(digest, group) == before

    def put_page(self, index: int, chain: Sequence[bytes], pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Cache page `index` of a text, of which `chain` is known; `pieces` are its bytes, each behind its offset. True
        when the text is cached to there. False: all pages are in use. Raises MemoryFault; no page is lost then."""
        # Not while a step is planned, which may be about to start on the page that would go.
        with self.store.planning, self._lock:
            page = None if self.promises.resting or self._closing else self.store.spare(self)
            if page is None:
                return False
            self.store.filling += 1
        try:
            self._memory.copy_in(page, pieces)
        except BaseException:
            with self._lock:
                self._filled()
                self.store.free.append(page)
            raise
        with self._lock:
            self._filled()
            if not self._closing and self.spans.cache_page(page, index, chain):
                self.spans.cache.hold(page)
                self.spans.cache.drop(page)
            else:
                self.store.free.append(page)
            return True

    def refresh(self, chain: Sequence[bytes]) -> int:
        """Use what is cached of a text, without starting on it: it goes after everything else. The groups found."""
        with self._lock:
            match = self.spans.cache.match(chain)
            for page in (*([match.tail] if match.size else []), *reversed(match.shared)):
                self.spans.cache.refresh(page)
            return match.groups

    def _places(self, digest: bytes, group: int) -> dict[int, tuple[int, int] | None]:
        """By index: the page that has it, and since when."""
        page_bytes, group_bytes = self.plan.page_bytes, self.plan.kv.group_bytes
        first, last = group * group_bytes // page_bytes, ((group + 1) * group_bytes - 1) // page_bytes
        return {index: self.spans.cache.locate(digest, index) for index in range(first, last + 1)}

    def _filled(self) -> None:
        self.store.filling -= 1
        self.store.filled.notify_all()
