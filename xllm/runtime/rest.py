"""What a pool gives up between two steps: the texts it knows, the memory of its pages. No sequence may hold a slot."""

from __future__ import annotations

from xllm.runtime.kv import KvPool


def forget(pool: KvPool) -> None:
    """Empty the prefix cache; its pages are free then."""
    with pool._lock:
        _forget(pool)


def give_back(pool: KvPool) -> None:
    """Return the memory of all pages to the system, until `take_back`. Raises MemoryFault."""
    with pool._lock:
        pool._resting = True
        pool._work.wait_for(lambda: not pool._filling)  # or what is loaded right now would be lost, and taken for known
        _forget(pool)
        pool._memory.discard()


def take_back(pool: KvPool) -> None:
    """Raises MemoryFault when others have that memory now."""
    with pool._lock:
        pool._memory.reclaim()
        pool._resting = False


def _forget(pool: KvPool) -> None:
    while pool._cache.unused:
        pool._release(pool._cache.evict())
