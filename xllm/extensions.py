"""Passes and kernels of others: one Python file each, named on the command line, read once, hashed, and run as read.

An artifact records which files made it and never makes one run: who executes names the file again, and another digest
is refused. No bytecode is written beside the file, and none found there is trusted.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "xllm.extensions."


class ExtensionError(Exception):
    """A module that cannot be used: the message names it, says why, and what to try."""


@dataclass(frozen=True)
class Source:
    """A file as it was read: its name (without .py), sha256 of its bytes, its text. Nothing of it has run."""

    name: str
    digest: str
    text: str
    file: Path


@dataclass(frozen=True)
class Extension:
    """A file that has run, and the module it made."""

    name: str
    digest: str
    module: ModuleType


class _Held(importlib.abc.InspectLoader):
    """Runs the text it was given: what was hashed is what runs."""

    def __init__(self, source: str, file: Path) -> None:
        self._source, self._file = source, file

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_filename(self, fullname: str) -> str:
        return str(self._file)


def read(names: Iterable[str]) -> dict[str, Source]:
    """Each module by its name: `names` are paths to .py files, or names found from the current folder, then, without a
    dot, among what is installed. Raises ExtensionError when there is no such file, or when two have one name.
    """
    found: dict[str, Source] = {}
    for name in names:
        file = _find(name)
        raw = file.read_bytes()
        if not file.stem.isidentifier():
            raise ExtensionError(f"{name}: {file.stem!r} is no name for a module; rename the file")
        try:
            source = Source(file.stem, hashlib.sha256(raw).hexdigest(), raw.decode(), file)
        except UnicodeDecodeError as error:
            raise ExtensionError(f"{name} is not UTF-8 text") from error
        if found.setdefault(source.name, source).digest != source.digest:
            raise ExtensionError(f"two modules are called {source.name}; rename one")
    return found


def run(source: Source) -> Extension:
    """The module a file makes. Raises ExtensionError when running it fails."""
    file = source.file
    spec = importlib.util.spec_from_loader(PREFIX + source.name, _Held(source.text, file), origin=str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ExtensionError(f"{file} failed as it was loaded: {type(error).__name__}: {error}") from error
    return Extension(source.name, source.digest, module)


def load(names: Iterable[str]) -> tuple[Extension, ...]:
    """Reads and runs every module once, in the order named. Raises ExtensionError, see `read` and `run`."""
    return tuple(run(source) for source in read(names).values())


def owner_of(kind: type) -> str:
    """Name of the extension a class comes from; empty for our own."""
    return kind.__module__.removeprefix(PREFIX) if kind.__module__.startswith(PREFIX) else ""


def table(extension: Extension, name: str) -> Mapping[str, Callable[..., Any]]:
    """A table of functions the module must define (RULES, KERNELS). Raises ExtensionError when it does not."""
    held = getattr(extension.module, name, None)
    if not isinstance(held, dict) or not all(isinstance(key, str) and callable(held[key]) for key in held):
        raise ExtensionError(f"{extension.name} has no table {name} of names to functions; see CONTRIBUTING.md")
    return held


def _find(name: str) -> Path:
    if name.endswith(".py") or "/" in name:
        file = Path(name)
    else:
        file = Path(*name.split(".")).with_suffix(".py")
        if not file.is_file():
            if "." in name:  # to look for it would run the packages it lies in, before any digest is compared
                raise ExtensionError(f"there is no file {file} here; of a module in a package, give the path")
            try:
                spec = importlib.util.find_spec(name)
            except (ImportError, ValueError):
                spec = None
            file = Path(spec.origin) if spec is not None and spec.origin else file
    if not file.is_file() or file.suffix != ".py":
        raise ExtensionError(f"there is no module {name}: {file} is no Python file; name one, or give its path")
    return file
