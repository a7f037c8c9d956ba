"""One copy of equal weights for many artifacts: their weight files are hard links to one in a common folder, named by
its digest. Each artifact stays whole on its own; bytes on disk and in the page cache are shared."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

from xllm.artifact.seal import ArtifactError, digest
from xllm.artifact.store import Place
from xllm.artifact.weights import WEIGHTS, MappedWeights, regions
from xllm.artifact.writer import Written


def share(root: Path, written: Written, folder: str | os.PathLike[str]) -> Path:
    """Puts the weight file of the artifact at `root` into `folder`, or the equal one from there into the artifact.

    Returns the shared file. Raises ArtifactError when the one in the folder is not what its name says, and when the
    folder cannot be linked from here.
    """
    held = Path(folder)
    held.mkdir(parents=True, exist_ok=True)
    own = root / WEIGHTS
    size = own.stat().st_size
    parts = "".join(claimed for *_, claimed in regions(written.plan, written.header, size))
    shared = held / f"{digest(parts.encode())}.safetensors"
    try:
        own.chmod(0o644)
        with suppress(FileExistsError):  # another compile may put the equal one there at this moment
            os.link(own, shared)
            return shared
        _verify(shared, written, size)
        aside = own.with_name(f".{secrets.token_hex(4)}")
        os.link(shared, aside)
        aside.replace(own)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        raise ArtifactError(
            "cannot-share", f"{held} cannot share files with the artifact ({error.strerror}); choose a folder beside it"
        ) from error
    return shared


def check_apart(out: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Raises ArtifactError for a common folder that is the artifact, or in it: replacing one would take the other."""
    root, held = Path(os.path.realpath(out)), Path(os.path.realpath(folder))
    if root in (held, *held.parents):
        raise ArtifactError("cannot-share", f"--share-weights {folder} is in the artifact {out}; choose one beside it")


def _verify(shared: Path, written: Written, size: int) -> None:
    if shared.is_symlink() or shared.stat().st_size != size:
        raise _changed(shared)
    mapped = MappedWeights(Place(shared, 0, size))
    for _, start, stop, claimed in regions(written.plan, written.header, size):
        if digest(mapped.bytes[start:stop]) != claimed:
            raise _changed(shared)
        mapped.release(start, stop)


def _changed(shared: Path) -> ArtifactError:
    return ArtifactError("artifact-changed", f"the shared file {shared} is not what was put there; remove it")
