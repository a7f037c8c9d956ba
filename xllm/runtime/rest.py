"""What a pool gives up between two steps: the texts it knows, the memory of its pages. No sequence may hold a slot."""

from __future__ import annotations

from xllm.runtime.errors import MemoryFault
from xllm.runtime.kv import KvPool


def forget(pool: KvPool) -> None:
    """Empty the prefix cache; its pages are free then."""
    with pool.store.lock:
        pool.spans.forget()


def give_back(pool: KvPool) -> None:
    """Leave all pages to the pools of other models until `take_back`, their memory to the system where there are none
    that are awake. Raises MemoryFault."""
    store = pool.store
    with store.planning, store.lock:
        pool.promises.resting = True
        store.filled.wait_for(lambda: not store.filling)  # or what is loaded now would be lost, and taken for known
        pool.spans.forget()
        try:
            store.rest()
        except MemoryFault:
            pool.promises.resting = False
            raise
    store.tell(pool)


def take_back(pool: KvPool) -> None:
    """Raises MemoryFault when the system has no such memory any more. Pages that other models took in the meantime come
    back as their sequences end or give way to each other."""
    store = pool.store
    with store.planning, store.lock:
        store.rouse()
        pool.promises.resting = False
