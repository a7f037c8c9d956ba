"""How the bytes of an artifact are named: one digest, one spelling of JSON, one error for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from blake3 import blake3

DIGEST = r"^[0-9a-f]{64}$"
_SHARED_BYTES = 1 << 20  # from here on, digests are worth more than one core
_RUN_BLOCKS = 64  # read before they are released
_NO_BLOCKS = np.empty((0, 64), np.uint32)


class ArtifactError(Exception):
    """An artifact that cannot be used: `code` is stable, the message names the file or field and what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def changed(name: str) -> ArtifactError:
    return ArtifactError("artifact-changed", f"{name} is not what the compiler wrote; compile the checkpoint again")


def digest(data: Any, more: bytes = b"") -> str:
    """blake3 of bytes, and of `more` behind them, on all cores where there is enough to share."""
    return blake3(data, max_threads=blake3.AUTO if len(data) > _SHARED_BYTES else 1).update(more).hexdigest()


def checksum(data: np.ndarray, threads: int) -> str:
    """A name of uint8 bytes that tells accidents as fast as memory is read, and no malice: that is what signatures are
    for. blake3 of the native checksum of each block, and of the length."""
    return Checksums(data).name(threads)


class Checksums:
    """The checksum of uint8 bytes taken part by part, in any order and by several threads, each part once it is whole.

    Blocks that no part covers are read at the end. `release` is told of (start, stop) that were read, a run at a time.
    """

    def __init__(self, data: np.ndarray, release: Callable[[int, int], None] | None = None) -> None:
        from xllm.kernels import cpu

        self._data, self._release, self._sum, self._block = data, release, cpu.checksum, cpu.CHECKED_BYTES
        self._blocks = -(-len(data) // self._block)
        self._sums: dict[int, np.ndarray] = {}  # first block of a run -> uint32 [blocks, 64]

    def take(self, start: int, stop: int, threads: int = 1) -> None:
        """Reads the blocks that lie in bytes start to stop; where those end, so does the last block."""
        first = -(-start // self._block)
        behind = self._blocks if stop == len(self._data) else stop // self._block
        if first < behind:
            self._sums[first] = self._read(first, behind, threads)

    def name(self, threads: int = 1) -> str:
        """The checksum of all bytes."""
        at, runs = 0, []
        for first in (*sorted(self._sums), self._blocks):
            runs += [self._read(at, first, threads), self._sums.get(first, _NO_BLOCKS)]
            at = first + len(runs[-1])
        return digest(np.concatenate(runs).tobytes(), len(self._data).to_bytes(8, "little"))

    def _read(self, first: int, behind: int, threads: int) -> np.ndarray:
        found = [_NO_BLOCKS]
        # One call where nothing is released: between two, a start would wait for whoever holds the interpreter.
        run = _RUN_BLOCKS if self._release else max(behind - first, 1)
        for at in range(first, behind, run):
            start, stop = at * self._block, min(min(at + run, behind) * self._block, len(self._data))
            found.append(self._sum(self._data[start:stop], threads))
            if self._release:
                self._release(start, stop)
        return np.concatenate(found)


def spelled(value: Mapping[str, Any]) -> bytes:
    """The one way to write a JSON object down: a text that spells it otherwise was changed."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its own digest."""
    return {**body, "digest": digest(spelled(body))}


def unseal(raw: bytes, name: str) -> dict[str, Any]:
    """The object of a sealed file. Raises ArtifactError: `artifact-malformed` for no such object, `artifact-changed`
    for one whose digest or spelling is another."""
    try:
        value = json.loads(raw)
        claimed = value["digest"]
        whole = spelled(value) == raw
        kept = digest(spelled({key: item for key, item in value.items() if key != "digest"})) == claimed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = name.partition(".")[0]
        raise ArtifactError(
            "artifact-malformed", f"{name} is not a {what}: {error or 'it nests too deeply'}"
        ) from error
    if not (whole and kept):
        raise changed(name)
    return value
