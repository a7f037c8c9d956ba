"""Groups of keys and values in files of one folder: a budget of bytes, the oldest use goes first, kept over restarts.

A file is named by the group's digest, holds a header and the bytes, and is renamed into place when it is written. It is
never forced to the disk: what a crash leaves half is found by its checksum, and is a miss like what is short or gone.
Where the disk is full or fails, the tier is off from then on, says why, and serving goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xllm.runtime.config import TierFigures
from xllm.runtime.errors import RuntimeFault
from xllm.runtime.host_tier import checksum

log = logging.getLogger("xllm.runtime")

MAX_FILES = 1 << 16  # what a start lists in a second
_MAGIC = b"xllm kv 1\0\0\0\0\0\0\0"
_HEADER_BYTES = len(_MAGIC) + 16 + 32  # the digest that names the text, the checksum of the bytes
_BLOCK_BYTES = 4096
_SUFFIX, _UNFINISHED = ".kv", ".part"


class DiskTier:
    """`put` and `get` are for one thread; the index may be asked and refreshed from any. `identity` (hex) says whose
    state this is: everything is in the folder's subfolder of that name, what lies beside it is left alone.

    Raises RuntimeFault (invalid_config) for a folder that cannot be used: not ours, not writable, or another server's
    that runs.
    """

    name = "disk"

    def __init__(self, folder: str | os.PathLike[str], size: int, group_bytes: int, identity: str):
        self._size = _HEADER_BYTES + group_bytes
        self._limit = min(size // _on_disk(self._size), MAX_FILES)
        if self._limit < 1:
            raise RuntimeFault("invalid_config", f"a disk cache of {size} bytes holds no file of {self._size}")
        self._folder = Path(folder) / f"kv-{identity}"
        self._held: OrderedDict[bytes, None] = OrderedDict()  # oldest first
        self._lock = threading.Lock()
        self._figures = TierFigures("disk", group_bytes, self._limit * _on_disk(self._size))
        try:
            self._lock_file = _claim(Path(folder), self._folder)
            self._rebuild()
        except OSError as error:
            raise RuntimeFault("invalid_config", f"the disk cache {folder} can't be used: {error.strerror}") from None

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def lacks(self, key: bytes) -> bool:
        """Would it take this group?"""
        return not self._figures.off and key not in self._held

    def refresh(self, keys: Sequence[bytes]) -> None:
        """These are in use; the first of them stay longest."""
        with self._lock:
            for key in reversed(keys):
                if key in self._held:
                    self._held.move_to_end(key)

    def put(self, key: bytes, data: memoryview) -> None:
        """Keep a copy of a group."""
        if not self.lacks(key):
            return
        try:
            if len(self._held) >= self._limit:
                self._evict()
            self._write(key, data)
        except OSError as error:
            self._turn_off(error)
            return
        with self._lock:
            self._held[key] = None
            self._count(stored=1)

    def get(self, key: bytes) -> memoryview | None:
        """The bytes of a group, as they were put."""
        if self._figures.off or key not in self._held:
            return None
        try:
            data = self._read(key)
            if data is None:
                with contextlib.suppress(FileNotFoundError):
                    self._file(key).unlink()
        except OSError as error:
            self._turn_off(error)
            return None
        with self._lock:
            if data is None:
                del self._held[key]
            else:
                self._held.move_to_end(key)
            self._count(loaded=data is not None, corrupt=data is None)
        return data

    def figures(self) -> TierFigures:
        return replace(self._figures, held_bytes=len(self._held) * _on_disk(self._size))

    def close(self) -> None:
        """Another server may use the folder; the files stay. Calling it again does nothing."""
        if self._lock_file >= 0:
            os.close(self._lock_file)
        self._lock_file = -1

    def _rebuild(self) -> None:
        """List what is there, by its last use; what was left unfinished goes."""
        found: list[tuple[int, bytes]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                state = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
                    continue
                if entry.name.endswith(_UNFINISHED):
                    os.unlink(entry.path)
                elif re.fullmatch(r"[0-9a-f]{32}\.kv", entry.name):
                    found.append((state.st_mtime_ns, bytes.fromhex(entry.name.removesuffix(_SUFFIX))))
        self._held.update(dict.fromkeys([key for _, key in sorted(found)]))
        while len(self._held) > self._limit:
            self._evict()

    def _evict(self) -> None:
        with self._lock:
            key, _ = self._held.popitem(last=False)
            self._count(evictions=1)
        with contextlib.suppress(FileNotFoundError):
            self._file(key).unlink()

    def _write(self, key: bytes, data: memoryview) -> None:
        file = self._file(key)
        part = file.with_suffix(_UNFINISHED)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            left = [memoryview(_MAGIC + key + checksum(key, data)), data]
            while left:
                done = os.writev(fd, left)
                while left and done >= left[0].nbytes:
                    done -= left.pop(0).nbytes
                if left:
                    left[0] = left[0][done:]
            os.rename(part, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        finally:
            os.close(fd)

    def _read(self, key: bytes) -> memoryview | None:
        """None for a file that is not what was written."""
        try:
            fd = os.open(self._file(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None
            raise
        try:
            state = os.fstat(fd)
            if state.st_uid != os.geteuid() or not stat.S_ISREG(state.st_mode) or state.st_size != self._size:
                return None
            held = bytearray(self._size)
            if os.readv(fd, [held]) != self._size:
                return None
            os.utime(fd)  # the order of use, for the next start
        finally:
            os.close(fd)
        data = memoryview(held)[_HEADER_BYTES:]
        return data if held[:_HEADER_BYTES] == _MAGIC + key + checksum(key, data) else None

    def _file(self, key: bytes) -> Path:
        return self._folder / (key.hex() + _SUFFIX)

    def _turn_off(self, error: OSError) -> None:
        reason = errno.errorcode.get(error.errno or 0, "error")
        log.warning("the disk cache is off until the next start: %s (%s)", error.strerror, reason)
        with self._lock:
            self._held.clear()
            self._figures = replace(self._figures, off=reason)

    def _count(self, **more: int) -> None:
        self._figures = self._figures.plus(**more)


def _claim(folder: Path, own: Path) -> int:
    """Make the folders, ours alone; returns the locked file that keeps other servers out. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own.mkdir(mode=0o700, exist_ok=True)
    for made in (folder, own):
        state = made.stat(follow_symlinks=made is not own)
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise OSError(errno.EPERM, "it must be a folder that belongs to this user and that only they can write to")
    os.chmod(own, 0o700)
    fd = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise OSError(errno.EBUSY, "another server uses it: give each a folder of its own") from None
    return fd


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
