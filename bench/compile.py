"""What a compile costs: seconds by stage, peak memory, sizes, and what depth adds to everything but weights.

    python -m bench.compile [--shape qwen3-0.6b] [--checkpoint DIR] [--large] [--repeats 3] [--depths 4 28 64]

Each compile runs in a process of its own. Beside those of whole checkpoints the machine's own time for the data is
taken, before and after: read the checkpoint, write as many bytes as the artifact has. Depths are compiled from sparse
files of zeros.
`--large` adds the shape of Qwen3-8B, once, from sparse shards: 17 GB are written and removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.checkpoints import SHAPES, write_checkpoint
from bench.report import RESULTS, Spread, footer, save, table
from bench.subject import add_flags, checkpoint
from xllm.artifact import Artifact

POLL_SECONDS = 0.02
COPY_BYTES = 8 << 20
DEPTHS = (4, 28, 64)
LARGE, SHARD_BYTES = "qwen3-8b", 4 << 30


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

    @property
    def beside_weights(self) -> float:
        """Seconds of everything but weights: the start of the process, imports, capture, passes, dumps, records."""
        return self.wall - self.seconds["weights"]

    @property
    def rest(self) -> float:
        """Seconds outside of the stages: the interpreter's start and end, plan, records and manifest."""
        return self.wall - sum(self.seconds.values())


