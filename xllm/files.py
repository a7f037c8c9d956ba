"""Writes files that others may read at any time: whole, or not at all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0  # between two writes of what changes

log = logging.getLogger("xllm.files")


def write_whole(file: Path, content: bytes) -> None:
    """Replaces what is there; the folder is made. Raises OSError and leaves the file as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class KeptFile:
    """Keeps a file as new as SECONDS ago, in a thread of its own, and writes it once more when it is closed. what: is
    in it, in one word. content: its bytes, None as long as there is nothing to write."""

    def __init__(self, what: str, content: Callable[[], bytes | None], file: Path, seconds: float = SECONDS) -> None:
        self._what, self._content, self._file, self._seconds = what, content, file, seconds
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"xllm-{what}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _keep(self) -> None:
        while True:
            closing = self._closing.wait(self._seconds)
            if content := self._content():
                try:
                    write_whole(self._file, content)
                except OSError as error:
                    log.warning("the %s was not written to %s: %s", self._what, self._file, error.strerror)
            if closing:
                return
