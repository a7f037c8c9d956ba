"""Cold process to first streamed token, by stages and parts; what the server imports; what it holds in memory.

    python -m bench.start [--checkpoint DIR] [--artifact DIR] [--repeats 10]

Weights are in the page cache, as they are on every start but the first after a boot.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from bench import load, report
from bench.report import RESULTS, Ceiling, Spread, footer, save, table
from bench.server import Memory, serving
from bench.subject import add_flags, subject
from xllm.artifact import WEIGHTS, Artifact

FOREIGN = ("torch", "transformers", "triton")
STAGES = ("engine open", "listening", "first token", "last token")
PREFILL = "the same prefill when warm"
LAPS = "xllm.start"  # the logger that says how long each part took


@dataclass(frozen=True)
class Start:
    """Seconds since the process was started, in the order of STAGES. prefill: from sending a second prompt of the same
    length to its first token. parts: seconds of what the server did, as it says; some run beside others."""

    seconds: tuple[float, ...]
    memory: Memory
    prefill: float
    parts: Mapping[str, float]

    @property
    def above_prefill(self) -> float:
        """Seconds to the first token that are not the prefill itself."""
        return self.seconds[2] - self.prefill


def measure(artifact: Artifact, work: load.Work, extra: Mapping[str, Any], threads: int) -> Start:
    """One start: serve, ask, stop. Raises RuntimeError when the answer is not what was asked for."""
    with serving(artifact.path, "--threads", str(threads), "--log-level", "info") as server:
        target = load.Target(server.url, artifact.name, extra)
        outcome = asyncio.run(load.send(target, work))
        memory = server.memory()
        warm = asyncio.run(load.send(target, replace(work, prompt=work.prompt[::-1])))  # shares no prefix with it
        if (error := outcome.error or warm.error) is not None:
            raise RuntimeError(f"the request failed: {error}")
        ends = (server.started + server.ledger, server.started + server.listening, outcome.events[0], outcome.end)
    [said] = [line.partition(LAPS)[2] for line in server.stderr.splitlines() if LAPS in line]
    parts = {name.strip(" ,"): float(seconds) for name, seconds in re.findall(r"([\w ,]+?) ([\d.]+) s", said)}
    return Start(tuple(end - server.started for end in ends), memory, warm.events[0] - warm.start, parts)


def imported(artifact: Artifact) -> tuple[str, ...]:
    """Top-level packages that a server has imported once it has answered a completion, told by Python itself."""
    with serving(artifact.path, interpreter=("-X", "importtime")) as server:
        outcome = asyncio.run(load.send(load.Target(server.url, artifact.name), load.Work((1, 2, 3), 4)))
        mapped = [
            path for path in server.maps() if any(f"/{name}/" in path or f"lib{name}" in path for name in FOREIGN)
        ]
    if outcome.error is not None or mapped:
        raise RuntimeError(f"the server {'mapped ' + ' '.join(mapped) if mapped else 'failed: ' + str(outcome.error)}")
    names = re.findall(r"^import time:\s*\d+ \|\s*\d+ \|\s*([\w.]+)$", server.stderr, re.MULTILINE)
    return tuple(sorted({name.partition(".")[0] for name in names}))


def python_alone(repeats: int) -> Spread:
    """Seconds that an interpreter takes to start and end, doing nothing: the floor of every start."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        times.append(time.perf_counter() - begin)
    return Spread.of(times)


def stages(starts: Sequence[Start]) -> dict[str, Spread]:
    """Seconds from the start of the process to the end of each stage."""
    return {name: Spread.of(start.seconds[index] for start in starts) for index, name in enumerate(STAGES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=8, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json")
    options = parser.parse_args()
    console = report.console()
    with subject(options, console) as given:
        artifact = Artifact.open(given.artifact)
        size = len((given.artifact / WEIGHTS).read_bytes())  # into the page cache
        extra, vocab = load.one_letter(artifact), artifact.manifest["model"]["vocab"]
        works = load.uniform(options.repeats, options.prompt, options.output, vocab, seed=0)
        packages = imported(artifact)  # also the first start, which may compile bytecode
        ceilings, starts = [Ceiling.measure(options.threads)], []
        for work in track(works, "starting", console=console, transient=True):
            starts.append(measure(artifact, work, extra, options.threads))
        ceilings.append(Ceiling.measure(options.threads))
    found, floor = stages(starts), python_alone(options.repeats)
    parts = {name: Spread.of(start.parts[name] for start in starts) for name in starts[0].parts}
    parts[PREFILL] = Spread.of(start.prefill for start in starts)
    rest = Spread.of(start.above_prefill for start in starts)
    ceiling = Ceiling.best(ceilings)
    memory = max((start.memory for start in starts), key=lambda memory: memory.above)
    foreign = [name for name in FOREIGN if name in packages]
    console.print(_report(found, floor, starts), _parts(parts, rest))
    console.print(
        f"reading the weights once ({size / 1e6:,.0f} MB at {ceiling.read_bytes_per_second / 1e9:.1f} GB/s) takes "
        f"{size / ceiling.read_bytes_per_second:.3f} s: checking them does that, beside the rest\n"
        f"imports {len(packages)} packages; of {', '.join(FOREIGN)}: {', '.join(foreign) or 'none'}\n"
        f"memory: peak {_mb(memory.peak)} = weights {_mb(memory.weights)} + KV {_mb(memory.kv)} "
        f"+ {_mb(memory.above)} more (anonymous {_mb(memory.anonymous)} with the arena, libraries {_mb(memory.code)})",
        highlight=False,
    )
    footer(console)
    settings = {
        "shape": options.shape, "artifact": artifact.manifest["digest"], "repeats": options.repeats,
        "prompt_tokens": options.prompt, "output_tokens": options.output, "threads": options.threads,
    }  # fmt: skip
    results = {
        "seconds_after_start": found, "first_token_less_prefill_seconds": rest, "parts_seconds": parts,
        "python_alone_seconds": floor, "ceiling": ceiling, "weight_bytes": size,
        "memory_bytes": {**vars(memory), "above": memory.above}, "packages": packages, "foreign": foreign,
    }  # fmt: skip
    save(options.out, "start", settings, results)


def _report(found: dict[str, Spread], floor: Spread, starts: Sequence[Start]) -> Table:
    made = table("xllm serve: from process start", "until", "s after start", "s of this stage")
    made.add_row("python alone", floor.text(1, 3), "")
    for index, name in enumerate(STAGES):
        took = [start.seconds[index] - (start.seconds[index - 1] if index else 0.0) for start in starts]
        made.add_row(name, found[name].text(1, 3), f"{statistics.median(took):.3f}")
    return made


def _parts(parts: dict[str, Spread], rest: Spread) -> Table:
    made = table("what the server did (the engine beside HTTP and tokenizer)", "part", "s")
    for name, spread in parts.items():
        made.add_row(name, spread.text(1, 3))
    made.add_row("first token less that prefill", rest.text(1, 3))
    return made


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
