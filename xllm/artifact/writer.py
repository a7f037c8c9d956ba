"""Writing an artifact: built aside, streamed, put in its place at the end, the same bytes and modes whoever builds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from xllm.artifact.aside import built, named
from xllm.artifact.manifest import SCHEMA
from xllm.artifact.opened import Progress
from xllm.artifact.reuse import Previous
from xllm.artifact.seal import Checksums, digest, sealed, spelled
from xllm.artifact.store import Place
from xllm.artifact.weights import WEIGHTS, MappedWeights, layout
from xllm.plan import Plan, StoredWeight

Blocks = Iterable[np.ndarray]  # uint8, one behind the other; each is used up before the next is asked for
_THREADS = 4  # more cores than that wait for memory


@dataclass(frozen=True)
class Written:
    """What became of the weights: the plan with places and digests, the header's digest, the whole file's checksum, the
    origin of each, and the keys of those taken from an earlier artifact."""

    plan: Plan
    header: str
    checksum: str
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
        with named(file):
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
            mapped.enlarge(placed[key].offset, ends[key])
            found, taken = put(key)
            sums.take(placed[key].offset, ends[key])  # while the system still holds what was written
            return found, taken

        def put(key: str) -> tuple[str, bool]:
            weight, gap = placed[key], ends[key] - placed[key].offset - placed[key].bytes
            if origin is not None:
                origins[key] = origin(weight)
                old = previous.find(origins[key], weight) if previous is not None else None
                if old is not None:
                    found = _put_blocks(out, key, weight, old.blocks(), gap)
                    if old.intact(found, gap):
                        return found, True
            return _put_blocks(out, key, weight, make(weight), gap), False

        with named(file), file.open("wb") as sink, ThreadPoolExecutor(_threads()) as pool:
            out = sink.fileno()
            os.truncate(out, total)  # gaps are zero, and a limit on sizes is met before the work
            os.pwrite(out, header, 0)
            mapped = MappedWeights(Place(file, 0, total))
            sums = Checksums(mapped.bytes, mapped.release)
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
        return Written(plan, digest(header), sums.name(_threads()), origins, tuple(sorted(reused)))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, with the digests of all files and its own."""
        body = sealed({"schema": SCHEMA, **manifest, "files": self._files})
        file = self.root / "manifest.json"
        with named(file):
            file.write_bytes(spelled(body))


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
    """An artifact is there whole or not at all, see `built`. Raises ArtifactError when `path` exists and is not an
    artifact folder, or holds what is no part of it."""
    with built(path, folder=True) as aside:
        yield ArtifactWriter(aside)
