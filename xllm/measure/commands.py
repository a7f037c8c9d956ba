"""Decides the commands that measure: profile and tune. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm.artifact import Artifact


def add(command: Callable[..., Any], positive: Callable[[str], int], count: Callable[[str], int]) -> None:
    """The flags of each; `command(name, run, help, *examples)` makes its parser."""
    profile = command(
        "profile",
        _profile,
        "measure every operator of an artifact on this machine, beside what is predicted",
        "xllm profile qwen.xllm                             decode of 1 and of 8 at 256, prefill of 512",
        "xllm profile qwen.xllm --decode 1@4096 --prefill 2048 --seconds 20",
        "xllm show qwen.xllm --profile                      the tables again",
    )
    profile.add_argument("artifact", type=Path, metavar="ARTIFACT")
    profile.add_argument(
        "--decode", action="append", default=[], type=_decode, metavar="N[@CONTEXT]",
        help="N sequences, one token each, with so many tokens in all (default 256); repeatable",
    )  # fmt: skip
    profile.add_argument(
        "--prefill", action="append", default=[], type=_prefill, metavar="N[@PAST]",
        help="N tokens of one prompt, behind so many others (default 0); repeatable",
    )  # fmt: skip
    profile.add_argument("--seconds", type=positive, default=2, metavar="N", help="for each shape (default 2)")
    profile.add_argument("--threads", type=positive, metavar="N", help="compute threads (default: the cores there are)")
    profile.add_argument("--kernel-module", action="append", default=[], metavar="NAME", help="run its kernels")
    profile.add_argument(
        "--cost-seconds", type=count, default=18, metavar="N",
        help="for the cost model that scheduling decides by, written to ARTIFACT.cost.json (default 18; 0: none)",
    )  # fmt: skip
    profile.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: ARTIFACT.profile.json")
    tune = command(
        "tune",
        _tune,
        "measure, in seconds, the figures that times are predicted from",
        "xllm tune                                          into XLLM_CACHE, by CPU model and threads",
        "xllm tune --threads 1 -o one.json",
        "xllm compile ./Qwen3-0.6B -o qwen.xllm --tuning cached",
    )
    tune.add_argument("--threads", type=positive, metavar="N", help="compute threads (default: the cores there are)")
    tune.add_argument("--level", default="", metavar="LEVEL", help="instruction set level (default: the fastest)")
    tune.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table there")


def _shape(text: str, decode: bool) -> Any:
    match = re.fullmatch(r"([1-9]\d{0,6})(?:@(\d{1,7}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N@{'CONTEXT' if decode else 'PAST'}")
    from xllm.measure.shape import Shape

    return Shape(decode, int(match[1]), int(match[2] or (256 if decode else 0)))


def _decode(text: str) -> Any:
    return _shape(text, True)


def _prefill(text: str) -> Any:
    return _shape(text, False)


def _profile(arguments: argparse.Namespace) -> None:
    from xllm.artifact import Artifact
    from xllm.inspection.profile import text
    from xllm.measure.profile import profile
    from xllm.measure.record import profile_path

    artifact = Artifact.open(arguments.artifact)
    _say_if_busy()
    shapes = [*arguments.decode, *arguments.prefill]
    found = profile(
        artifact, shapes, threads=arguments.threads, seconds=arguments.seconds,
        kernel_modules=tuple(arguments.kernel_module), tell=_tell,
    )  # fmt: skip
    file = arguments.output or profile_path(arguments.artifact)
    file.write_bytes(found.to_json())
    print(text(artifact, found), end="")
    print(f"wrote {file}")
    if arguments.cost_seconds and artifact.task == "generate":
        _fit(artifact, arguments)


def _fit(artifact: Artifact, arguments: argparse.Namespace) -> None:
    from xllm.files import write_whole
    from xllm.measure.fit import fit_artifact
    from xllm.targets.fitted import cost_path

    modules = tuple(arguments.kernel_module)
    fitted = fit_artifact(artifact, arguments.threads, arguments.cost_seconds, _tell, modules)
    exact, file = fitted.fidelity, cost_path(arguments.artifact)
    write_whole(file, fitted.to_json())
    print(
        f"cost model of {exact.fitted} steps of up to {fitted.largest} tokens: of {exact.held_out} steps held out it is"
        f" off by {exact.median_error:.1%} (median) and {exact.p90_error:.1%} (90 of 100);"
        f" runs of one step spread by {exact.spread:.1%}\nwrote {file}"
    )


def _tune(arguments: argparse.Namespace) -> None:
    from xllm.files import write_whole
    from xllm.measure.tables import table_path
    from xllm.measure.tune import tune

    _say_if_busy()
    table = tune(arguments.threads, _tell, arguments.level)
    file = arguments.output or table_path(table.cpu, table.threads)
    write_whole(file, table.to_json())
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in table.cache_bytes.items())
    print(
        f"{table.cpu}, {table.level}, {table.threads} threads: reads {table.read_bytes_per_second / 1e9:.1f} GB/s,"
        f" multiplies {table.flops_per_second / 1e9:.0f} GFLOP/s; {caches or 'caches unknown'}"
    )
    for name, curve in table.kernels.items():
        few, (at, each) = curve.points[0], curve.points[-1]
        rate = f", {at / each / 1e9:.0f} GFLOP/s at most operations" if len(curve.points) > 1 else ""
        print(f"  {name:<26}{curve.call_seconds * 1e6:>7.2f} us a call, {1e-9 / few[1]:>6.1f} GB/s{rate}")
    print(f"wrote {file}; `xllm compile --tuning {'cached' if arguments.output is None else file}` predicts from it")


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        print(f"measuring {what}", file=sys.stderr, flush=True)


def _say_if_busy() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): times will be too long", file=sys.stderr)
