"""Decides how what is kept for clients lies on disk: below one folder that one server has, of each key its own, under
names that are ours. A file is there once its facts are; what a crash left half done is swept up by the next start."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from xllm import typed
from xllm.service.errors import ApiError, Hint

MAX_FILE_BYTES = 128 << 20
STORAGE_FAILED = "storage_failed"
MAX_FILES = 1000  # of one key
MAX_KEPT_BYTES = 2 << 30  # of one key; what batches write on top is as long as their answers

log = logging.getLogger("xllm.files")
Result = TypeVar("Result")


class FileInfo(msgspec.Struct, frozen=True):
    """What is told of a file. bytes: its length; created_at: seconds since 1970; filename: as the client calls it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def body(self) -> dict[str, Any]:
        return msgspec.to_builtins(self) | {"object": "file", "status": "processed"}


class Files:
    """The files of all keys. Belongs to the event loop, but for what `do` runs: one thread has the disk."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, or ValueError when another server has the folder."""
        self.folder = folder
        self._files = folder / "files"
        self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(f"another server keeps its files in {folder}: give each its own --state-dir") from None
        self._io = ThreadPoolExecutor(1, thread_name_prefix="xllm-files")
        self._known: dict[str, dict[str, FileInfo]] = {}
        for owner in self._files.iterdir():
            found = [info for file in owner.glob("*.json") if (info := read_record(file, FileInfo)) is not None]
            self._known[owner.name] = {
                info.id: info for info in sorted(found, key=lambda info: (info.created_at, info.id))
            }

    def close(self) -> None:
        """Waits for what is being written, and lets another server have the folder."""
        self._io.shutdown()
        os.close(self._lock)

    def sweep(self, planned: Collection[str]) -> None:
        """Removes what has no facts, but for the files that batches are still writing."""
        for file in self._files.rglob("file-*"):
            data = file.suffix == ".data" and (file.stem in planned or file.with_suffix(".json").exists())
            if not data and file.suffix != ".json":
                file.unlink()

    async def do(self, work: Callable[..., Result], *given: Any) -> Result:
        """Runs what touches the disk. Raises ApiError 500 when that fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._io, work, *given)
        except OSError as error:
            log.error("the state folder can't be used: %s", error)
            text = f"the server can't keep or read its files: {error.strerror}"
            raise ApiError(500, STORAGE_FAILED, text) from None

    def after(self, work: Callable[[], None]) -> None:
        """Runs it once the disk has done what it was asked for, and waits for nothing."""
        self._io.submit(work)

    def of(self, tenant: str) -> Mapping[str, FileInfo]:
        """The files of a key, oldest first."""
        return self._known.get(owner_name(tenant), {})

    def find(self, tenant: str, name: str, param: str | None = None) -> FileInfo:
        """Raises ApiError 404 for what is not there, or is another's."""
        if (info := self.of(tenant).get(name)) is None:
            raise ApiError(404, "file_not_found", "there is no such file of this key", param)
        return info

    def path(self, tenant: str, name: str) -> Path:
        """Where the data of a file is, or goes: `name` is one of ours."""
        return self._files / owner_name(tenant) / f"{name}.data"

    def check_room(self, tenant: str) -> None:
        """Raises ApiError 413 when a key has as much as it may."""
        held = self.of(tenant)
        if len(held) < MAX_FILES and sum(info.bytes for info in held.values()) < MAX_KEPT_BYTES:
            return
        hint = Hint(f"at most {MAX_FILES} files and {MAX_KEPT_BYTES >> 30} GiB of one key", "DELETE /v1/files/ID",
                    "delete files that are no longer needed")  # fmt: skip
        raise ApiError(413, "no_room", "this key keeps as much as it may", hint=hint)

    async def new(self, tenant: str) -> Path:
        """Where to write the data of a new file, until `keep`."""
        path = self.path(tenant, new_id("file-")).with_suffix(".part")
        await self.do(lambda: path.parent.mkdir(mode=0o700, exist_ok=True))
        return path

    async def keep(self, tenant: str, part: Path, filename: str, purpose: str) -> FileInfo:
        """Makes a file of what `new` gave a place to, which is whole now."""
        data = part.with_suffix(".data")
        await self.do(replace_synced, part, data)
        try:
            return await self.adopt(tenant, part.stem, filename, purpose)
        except ApiError:
            await self.do(lambda: data.unlink(missing_ok=True))
            raise

    async def adopt(self, tenant: str, name: str, filename: str, purpose: str) -> FileInfo:
        """Makes a file of data that is in its place already, and synced."""
        path = self.path(tenant, name)
        size = await self.do(lambda: path.stat().st_size)
        info = FileInfo(name, size, int(time.time()), filename, purpose)
        await self.do(write_record, path.with_suffix(".json"), info)
        self._known.setdefault(owner_name(tenant), {})[name] = info
        return info

    async def remove(self, tenant: str, name: str) -> None:
        """Raises ApiError 404."""
        self.find(tenant, name)
        self._known[owner_name(tenant)].pop(name)
        path = self.path(tenant, name)
        await self.do(lambda: [file.unlink(missing_ok=True) for file in (path.with_suffix(".json"), path)])


def owner_name(tenant: str) -> str:
    """The folder of a key: its digest, or `open` where the server needs none."""
    return tenant or "open"


def new_id(prefix: str) -> str:
    """In the order of time, for those of one process or of clocks that agree."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


def read_record(file: Path, kind: type[Result]) -> Result | None:
    """What `write_record` wrote; None, and a line in the log, for what is something else."""
    try:
        return typed.decode(file.read_bytes(), kind)
    except (OSError, msgspec.DecodeError) as error:
        log.error("%s is left out: %s", file, error)
        return None


def write_record(file: Path, record: Any) -> None:
    """All of it or nothing, also when the power goes."""
    part = file.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(record))
    replace_synced(part, file)


def replace_synced(part: Path, file: Path) -> None:
    """Gives a whole file its name."""
    for path, then in ((part, lambda: os.replace(part, file)), (file.parent, lambda: None)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        then()
