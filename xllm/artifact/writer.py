"""Writing an artifact: built aside, streamed, put in its place at the end, the same bytes and modes whoever builds."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from xllm.artifact.manifest import SCHEMA
from xllm.artifact.opened import Progress
from xllm.artifact.reuse import Previous
from xllm.artifact.seal import ArtifactError, digest, sealed, spelled
from xllm.artifact.weights import WEIGHTS, layout
from xllm.plan import Plan, StoredWeight

Blocks = Iterable[np.ndarray]  # uint8, one behind the other; each is used up before the next is asked for
_THREADS = 4  # more cores than that wait for memory


@dataclass(frozen=True)
class Written:
    """What became of the weights: the plan with places and digests, the header's digest, the origin of each, and the
    keys of those taken from an earlier artifact."""

    plan: Plan
    header: str
    origins: Mapping[str, str] = field(default_factory=dict)
    reused: tuple[str, ...] = ()


class ArtifactWriter:
    """Builds an artifact aside. Use through `writing`, which renames it into place when the block ends well."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[str, str] = {}

    def write(self, name: str, data: bytes | str) -> None:
        """A file at `name`, a relative path, covered by the manifest."""
        raw = data.encode() if isinstance(data, str) else data
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with _named(file):
            file.write_bytes(raw)
        self._files[name] = digest(raw)

    def write_weights(
        self,
        plan: Plan,
        make: Callable[[StoredWeight], Blocks],
        progress: Progress | None = None,
        origin: Callable[[StoredWeight], str] | None = None,
        previous: Previous | None = None,
    ) -> Written:
        """Streams every weight to its aligned place, a block of each thread in memory at a time.

        `make` gives a weight's bytes in blocks, `origin` a digest of all it is made from; both are called from several
        threads. A weight of the same origin in `previous` is taken, if its bytes are still what they were. Raises
        ValueError for a weight of another size, and for a plan that `Plan.check` refuses.
        """
        placed, header = layout(plan)
        total = max((weight.offset + weight.bytes for weight in placed.values()), default=len(header))
        ends = dict(zip(placed, [*(weight.offset for weight in placed.values()), total][1:], strict=True))
        file = self.root / WEIGHTS
        file.parent.mkdir(parents=True, exist_ok=True)
        sealed_: dict[str, StoredWeight] = {}
        origins: dict[str, str] = {}
        reused: list[str] = []
        done = 0

        def stream(key: str) -> tuple[str, bool]:
            weight, gap = placed[key], ends[key] - placed[key].offset - placed[key].bytes
            if origin is not None:
                origins[key] = origin(weight)
                old = previous.find(origins[key], weight) if previous is not None else None
                if old is not None:
                    found = _put_blocks(out, key, weight, old.blocks(), gap)
                    if old.intact(found, gap):
                        return found, True
            return _put_blocks(out, key, weight, make(weight), gap), False

        with _named(file), file.open("wb") as sink, ThreadPoolExecutor(_threads()) as pool:
            out = sink.fileno()
            os.truncate(out, total)  # gaps are zero, and a limit on sizes is met before the work
            os.pwrite(out, header, 0)
            largest_first = sorted(placed, key=lambda key: -placed[key].bytes)
            pending = {key: pool.submit(stream, key) for key in largest_first}
            try:
                for key, future in pending.items():
                    found, taken = future.result()
                    sealed_[key] = replace(placed[key], digest=found)
                    reused += [key] if taken else []
                    done += placed[key].bytes
                    if progress is not None:
                        progress(key, done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        plan = replace(plan, weights={key: sealed_[key] for key in placed})
        plan.check()
        return Written(plan, digest(header), origins, tuple(sorted(reused)))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, with the digests of all files and its own."""
        body = sealed({"schema": SCHEMA, **manifest, "files": self._files})
        (self.root / "manifest.json").write_bytes(spelled(body))


def _put_blocks(out: int, key: str, weight: StoredWeight, blocks: Blocks, gap: int) -> str:
    """Writes a weight at its place; the digest of it and of the `gap` zeros behind it."""
    hasher, at = blake3(), weight.offset
    for block in blocks:
        if block.dtype != np.uint8 or block.ndim != 1 or at + len(block) > weight.offset + weight.bytes:
            raise ValueError(f"weight {key} has {block.shape} {block.dtype}, planned are {weight.bytes} bytes")
        hasher.update(block.data)
        view = block.data
        while view:  # a system call writes at most 2 GiB
            count = os.pwrite(out, view, at)
            view, at = view[count:], at + count
    if at != weight.offset + weight.bytes:
        raise ValueError(f"weight {key} has {at - weight.offset} bytes, planned are {weight.bytes}")
    return hasher.update(b"\0" * gap).hexdigest()


def _threads() -> int:
    return min(_THREADS, len(os.sched_getaffinity(0)))


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[ArtifactWriter]:
    """An artifact is there whole or not at all: built beside `path`, renamed over it at the end, removed on any error.

    A link at `path` stays: what it points to is written. What a killed build left beside it goes when the next one
    starts. Raises ArtifactError when `path` exists and is not an artifact folder.
    """
    root = Path(os.path.realpath(path))
    if root.exists() and not (root / "manifest.json").is_file() and (not root.is_dir() or any(root.iterdir())):
        raise ArtifactError("not-an-artifact", f"{path} exists and is not an artifact; choose another -o or remove it")
    root.parent.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    aside = root.parent / f".{root.name}.partial-{secrets.token_hex(4)}"
    aside.mkdir()
    lock = _locked(aside)
    try:
        yield ArtifactWriter(aside)
        _open_modes(aside)
        _put(aside, root)
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _open_modes(root: Path) -> None:
    """Modes that do not depend on who builds: everyone reads, the owner writes. A shared file may be another's, who has
    set its mode."""
    for entry in (root, *root.rglob("*")):
        wanted = 0o755 if entry.is_dir() else 0o644
        if stat.S_IMODE(entry.stat().st_mode) != wanted:
            entry.chmod(wanted)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """An OSError says which file: of a full disk, a write does not."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def _put(aside: Path, root: Path) -> None:
    """Renames `aside` to `root`; what stood there is back if that fails."""
    old = Path(f"{aside}.old")
    if root.exists():
        root.rename(old)
    try:
        aside.rename(root)
    except BaseException:  # Ctrl-C too: between the two renames there is nothing under the name
        if old.exists() and not root.exists():
            old.rename(root)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes what builds of `root` left behind: their lock went with their process. An artifact that one had put
    away, and was killed before it put its own in the place, returns.
    """
    for left in sorted(root.parent.glob(f".{glob.escape(root.name)}.partial-*")):
        lock = _locked(left)
        if lock is not None:
            if left.suffix == ".old" and not root.exists() and not left.with_suffix("").exists():
                left.rename(root)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """An exclusive lock on a folder, held until the descriptor or the process goes; None if another has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
