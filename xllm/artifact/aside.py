"""Building beside a place and putting the whole there at the end: what stood there stays until then, and what is not
wholly ours is never replaced. Writers of one place take turns where it counts."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xllm.artifact.opened import members
from xllm.artifact.seal import DIGEST, ArtifactError
from xllm.artifact.store import MAX_TABLE_BYTES, Folder, is_packed, read


@contextmanager
def built(path: str | os.PathLike[str], *, folder: bool) -> Iterator[Path]:
    """A new folder or file beside `path`, renamed over it when the block ends well, removed on any error.

    A link at `path` stays: what it points to is written. What a killed build left beside it goes when the next one
    starts. Raises ArtifactError when something is at `path` that is no artifact of this form, or more than one.
    """
    root = Path(os.path.realpath(path))
    check_free = _check_folder if folder else _check_file
    check_free(root, path)
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = root.parent / f".{root.name}.partial-{secrets.token_hex(4)}"
    with _turn(root.parent):
        _sweep(root)
        aside.mkdir() if folder else aside.touch()
        lock = _locked(aside)
    try:
        yield aside
        _open_modes(aside)
        with _turn(root.parent):
            check_free(root, path)
            _put(aside, root)
    finally:
        if lock is not None:
            os.close(lock)
        _remove(aside)


@contextmanager
def named(file: Path) -> Iterator[None]:
    """An OSError says which file: of a full disk, a write does not."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def _check_file(root: Path, path: str | os.PathLike[str]) -> None:
    if root.exists() and not is_packed(root):
        raise ArtifactError("not-an-artifact", f"{path} exists and is no packed artifact; choose another name")


def _check_folder(root: Path, path: str | os.PathLike[str]) -> None:
    """Nothing there, an empty folder, or an artifact and nothing else: what else is in a folder is somebody's."""
    if not root.exists():
        return
    here = Path(os.path.realpath("."))
    if root in (here, *here.parents):
        raise ArtifactError("not-an-artifact", f"{path} is the current folder or holds it; choose another -o")
    if root.is_dir() and not any(root.iterdir()):
        return
    manifest = _claims(root)
    if manifest is None:
        raise ArtifactError("not-an-artifact", f"{path} exists and is not an artifact; choose another -o or remove it")
    if extra := sorted(name for name in Folder(root).names() - members(manifest) if not name.endswith("/")):
        raise ArtifactError(
            "not-an-artifact", f"{path} holds {extra[0]}, no part of the artifact there; choose another -o or move it"
        )


def _claims(root: Path) -> dict[str, Any] | None:
    """The manifest of a folder that says it is an artifact, of any schema and sound or not."""
    try:
        manifest = json.loads(read(Folder(root), "manifest.json", MAX_TABLE_BYTES))
        digests = [manifest["digest"], *manifest["files"].values()]
        ours = type(manifest["schema"]) is int and all(re.fullmatch(DIGEST, held) for held in digests)
    except (ArtifactError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if ours else None


def _open_modes(root: Path) -> None:
    """Modes that do not depend on who builds: everyone reads, the owner writes. A shared file may be another's, who has
    set its mode."""
    for entry in (root, *root.rglob("*")):
        wanted = 0o755 if entry.is_dir() else 0o644
        if stat.S_IMODE(entry.stat().st_mode) != wanted:
            entry.chmod(wanted)


def _put(aside: Path, root: Path) -> None:
    """Renames `aside` to `root`; what stood there is back if that fails."""
    old = Path(f"{aside}.old")
    if root.is_dir():
        root.rename(old)
    try:
        aside.rename(root)
    except BaseException:  # Ctrl-C too: between the two renames there is nothing under the name
        if old.exists() and not root.exists():
            old.rename(root)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sweep(root: Path) -> None:
    """Removes what builds of `root` left behind: their lock went with their process. An artifact that one had put
    away, and was killed before it put its own in the place, returns.
    """
    for left in sorted(root.parent.glob(f".{glob.escape(root.name)}.partial-*")):
        lock = _locked(left)
        if lock is not None:
            if left.suffix == ".old" and not root.exists() and not left.with_suffix("").exists():
                left.rename(root)
            _remove(left)
            os.close(lock)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder: of two that sweep or rename at once, one would find its own work gone."""
    lock = _locked(folder, wait=True)  # where folders cannot be locked, renames still decide
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked(path: Path, wait: bool = False) -> int | None:
    """An exclusive lock on a folder or file, held until the descriptor or the process goes; None if another has it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    except BaseException:  # Ctrl-C while another has the turn
        os.close(descriptor)
        raise
    return descriptor
