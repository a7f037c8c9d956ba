"""Decides what a file of settings says: the flags of `xllm serve` as members of a JSON object. What is given on the
command line goes before what the file says, and that before the defaults."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from xllm.commands import UsageError

NO_SETTINGS = ("config", "run", "flags")  # names in a namespace that no file may set
MODELS = "models"
Parsers = Callable[[], argparse.ArgumentParser]


def with_file(parser: Parsers, argv: Sequence[str], file: Path) -> argparse.Namespace:
    """What these arguments of `xllm serve` and a file say together. parser: makes a parser of all commands. Raises
    UsageError, naming the file and the setting at fault."""
    given = _explicit(parser, argv)
    told = read(parser, file)
    if not told.get(MODELS) and not given.get(MODELS):
        raise UsageError(f"say what to serve: xllm serve ARTIFACT, or `{MODELS}` in {file}")
    return argparse.Namespace(**vars(parser().parse_args(["serve", "--config", str(file)])) | told | given)


def read(parser: Parsers, file: Path) -> dict[str, Any]:
    """The settings of a file, by the names of a namespace. Raises UsageError."""
    try:
        held = json.loads(file.read_bytes(), object_pairs_hook=lambda pairs: _once(file, pairs))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise UsageError(f"{file} must hold one JSON object, its members named like the flags of `xllm serve`")
    names = _defaults(parser)
    arguments, models = ["serve"], list[str]()
    for name, value in held.items():
        known = name.replace("-", "_")
        if known not in names:
            near = get_close_matches(known, names, 1)
            hint = f"; did you mean {near[0]}?" if near else "; `xllm serve --help` lists them"
            raise UsageError(f"{file}: there is no setting {name}{hint}")
        several = isinstance(names[known], list)
        if isinstance(value, list) and not several:
            raise UsageError(f"{file}: {name} is {json.dumps(value)[:64]}, it takes one value")
        if known == MODELS:
            models = _texts(file, name, value)
        elif names[known] is False and isinstance(value, bool):  # a switch: it is there or not
            arguments += [f"--{known.replace('_', '-')}"] * value
        else:
            arguments += [f"--{known.replace('_', '-')}={one}" for one in _texts(file, name, value)]
    return _explicit(parser, [*arguments, "--", *models], f"xllm serve: {file}")


def written(parser: Parsers, argv: Sequence[str]) -> str:
    """The file that says what these arguments of `xllm serve` say, a file that they name among them: what differs from
    the defaults and nothing else."""
    arguments = parser().parse_args(["serve", *argv])
    if arguments.config is not None:
        arguments = with_file(parser, ["serve", *argv], arguments.config)
    plain = vars(parser().parse_args(["serve", "--config", "-"]))
    changed = {name: value for name, value in vars(arguments).items() if value != plain[name]}
    shown = {name: _shown(value) for name, value in changed.items() if name not in NO_SETTINGS}
    return json.dumps(shown, indent=1)


def _once(file: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no setting is there twice, in either of its spellings."""
    names = [name.replace("-", "_") for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{file}: {twice} is there more than once")
    return dict(pairs)


def _texts(file: Path, name: str, value: Any) -> list[str]:
    each = value if isinstance(value, list) else [value]
    if all(isinstance(one, (str, int)) and not isinstance(one, bool) and one != "" for one in each):
        return [str(one) for one in each]
    shown = json.dumps(value)[:64]
    raise UsageError(f"{file}: {name} is {shown}, which is no text, no whole number, nor a list of these")


def _defaults(parser: Parsers) -> dict[str, Any]:
    plain = vars(parser().parse_args(["serve", "--config", "-"]))
    return {name: value for name, value in plain.items() if name not in NO_SETTINGS}


def _explicit(parser: Parsers, argv: Sequence[str], prog: str = "") -> dict[str, Any]:
    """What these arguments say themselves, without defaults."""
    whole = parser()
    flags: argparse.ArgumentParser = whole.parse_args(["serve", "--config", "-"]).flags
    flags.prog = prog or flags.prog
    flags.set_defaults(**dict.fromkeys(_defaults(parser)))
    found = vars(whole.parse_args(argv))
    return {name: value for name, value in found.items() if value not in (None, []) and name not in NO_SETTINGS}


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return str(value) if isinstance(value, Path) else value
