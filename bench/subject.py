"""What a benchmark runs on: a checkpoint of random weights in a real shape and its artifact, made where none is given
and removed afterwards."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.checkpoints import SHAPES, write_checkpoint


@dataclass(frozen=True)
class Subject:
    checkpoint: Path
    artifact: Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="qwen3-0.6b", choices=tuple(SHAPES), help="of the checkpoint that is made")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="use this checkpoint folder instead")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="use this artifact, compiled from --checkpoint")


@contextmanager
def checkpoint(options: argparse.Namespace, console: Console) -> Iterator[tuple[Path, Path]]:
    """The checkpoint folder, and a scratch folder that goes away with the block."""
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as scratch:
        folder = options.checkpoint
        if folder is None:
            folder = Path(scratch) / options.shape
            with console.status(f"writing a random {options.shape} checkpoint"):
                write_checkpoint(folder, SHAPES[options.shape])
        yield folder, Path(scratch)


@contextmanager
def subject(options: argparse.Namespace, console: Console) -> Iterator[Subject]:
    """Checkpoint and artifact; what was not given is made for the time of the block."""
    with checkpoint(options, console) as (folder, scratch):
        artifact = options.artifact
        if artifact is None:
            artifact = scratch / f"{folder.name}.xllm"
            with console.status("compiling"):
                subprocess.run(
                    [sys.executable, "-m", "xllm.cli", "compile", folder, "-o", artifact, "--quiet"], check=True
                )
        yield Subject(folder, artifact)


@contextmanager
def story(given: Path | None) -> Iterator[Path]:
    """The artifact that is given, or the model that comes with the project, compiled for the time of the block."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as scratch:
        import xllm.embedded

        made = Path(scratch) / "xllm-story.xllm"
        folder = Path(xllm.embedded.__file__).parent / "xllm-story"
        subprocess.run([sys.executable, "-m", "xllm.cli", "compile", folder, "-o", made, "--quiet"], check=True)
        yield made
