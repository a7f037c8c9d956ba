"""Decides the commands that look: show, explain, diff, and what `compile --bisect-passes` prints. Every one imports
what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm.compiler import CompileOptions


def add(command: Callable[..., Any], dim: Callable[[str], tuple[str, int]]) -> None:
    """The flags of each; `command(name, run, help, *examples)` makes its parser, `dim` reads NAME=MAX."""
    show = command(
        "show",
        _show,
        "print the program of an artifact, or draw it",
        "xllm show qwen.xllm",
        "xllm show qwen.xllm --stage fuse-qkv --unfold",
        "xllm show qwen.xllm --dot --layer 0 | dot -Tsvg > layer.svg",
        "xllm show qwen.xllm --profile              predicted and measured times, after `xllm profile`",
        "xllm show ./Qwen3-0.6B --dot --stage captured",
        "xllm show qwen.xllm --onnx -o qwen.onnx",
        "xllm show vit.onnx --dim batch=8 --onnx -o rewritten.onnx",
    )
    show.add_argument("artifact", type=Path, metavar="ARTIFACT", help="or, to draw, a checkpoint folder or .onnx file")
    show.add_argument("--stage", metavar="NAME", help="the program after this pass (default: the last)")
    show.add_argument("--unfold", action="store_true", help="print identical layers one by one")
    show.add_argument("--dot", action="store_true", help="Graphviz text, of the plan or of a checkpoint's program")
    show.add_argument("--onnx", action="store_true", help="an ONNX file for viewers, without weights; with -o")
    show.add_argument("-o", "--output", type=Path, metavar="FILE", help="with --onnx: the file to write")
    show.add_argument(
        "--profile", nargs="?", const="", metavar="FILE", help="operators' times (default: the file beside ARTIFACT)"
    )
    show.add_argument("--dim", action="append", default=[], type=dim, metavar="NAME=MAX", help="limit of an ONNX dim")
    show.add_argument("--layer", type=int, metavar="N", help="with --dot: this layer alone")
    explain = command(
        "explain",
        _explain,
        "say what the compiler did, what it did not do and why, and where memory goes",
        "xllm explain qwen.xllm",
        "xllm explain qwen.xllm --json",
    )
    explain.add_argument("artifact", type=Path, metavar="ARTIFACT")
    explain.add_argument("--json", action="store_true", help="the same as JSON")
    diff = command(
        "diff",
        _diff,
        "compare two artifacts part by part; exit code 0 equal, 1 different, 2 error",
        "xllm diff before.xllm after.xllm",
        "xllm diff before.xllm after.xllm --stage fuse-qkv",
    )
    diff.add_argument("one", type=Path, metavar="A")
    diff.add_argument("two", type=Path, metavar="B")
    diff.add_argument("--stage", metavar="NAME", help="only the program after this pass")


def _show(arguments: argparse.Namespace) -> None:
    from xllm.commands import UsageError, needs_compiler

    if arguments.onnx != (arguments.output is not None) or (arguments.onnx and arguments.dot):
        raise UsageError("--onnx goes with -o FILE, and not with --dot")
    if arguments.layer is not None and not arguments.dot:
        raise UsageError("--layer goes with --dot")
    if arguments.unfold and (arguments.dot or arguments.onnx):
        raise UsageError("--unfold is for the text; with --dot, --layer N draws one layer")
    if arguments.profile is not None:
        if arguments.dot or arguments.onnx or arguments.unfold or arguments.stage:
            raise UsageError("--profile shows times, and goes with no other flag of show")
        _show_profile(arguments)
        return
    if not arguments.dot and not arguments.onnx:
        if arguments.artifact.suffix == ".onnx":
            raise UsageError(
                "a .onnx file is drawn, with --dot or --onnx; the text is in the artifact compiled from it"
            )
        from xllm.inspection.show import show

        print(show(arguments.artifact, arguments.stage, arguments.unfold), end="")
        return
    needs_compiler("drawing")
    from xllm.artifact import Artifact

    found: Any
    if arguments.artifact.suffix == ".onnx" or (arguments.artifact / "config.json").is_file():
        from xllm.diagnose import program_of

        found = program_of(arguments.artifact, arguments.stage, dims=dict(arguments.dim))
    elif arguments.stage is not None:
        raise UsageError("an artifact's plan can be drawn, its stages are text; give the checkpoint, or no --stage")
    else:
        found = Artifact.open(arguments.artifact)
    planned = isinstance(found, Artifact)
    if arguments.onnx:
        from xllm.inspection import onnx_graph

        model = onnx_graph.of_artifact(found) if planned else onnx_graph.of_program(found)
        arguments.output.write_bytes(model.SerializeToString(deterministic=True))
        return
    from xllm.inspection import dot

    text = dot.of_artifact(found, arguments.layer) if planned else dot.of_program(found, arguments.layer)
    print(text, end="")


def _show_profile(arguments: argparse.Namespace) -> None:
    from xllm.artifact import Artifact
    from xllm.inspection.profile import text
    from xllm.measure.record import profile_path, read_profile

    artifact = Artifact.open(arguments.artifact)
    file = Path(arguments.profile) if arguments.profile else profile_path(arguments.artifact)
    print(text(artifact, read_profile(file, artifact)), end="")


def _explain(arguments: argparse.Namespace) -> None:
    from xllm.artifact import Artifact
    from xllm.inspection import explain

    facts = explain.explain(Artifact.open(arguments.artifact))
    print(explain.sorted_facts(facts) if arguments.json else explain.text(facts), end="")


def _diff(arguments: argparse.Namespace) -> int:
    from xllm.artifact import Artifact
    from xllm.inspection import diff

    one, two = (Artifact.open(path) for path in (arguments.one, arguments.two))
    if arguments.stage is None:
        for artifact in (one, two):  # what is called equal must be what its digests say
            artifact.map_weights()
    parts = diff.compare(one, two, arguments.stage)
    print(diff.text(parts, str(arguments.one), str(arguments.two)), end="")
    return int(any(part.lines for part in parts))


def bisect(checkpoint: Path, options: CompileOptions) -> int:
    """Prints each rewrite with its relative difference, then the first that diverges; exit code 0 when none does."""
    from xllm.diagnose import bisect_passes

    found = bisect_passes(checkpoint, options, lambda name, error: print(f"  {name:<24}{error:.1e}", flush=True))
    print(found.text() if found is not None else "every pass keeps what the program computes")
    return int(found is not None)
