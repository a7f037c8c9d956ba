"""xllm beside other engines on the same random weights, prompts and threads, run in turns.

    python -m bench.peers [--shape qwen3-0.6b] [--peers llama.cpp openvino] [--workloads decode prefill-512] \
        [--weights bfloat16 int8 int4] [--rounds 5] [--quick] [--keep]

Peers are installed under build/peers, each in an environment of its own; models are converted there too. Each figure is
of a process of its own, and a round runs every contender once, so that what the machine does in between touches all
alike. A peer that fails is a cell that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.checkpoints import SHAPES
from bench.peers import servers
from bench.peers.child import Job
from bench.peers.contenders import CONTENDERS, HOME, WEIGHTS, XLLM, Contender, convert, environment, install
from bench.report import RESULTS, ROOT, Ceiling, Spread, footer, save, table

LIMIT_SECONDS = 900


@dataclass(frozen=True)
class Workload:
    """So many sequences of so many tokens; `figure` is the one compared (of the child, or of `servers`)."""

    sequences: int
    prompt: int
    output: int
    figure: str = "decode_tokens_per_second"
    unit: str = "tokens/s"
    served: bool = False

    @property
    def more_is_better(self) -> bool:
        return self.unit == "tokens/s"


WORKLOADS: Mapping[str, Workload] = {
    "decode": Workload(1, 128, 257),
    "decode-4096": Workload(1, 4064, 33),
    "prefill-512": Workload(1, 512, 1, "prefill_tokens_per_second"),
    "prefill-2048": Workload(1, 2048, 1, "prefill_tokens_per_second"),
    "batch-8": Workload(8, 128, 129),
    "batch-32": Workload(32, 128, 257),
    "memory": Workload(1, 512, 33, "bytes_above", "MB"),
    "http-16": Workload(16, 256, 128, "total_tokens_per_second", "tokens/s", served=True),
    "http-16-itl-p99": Workload(16, 256, 128, "itl_p99_ms", "ms", served=True),
    "start": Workload(1, 16, 4, "first_token_seconds", "s", served=True),
}


@dataclass(frozen=True)
class Entry:
    """A contender at one weight type, as converted."""

    contender: Contender
    weights: str
    kind: str
    model: Path

    @property
    def name(self) -> str:
        return self.contender.name if self.contender is XLLM else f"{self.contender.name} {self.kind}"


@dataclass(frozen=True)
class Failure:
    why: str


Measured = dict[str, Any] | Failure


def measure(entry: Entry, workload: Workload, vocab: int, threads: int) -> Measured:
    """One run of one entry; whatever goes wrong is a Failure."""
    if workload.served:
        try:
            return servers.measure(entry.contender.adapter, entry.model, workload, vocab, threads)
        except Exception as error:  # whatever a peer's server does is its figure, not the end of the run
            return Failure(_line(f"{type(error).__name__}: {error}"))
    job = Job(str(entry.model), workload.sequences, workload.prompt, workload.output, threads, vocab)
    command = [entry.contender.python, "-m", "bench.peers.child", entry.contender.adapter, job.text()]
    found = answer(command, environment(entry.contender))
    if isinstance(found, dict):
        found["prefill_tokens_per_second"] = workload.prompt * workload.sequences / found["prefill_seconds"]
        found["bytes_above"] = (found["peak_bytes"] - size(entry.model)) / 1e6
        if found[workload.figure] is None:
            return Failure("the first sequence ended before the last began: no time in which all decode")
    return found


def answer(command: Sequence[str], variables: Mapping[str, str], seconds: float = LIMIT_SECONDS) -> Measured:
    """What a child printed last, as JSON; a Failure with the last line of its errors where it gave none."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Failure(f"no answer in {seconds:g} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return Failure(_line(done.stderr) or f"ended with {done.returncode}")


def size(model: Path) -> int:
    """Bytes of a model's weight files."""
    if model.is_file():
        return model.stat().st_size
    kinds = (".safetensors", ".bin", ".onnx", ".data")
    return sum(file.stat().st_size for file in model.rglob("*") if file.suffix in kinds and file.is_file())


def ratio(ours: Spread | None, peers: Mapping[str, Spread], more_is_better: bool) -> tuple[float, str] | None:
    """How many times better we are than the best peer, and its name; None without both."""
    if ours is None or not peers:
        return None
    best = (max if more_is_better else min)(peers, key=lambda name: peers[name].median)
    mine, other = ours.median, peers[best].median
    return (mine / other if more_is_better else other / mine), best


