"""What moves between the pool and slower memory, and when: groups of tokens are copied out as they are computed, and
loaded back into pages of the prefix cache before a sequence that needs them starts. One background thread does both,
loads first, one page at a time. Whatever goes wrong on the way is a miss: the tokens are computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm.runtime.config import LoadCost, TierConfig, TierFigures
from xllm.runtime.disk_tier import DiskTier
from xllm.runtime.errors import MemoryFault
from xllm.runtime.host_tier import HostTier
from xllm.runtime.tiered import TieredPool

log = logging.getLogger("xllm.runtime")

MAX_WAITING = 4096  # groups to be copied out; more are not kept
STUCK_SECONDS = 10.0  # a load or a copy that takes longer: a disk that hangs, which nobody waits for any more


@dataclass
class Load:
    """The beginning of a text on its way into the pool. `wanted` says whether somebody still waits for it."""

    chain: Sequence[bytes]
    wanted: Callable[[], bool]
    done: bool = False


class Tiers:
    """Of one pool. `keep`, `refresh`, `has` and `load` are for the engine's thread. `changed` is called, on
    the background thread, when a load has ended. Without `start`, `work` does what that thread would."""

    def __init__(
        self, pool: TieredPool, stores: Sequence[HostTier | DiskTier], cost: LoadCost, changed: Callable[[], None]
    ):
        self._pool = pool
        self._stores = stores  # the fastest first
        self._cost = cost
        self._changed = changed
        self._group_tokens = pool.plan.kv.group_tokens
        self._buffer = memoryview(bytearray(pool.plan.kv.group_bytes))
        self._leaving: OrderedDict[bytes, int] = OrderedDict()  # digest -> number of the group in its text
        self._loads: deque[Load] = deque()
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._failed = False
        self._began: float | None = None  # what is being done
        self.loads = self.ended = self.not_stored = 0

    @property
    def stuck(self) -> bool:
        """Nothing is to be had now, nor waited for."""
        began = self._began
        return self._failed or (began is not None and time.monotonic() - began > STUCK_SECONDS)

    def keep(self, chain: Sequence[bytes], first: int) -> None:
        """Copy the groups of a text from number `first` on to where they are not yet; they are in the pool now."""
        missing = [group for group in range(first, len(chain)) if any(s.lacks(chain[group]) for s in self._stores)]
        if self._failed or not missing:
            return
        with self._work:
            for group in missing:
                if len(self._leaving) < MAX_WAITING:
                    self._leaving[chain[group]] = group
                else:
                    self.not_stored += 1
            self._work.notify()

    def refresh(self, chain: Sequence[bytes]) -> None:
        """This text was used: what is kept of it stays longer, its beginning longest."""
        for store in self._stores:
            store.refresh(chain)

    def has(self, chain: Sequence[bytes], matched: int) -> int:
        """How many groups of a text the pool can have by a load that pays, where it has `matched`; 0 for no more."""
        if self.stuck:
            return 0
        begin = known = self._first(matched)[1].start
        counts: dict[str, int] = {"host": 0, "disk": 0}
        for digest in chain[begin:]:
            store = next((store for store in self._stores if digest in store), None)
            if store is None:
                break
            counts[store.name] += self._group_tokens
            known += 1
        gained = (known - matched) * self._group_tokens
        return known if gained > 0 and self._cost.pays(gained, counts["host"], counts["disk"]) else 0

    def load(self, chain: Sequence[bytes], wanted: Callable[[], bool]) -> Load:
        """Load a text into the pool, as far as possible."""
        load = Load(chain, wanted)
        with self._work:
            if self._failed:
                load.done = True
                return load
            self._loads.append(load)
            self.loads += 1
            self._work.notify()
        return load

    def figures(self) -> tuple[TierFigures, ...]:
        return tuple([store.figures() for store in self._stores])

    def start(self) -> None:
        """Start the background thread."""
        self._thread = threading.Thread(target=self._run, name="xllm-tiers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the page it is at, and give memory back. What was not copied yet is not kept. A thread
        that is stuck is left behind, with the memory of the tiers; a pool that is closed gives it nothing, and takes
        nothing from it."""
        with self._work:
            self._closing = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join(STUCK_SECONDS)
            if self._thread.is_alive():
                log.warning("the thread of the KV tiers is stuck, its memory stays until the process ends")
                return
        for store in self._stores:
            store.close()

    def work(self) -> bool:
        """A load or a copy, whichever is next. False: there is none."""
        with self._work:
            load = self._loads.popleft() if self._loads else None
            group = self._leaving.popitem(last=False) if load is None and self._leaving else None
        self._began = time.monotonic()
        if load is not None:
            try:
                self._load(load)
            finally:
                self._end(load)
        elif group is not None:
            self._store(*group)
        self._began = None
        return load is not None or group is not None

    def _run(self) -> None:
        try:
            while True:
                with self._work:
                    self._work.wait_for(lambda: self._closing or self._loads or self._leaving)
                    if self._closing:
                        return
                self.work()
        except Exception:  # the boundary: whatever it is, nobody may wait for ever
            log.exception("the thread of the KV tiers failed: nothing is stored or loaded any more")
            with self._work:
                self._failed = True
            while self._loads:
                self._end(self._loads.popleft())

    def _end(self, load: Load) -> None:
        load.done = True
        self.ended += 1
        self._changed()

    def _store(self, digest: bytes, group: int) -> None:
        lacking = [store for store in self._stores if store.lacks(digest)]
        if lacking and not self._pool.read_group(digest, group, self._buffer):
            with self._work:
                self.not_stored += 1
            return
        for store in lacking:
            store.put(digest, self._buffer)

    def _load(self, load: Load) -> None:
        chain = load.chain
        index, _ = self._first(self._pool.refresh(chain))
        begun: tuple[bytes, memoryview] | None = None  # a page may end within a group: it is read and checked once
        while load.wanted() and not self._closing:
            self._began = time.monotonic()
            groups = self._pool.groups_of(index)
            pieces: list[tuple[int, memoryview]] = []
            known = groups.start
            for group in groups[: max(0, len(chain) - groups.start)]:
                data = begun[1] if begun and begun[0] == chain[group] else self._fetch(chain[group])
                if data is None:
                    break
                begun, known = (chain[group], data), group + 1
                offset, part = self._pool.pieces_of(index, group)
                pieces.append((offset, data[part]))
            try:
                if not pieces or not self._pool.put_page(index, chain[:known], pieces):
                    break
            except MemoryFault as error:
                log.warning("a page could not be loaded: %s", error.message)
                break
            if known < groups.stop:
                break
            index += 1
        self._pool.refresh(chain)

    def _fetch(self, digest: bytes) -> memoryview | None:
        return next((data for store in self._stores if (data := store.get(digest)) is not None), None)

    def _first(self, matched: int) -> tuple[int, range]:
        """The first page that is not whole with so many groups, and the groups in it."""
        index = matched * self._pool.plan.kv.group_bytes // self._pool.plan.page_bytes
        return index, self._pool.groups_of(index)


def open_tiers(config: TierConfig, pool: TieredPool, changed: Callable[[], None]) -> Tiers:
    """Raises RuntimeFault for tiers that cannot be made."""
    group_bytes = pool.plan.kv.group_bytes
    stores: list[HostTier | DiskTier] = []
    if config.host_bytes:
        stores.append(HostTier(config.host_bytes, group_bytes))
    if config.disk is not None:
        disk = DiskTier(config.disk, config.disk_bytes, group_bytes, config.identity)
        log.info("the disk cache %s has %.1f MiB of this model", config.disk, disk.figures().held_bytes / 2**20)
        stores.append(disk)
    return Tiers(pool, stores, config.cost, changed)
