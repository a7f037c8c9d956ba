"""Whose step runs, where executors share the cores: one after the other, who waits longest next."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that goes round in the order of asking. An ordinary one may go to the same thread again and again; side by
    side, the threads of two steps would wait for each other at every operator."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