def main() -> None:
    options = _options()
    console = report.console()
    entries, runs, notes = [], {}, {}
    for contender in CONTENDERS:
        for weights in options.weights if contender is XLLM or contender.name in options.peers else ():
            for kind in contender.kinds.get(weights, ()):
                try:
                    with console.status(f"preparing {contender.name} {kind}"):
                        install(contender)
                        entries.append(Entry(contender, weights, kind, convert(contender, options.shape, kind)))
                except (subprocess.SubprocessError, OSError) as error:
                    notes[f"{contender.name} {kind}"] = _line(str(error))
    ceilings, vocab = [Ceiling.measure(options.threads)], SHAPES[options.shape]["vocab_size"]
    for _ in range(options.rounds):
        for name in options.workloads:
            for entry in entries:
                workload = WORKLOADS[name]
                if workload.served and not entry.contender.server:
                    continue
                with console.status(f"{name}: {entry.name} {entry.weights}"):
                    found = measure(entry, workload, vocab, options.threads)
                runs.setdefault((name, entry.weights, entry.name), []).append(found)
            ceilings.append(Ceiling.measure(options.threads))
    ceiling = {
        "read_bytes_per_second": Spread.of(one.read_bytes_per_second for one in ceilings),
        "flops_per_second": Spread.of(one.flops_per_second for one in ceilings),
    }
    rows = summarize(runs)
    console.print(_table(rows, options))
    for name, why in notes.items():
        console.print(f"{name} could not be prepared: {why}", highlight=False)
    console.print(
        f"reads {ceiling['read_bytes_per_second'].text(1e-9, 1)} GB/s, multiplies "
        f"{ceiling['flops_per_second'].text(1e-9, 0)} GFLOP/s, measured between the workloads of each round",
        highlight=False,
    )
    footer(console)
    settings = {
        "shape": options.shape, "rounds": options.rounds, "threads": options.threads,
        "weights": options.weights, "workloads": {name: vars(WORKLOADS[name]) for name in options.workloads},
    }  # fmt: skip
    save(options.out, "peers", settings, {"rows": rows, "ceiling": ceiling, "not_prepared": notes})
    if not options.keep:
        shutil.rmtree(HOME / "models" / options.shape, ignore_errors=True)


def summarize(runs: Mapping[tuple[str, str, str], Sequence[Measured]]) -> list[dict[str, Any]]:
    """One row for each workload and weight type: a spread or a failure for each contender, and our ratio."""
    rows = []
    for name, weights in dict.fromkeys((name, weights) for name, weights, _ in runs):
        workload = WORKLOADS[name]
        cells, versions = {}, {}
        for (other, kind, contender), found in runs.items():
            if (other, kind) != (name, weights):
                continue
            values = [one[workload.figure] for one in found if isinstance(one, dict)]
            failed = [one.why for one in found if isinstance(one, Failure)]
            cells[contender] = f"failed: {failed[-1]}" if failed else Spread.of(values)
            told = [one["version"] for one in found if isinstance(one, dict) and "version" in one]
            versions |= {contender: told[-1]} if told else {}
        good = {contender: cell for contender, cell in cells.items() if isinstance(cell, Spread)}
        best = ratio(good.pop("xllm", None), good, workload.more_is_better)
        rows.append(
            {"workload": name, "weights": weights, "unit": workload.unit, "cells": cells, "versions": versions,
             "ratio": best and best[0], "best_peer": best and best[1]}
        )  # fmt: skip
    return rows


def _table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Table:
    made = table(
        f"{options.shape}, {options.threads} threads, {options.rounds} rounds in turns",
        "workload", "weights", "xllm", "peers", "x best peer",
    )  # fmt: skip
    for row in rows:
        cells = {name: cell if isinstance(cell, str) else cell.text(1, 1) for name, cell in row["cells"].items()}
        ours = cells.pop("xllm", "")
        peers = "\n".join(f"{name} {text}" for name, text in cells.items())
        times = f"{row['ratio']:.2f}" if row["ratio"] else ""
        made.add_row(f"{row['workload']}, {row['unit']}", row["weights"], ours, peers, times)
    return made


def _line(text: str) -> str:
    """The last line that says something, cut to fit a cell, without folders of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace(f"{ROOT}{os.sep}", "")[:160] if lines else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contender.name for contender in CONTENDERS if contender is not XLLM]
    parser.add_argument("--shape", default="qwen3-0.6b", choices=tuple(SHAPES))
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=tuple(WORKLOADS))
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one round of a decode and a prefill in bfloat16")
    parser.add_argument("--keep", action="store_true", help="leave the converted models where they are")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.workloads, options.weights = 1, ["decode", "prefill-512"], ["bfloat16"]
    return options


if __name__ == "__main__":
    main()