def compile_once(source: Path, out: Path) -> Compile:
    """A compile in a fresh process between two plain copies, whose mean is kept: what memory and disk give away changes
    from one minute to the next. The first copy leaves the checkpoint in the page cache, as far as it fits."""
    files, copy = [file for file in source.iterdir() if file.suffix == ".safetensors"], out.parent / "copy"
    expected = sum(file.stat().st_size for file in files)
    before = copy_seconds(files, copy, expected)
    begin = time.perf_counter()
    done, peak = _watched([sys.executable, "-m", "bench.compile", "--child", str(source), str(out)])
    wall = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    copied = before * size / expected + copy_seconds(files, copy, size)
    return Compile(done["seconds"], wall, peak, copied / 2, size, done["weight_bytes"])


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="*", default=list(DEPTHS), help="layers of the same shape")
    parser.add_argument("--large", action="store_true", help=f"compile {LARGE} as well")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile.json")
    parser.add_argument("--child", nargs=2, metavar=("CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_child(*options.child)))
        return
    console = report.console()
    with checkpoint(options, console) as (source, scratch):
        name = options.shape if options.checkpoint is None else source.name
        out, runs = scratch / "bench.xllm", []
        for repeat in range(options.repeats):
            runs.append(_told(console, f"{name}, {repeat + 1} of {options.repeats}", source, out))
        program = program_size(out)
        digest = Artifact.open(out).manifest["digest"]
        shutil.rmtree(out)
        depths = _depths(console, json.loads((source / "config.json").read_text()), options, scratch)
        sizes = {name: _figures(runs)}
        if options.large:
            large = write_checkpoint(scratch / LARGE, SHAPES[LARGE], shard_bytes=SHARD_BYTES)
            sizes[LARGE] = _figures([_told(console, LARGE, large, out)])
    console.print(_size_table(sizes))
    if depths:
        console.print(_depth_table(depths))
    console.print(
        f"program of {name}: {program['captured_lines']} lines captured, {program['planned_lines']} planned "
        f"({program['planned_unfolded_lines']} with every layer written out), {program['plan_calls']} calls\n"
        "copy: read the checkpoint and write as many bytes as the artifact has. Memory: all is the kernel's VmHWM and "
        "counts the mapped checkpoint,\nwhich the system can drop; anonymous is what the compile needs. Rest: start "
        "and end of the process, plan, records, manifest",
        highlight=False,
    )
    footer(console)
    settings = {"shape": options.shape, "artifact": digest, "repeats": options.repeats}
    results = {
        "sizes": sizes, "seconds_by_layers": depths, "beside_weights_deepest_over_shallowest": _growth(depths),
        "artifact_bytes": runs[-1].artifact_bytes, "weight_bytes": runs[-1].weight_bytes, "program": program,
    }  # fmt: skip
    save(options.out, "compile", settings, results)


def _told(console: Console, what: str, source: Path, out: Path) -> Compile:
    """One compile, and a line about it: a long run shows that it lives."""
    console.print(f"{what}: ", end="", highlight=False)
    done = compile_once(source, out)
    console.print(f"{done.wall:.1f} s, of it weights {done.seconds['weights']:.1f} s", highlight=False)
    return done


def _depths(
    console: Console, config: dict[str, Any], options: argparse.Namespace, scratch: Path
) -> dict[str, dict[str, Spread]]:
    """Figures of the same shape at each depth, taken in turn, so that a busy minute hits all of them."""
    for per_layer in ("layer_types", "max_window_layers"):
        config.pop(per_layer, None)
    runs: dict[int, list[Compile]] = {depth: [] for depth in options.depths}
    for depth in runs:
        write_checkpoint(scratch / f"{depth}", {**config, "num_hidden_layers": depth}, shard_bytes=SHARD_BYTES)
    for repeat in range(options.repeats):
        for depth, held in runs.items():
            out = scratch / f"{depth}.xllm"
            held.append(_told(console, f"{depth} layers, {repeat + 1} of {options.repeats}", scratch / f"{depth}", out))
            shutil.rmtree(out)
    return {str(depth): _figures(held) for depth, held in runs.items()}


def _growth(depths: dict[str, dict[str, Spread]]) -> float | None:
    """Seconds of everything but weights at the greatest depth over those at the least, of medians."""
    if len(depths) < 2:
        return None
    shallowest, deepest = (depths[str(end(map(int, depths)))]["seconds.beside_weights"] for end in (min, max))
    return deepest.median / shallowest.median


def _figures(runs: Sequence[Compile]) -> dict[str, Spread]:
    stages = {f"seconds.{name}": Spread.of(run.seconds[name] for run in runs) for name in runs[0].seconds}
    return {
        **stages,
        "seconds.rest": Spread.of(run.rest for run in runs),
        "seconds.beside_weights": Spread.of(run.beside_weights for run in runs),
        "seconds.wall": Spread.of(run.wall for run in runs),
        "seconds.copy": Spread.of(run.copy_seconds for run in runs),
        "weights_over_copy": Spread.of(run.seconds["weights"] / run.copy_seconds for run in runs),
        "wall_over_copy": Spread.of(run.wall / run.copy_seconds for run in runs),
        **{
            f"peak_bytes.{kind}": Spread.of(asdict(run.peak)[kind] for run in runs)
            for kind in ("all", "anonymous", "file")
        },
        "artifact_bytes": Spread.of(run.artifact_bytes for run in runs),
    }


_ROWS = (
    ("seconds.imports", "stage imports", "s"), ("seconds.capture", "stage capture", "s"),
    ("seconds.passes", "stage passes, plans and dumps", "s"), ("seconds.rest", "rest", "s"),
    ("seconds.beside_weights", "everything but weights", "s"), ("seconds.weights", "stage weights", "s"),
    ("seconds.wall", "wall", "s"), ("seconds.copy", "copy", "s"), ("weights_over_copy", "weights over copy", "x"),
    ("peak_bytes.all", "peak memory, all", "MB"), ("peak_bytes.anonymous", "peak memory, anonymous", "MB"),
    ("artifact_bytes", "artifact", "MB"),
)  # fmt: skip
_SCALES = {"s": (1.0, 2), "x": (1.0, 1), "MB": (1e-6, 0)}


def _size_table(sizes: dict[str, dict[str, Spread]]) -> Table:
    made = table("xllm compile by size", "what", *sizes, "unit")
    for key, what, unit in _ROWS:
        made.add_row(what, *(figures[key].text(*_SCALES[unit]) for figures in sizes.values()), unit)
    return made


def _depth_table(depths: dict[str, dict[str, Spread]]) -> Table:
    growth = _growth(depths)
    said = "" if growth is None else f": everything but weights grows {growth:.2f} times from {min(map(int, depths))}"
    made = table(f"xllm compile by depth{said}", "what", *(f"{depth} layers" for depth in depths), "unit")
    for key, what, unit in _ROWS[:7]:
        made.add_row(what, *(figures[key].text(*_SCALES[unit]) for figures in depths.values()), unit)
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


def _child(source: str, out: str) -> dict[str, Any]:
    """The process that is watched."""
    from xllm.compiler import compile_checkpoint

    done = compile_checkpoint(source, out)
    return {"seconds": dict(done.seconds), "weight_bytes": done.weight_bytes}


if __name__ == "__main__":
    main()
