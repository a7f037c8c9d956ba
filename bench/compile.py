"""What a compile costs: seconds by stage, peak memory, sizes, and what the depth of a model adds to its capture.

    python -m bench.compile [--shape qwen3-0.6b] [--checkpoint DIR] [--repeats 3]

Each compile and each capture runs in a process of its own. Beside each compile the machine's own time for its data is
taken: read the checkpoint, write as many bytes as the artifact has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.report import RESULTS, Spread, footer, save, table
from bench.subject import add_flags, checkpoint
from xllm.artifact import Artifact

POLL_SECONDS = 0.02
COPY_BYTES = 8 << 20
DEPTHS = (4, 28, 64)


@dataclass(frozen=True)
class Peak:
    """The most resident bytes of a process: all, and by kind, each at its own time.

    `file` is the mapped checkpoint above all, which the system can drop at any time; `anonymous` is what the compile
    really needs. Kinds are sampled every 20 ms, so a shorter peak can be missed; `all` is the kernel's own record.
    """

    all: int
    anonymous: int
    file: int


@dataclass(frozen=True)
class Compile:
    """One compile. `seconds` by stage as the compiler reports them, `wall` from process start to its end."""

    seconds: dict[str, float]
    wall: float
    peak: Peak
    copy_seconds: float
    artifact_bytes: int
    weight_bytes: int


def compile_once(source: Path, out: Path) -> Compile:
    """A compile in a fresh process, with the plain copy before it."""
    files = [file for file in source.iterdir() if file.suffix == ".safetensors"]
    begin = time.perf_counter()
    done, peak = _watched([sys.executable, "-m", "bench.compile", "--child", "compile", str(source), str(out)])
    wall = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    copied = copy_seconds(files, out.parent / "copy", size)
    return Compile(done["seconds"], wall, peak, copied, size, done["weight_bytes"])


def copy_seconds(files: Sequence[Path], out: Path, size: int) -> float:
    """Reads the files and writes `size` bytes, the least that any compile does. Like it, forces nothing to the disk."""
    buffer = bytearray(COPY_BYTES)
    begin = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as sink:
        for at in range(0, size, COPY_BYTES):
            sink.write(memoryview(buffer)[: min(COPY_BYTES, size - at)])
    taken = time.perf_counter() - begin
    out.unlink()
    return taken


def program_size(artifact: Path) -> dict[str, int]:
    """How much of a program there is: calls of the plan, lines of the dumps, bytes of plan and dumps."""
    opened = Artifact.open(artifact)
    dumps = {stage: opened.read(name).decode() for stage, name in opened.stages().items()}
    return {
        "plan_calls": len(opened.plan.calls),
        "captured_lines": dumps["captured"].count("\n"),
        "planned_lines": dumps["planned"].count("\n"),
        "planned_unfolded_lines": dumps["planned.unfolded"].count("\n"),
        "plan_bytes": (artifact / "plan.json").stat().st_size,
        "dump_bytes": sum(len(text.encode()) for text in dumps.values()),
    }


def capture_seconds(source: Path, layers: int) -> float:
    """Capture of the same shape with so many layers, in a fresh process, imports not counted."""
    return _watched([sys.executable, "-m", "bench.compile", "--child", "capture", str(source), str(layers)])[0][
        "seconds"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS), help="layers of the captures")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile.json")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "CHECKPOINT", "ARGUMENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_child(*options.child)))
        return
    console = report.console()
    with checkpoint(options, console) as (source, scratch):
        out, runs = scratch / "bench.xllm", []
        for repeat in range(options.repeats):
            with console.status(f"compile {repeat + 1} of {options.repeats}"):
                runs.append(compile_once(source, out))
        program = program_size(out)
        digest = Artifact.open(out).manifest["digest"]
        captures: dict[int, list[float]] = {depth: [] for depth in options.depths}
        for repeat in range(options.repeats):  # depths in turn, so that a busy minute hits all of them
            for depth in options.depths:
                with console.status(f"capture {repeat + 1} of {options.repeats}, {depth} layers"):
                    captures[depth].append(capture_seconds(source, depth))
    figures = _figures(runs)
    depths = {str(depth): Spread.of(times) for depth, times in captures.items()}
    console.print(_table(options.shape if options.checkpoint is None else source.name, figures, depths))
    console.print(
        f"artifact {runs[-1].artifact_bytes / 1e6:,.1f} MB, of it weights {runs[-1].weight_bytes / 1e6:,.1f} MB\n"
        f"program: {program['captured_lines']} lines captured, {program['planned_lines']} planned "
        f"({program['planned_unfolded_lines']} with every layer written out), {program['plan_calls']} calls\n"
        "copy: read the checkpoint and write as many bytes as the artifact has. Memory: all is the kernel's VmHWM and "
        "counts the mapped checkpoint,\nwhich the system can drop; anonymous is what the compile needs",
        highlight=False,
    )
    footer(console)
    settings = {"shape": options.shape, "artifact": digest, "repeats": options.repeats}
    results = {
        "figures": figures, "capture_seconds_by_layers": depths, "artifact_bytes": runs[-1].artifact_bytes,
        "weight_bytes": runs[-1].weight_bytes, "program": program,
    }  # fmt: skip
    save(options.out, "compile", settings, results)


def _figures(runs: Sequence[Compile]) -> dict[str, Spread]:
    stages = {f"seconds.{name}": Spread.of(run.seconds[name] for run in runs) for name in runs[0].seconds}
    return {
        **stages,
        "seconds.wall": Spread.of(run.wall for run in runs),
        "seconds.copy": Spread.of(run.copy_seconds for run in runs),
        "weights_over_copy": Spread.of(run.seconds["weights"] / run.copy_seconds for run in runs),
        "wall_over_copy": Spread.of(run.wall / run.copy_seconds for run in runs),
        **{
            f"peak_bytes.{kind}": Spread.of(asdict(run.peak)[kind] for run in runs)
            for kind in ("all", "anonymous", "file")
        },
    }


def _table(name: str, figures: dict[str, Spread], depths: dict[str, Spread]) -> Table:
    made = table(f"xllm compile {name}", "what", "median (least-greatest)", "unit")
    for key, spread in figures.items():
        kind, _, what = key.partition(".")
        if kind == "seconds":
            made.add_row(f"stage {what}" if what not in ("wall", "copy") else what, spread.text(1, 2), "s")
        elif kind == "peak_bytes":
            made.add_row(f"peak memory, {what}", spread.text(1e-6, 0), "MB")
        else:
            made.add_row(key.replace("_", " "), spread.text(1, 1), "x")
    for depth, spread in depths.items():
        made.add_row(f"capture alone, {depth} layers", spread.text(1, 2), "s")
    return made


def _watched(command: list[str]) -> tuple[Any, Peak]:
    """Runs a process that prints a line of JSON; that, and the most memory it held. Raises RuntimeError if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    most = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    while process.poll() is None:
        for name, size in _status(process.pid).items():
            most[name] = max(most[name], size)
        time.sleep(POLL_SECONDS)
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[1:5])} failed: {errors.strip()[-2000:]}")
    return json.loads(out.splitlines()[-1]), Peak(most["VmHWM"], most["RssAnon"], most["RssFile"])


def _status(pid: int) -> dict[str, int]:
    """Bytes from /proc/PID/status; nothing when the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile") if name in fields}


def _child(what: str, source: str, argument: str) -> dict[str, Any]:
    """The process that is watched."""
    if what == "compile":
        from xllm.compiler import compile_checkpoint

        done = compile_checkpoint(source, argument)
        return {"seconds": dict(done.seconds), "weight_bytes": done.weight_bytes}
    from transformers import AutoConfig

    from xllm.frontend.huggingface import capture_config

    changes = json.loads((Path(source) / "config.json").read_text())
    changes |= {"num_hidden_layers": int(argument)}
    changes.pop("layer_types", None)
    changes.pop("max_window_layers", None)
    config = AutoConfig.for_model(changes.pop("model_type"), **changes)
    begin = time.perf_counter()
    capture_config(config, name="bench")
    return {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    main()
