"""xllm beside other engines on the same random weights, prompts and threads, run in turns.

    python -m bench.peers [--shape qwen3-0.6b] [--peers llama.cpp openvino] [--workloads decode prefill-512] \
        [--weights bfloat16 int8 int4] [--rounds 5] [--minutes 60] [--all-peers] [--fresh]

Peers are installed under build/peers, each in an environment of its own; models are converted there too. Each figure is
of a process of its own, and a round runs every contender once, so that what the machine does in between touches all
alike. What was measured is kept in build/peers/runs, and a run goes on from there until every cell has its rounds. A
peer that fails is a cell that says why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report
from bench.checkpoints import SHAPES
from bench.peers import servers
from bench.peers.child import Job
from bench.peers.contenders import (
    CONTENDERS,
    HOME,
    WEIGHTS,
    XLLM,
    Contender,
    convert,
    digest_of,
    environment,
    install,
    last_line,
    sources,
    version_of,
)  # fmt: skip
from bench.peers.rounds import (
    Cell,
    Failure,
    Found,
    Log,
    Measured,
    following,
    is_ours,
    left_out,
    minutes_a_round,
    summarize,
)
from bench.peers.workloads import WORKLOADS, Workload
from bench.report import RESULTS, ROOT, Ceiling, footer, save, table

HERE = Path(__file__).parent
LIMIT_SECONDS = 400
PREPARED = "prepared"  # in place of a workload: what installation and conversion came to


@dataclass(frozen=True)
class Entry:
    """A contender at one weight type: its model as converted, or why there is none."""

    contender: Contender
    weights: str
    kind: str
    model: Path = Path()
    broken: Failure | None = None

    @property
    def name(self) -> str:
        return f"{self.contender.name} {self.kind}"


def identity(entry: Entry, workload: Workload, threads: int) -> dict[str, Any]:
    """Whatever a figure of the entry depends on: figures of another identity are not counted beside it."""
    alone = (HERE / "child.py", HERE / f"with_{entry.contender.adapter}.py")
    served = (HERE / "servers.py", HERE.parent / "load.py", HERE.parent / "server.py")
    found = {
        "version": version_of(entry.contender), "measured_by": digest_of(*(served if workload.served else alone)),
        "asked": workload.asked, "threads": threads, "cpu": report.machine()["cpu"],
    }  # fmt: skip
    if entry.contender is XLLM:
        found |= {"sources": sources(), "artifact": json.loads((entry.model / "manifest.json").read_text())["digest"]}
    return found


def measure(entry: Entry, workload: Workload, shape: Mapping[str, Any], threads: int) -> Measured:
    """One run of one entry; whatever goes wrong is a Failure. A server finds its files in the page cache."""
    if workload.served:
        for file in weight_files(entry.model):
            file.read_bytes()
        try:
            return servers.measure(entry.contender, entry.model, workload, shape["vocab_size"], threads)
        except Exception as error:  # whatever a peer's server does is its figure, not the end of the run
            return Failure(last_line(f"{type(error).__name__}: {error}"))
    job = Job(str(entry.model), **workload.asked, threads=threads, vocab=shape["vocab_size"])
    command = [entry.contender.python, "-m", "bench.peers.child", entry.contender.adapter, job.text()]
    found = answer(command, environment(entry.contender))
    if isinstance(found, dict):
        tokens = workload.sequences * (workload.prompt + workload.output)
        held = size(entry.model) + kv_bytes(shape, tokens, entry.contender.kv_bytes[entry.weights])
        found["prefill_tokens_per_second"] = workload.prompt * workload.sequences / found["prefill_seconds"]
        found["megabytes_above"] = (found["peak_bytes"] - held) / 1e6
        if found[workload.figures[0].key] is None:
            return Failure("the first sequence ended before the last began: no time in which all decode")
    return found


def answer(command: Sequence[str], variables: Mapping[str, str], seconds: float = LIMIT_SECONDS) -> Measured:
    """What a child printed last, as JSON; a Failure with the last line of its errors where it gave none. One that ran
    out of time though it had a core throughout is a final one; others may have waited for the machine."""
    before = os.times()
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        used = sum(os.times()[2:4]) - sum(before[2:4])
        return Failure(f"no answer in {seconds:g} s", final=used > seconds)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return Failure(last_line(done.stderr) or f"ended with {done.returncode}")


def weight_files(model: Path) -> list[Path]:
    if model.is_file():
        return [model]
    kinds = (".safetensors", ".bin", ".onnx", ".data")
    return [file for file in model.rglob("*") if file.suffix in kinds and file.is_file()]


def size(model: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(file.stat().st_size for file in weight_files(model))


def kv_bytes(shape: Mapping[str, Any], tokens: int, each: int) -> int:
    """Of the keys and values of so many tokens, `each` bytes a number; scales of quantised ones are not counted."""
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"] * tokens * each


def prepare(options: argparse.Namespace, log: Log, say: Callable[[str], Any]) -> list[Entry]:
    """Every contender at every weight type it has. Failures are kept too: some take minutes to come about."""
    entries, code = [], digest_of(HERE / "contenders.py", HERE / "to_gguf.py")
    wanted = [contender for contender in CONTENDERS if contender.name in (XLLM.name, *options.peers)]
    for weights, contender in itertools.product(options.weights, wanted):
        for kind in contender.kinds.get(weights, ()):
            entry = Entry(contender, weights, kind)
            cell, tools = Cell(PREPARED, weights, entry.name), {"by": sources() if contender is XLLM else code}
            if not log.found(cell, tools).given_up:
                try:
                    with say(f"preparing {entry.name} {weights}"):
                        install(contender)
                        entries.append(replace(entry, model=convert(contender, options.shape, weights, kind)))
                    continue
                except (RuntimeError, OSError) as error:
                    log.add(cell, tools, Failure(last_line(str(error))))
            why = log.found(cell, tools).failures[-1].why
            entries.append(replace(entry, broken=Failure(f"could not be prepared: {why}", final=True)))
    return entries


def main() -> None:
    options = _options()
    begin, console, shape = time.monotonic(), report.console(), SHAPES[options.shape]
    log = Log(HOME / "runs" / f"{options.shape}.jsonl")
    if options.fresh:
        log.forget((*options.workloads, PREPARED), options.weights)
    asked, known, cells = {}, {}, {}
    for name, entry in itertools.product(options.workloads, prepare(options, log, console.status)):
        if WORKLOADS[name].served and not entry.contender.server:
            continue
        cell = Cell(name, entry.weights, entry.name)
        asked[cell], cells[cell] = entry, Found([entry.broken] if entry.broken else ())
        if not entry.broken:
            known[cell] = identity(entry, WORKLOADS[name], options.threads)
            cells[cell] = log.found(cell, known[cell])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while (left := 60 * options.minutes - (time.monotonic() - begin)) > 0:
            out = () if options.all_peers else left_out(cells, WORKLOADS)
            if not (cell := following(cells, options.rounds, out, left)):
                break
            began = time.monotonic()
            entry = asked[cell]
            with console.status(f"{cell.workload}: {entry.name} {entry.weights}, round {len(cells[cell]) + 1}"):
                found = measure(entry, WORKLOADS[cell.workload], shape, options.threads)
                if entry.contender is XLLM and isinstance(found, dict):
                    found["ceiling"] = vars(Ceiling.measure(options.threads))
            if isinstance(found, dict):
                found["seconds"] = round(time.monotonic() - began, 1)
            log.add(cell, known[cell], found)
            cells[cell].append(found)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured before is kept")
    rows = summarize(cells, WORKLOADS, () if options.all_peers else left_out(cells, WORKLOADS))
    console.print(_table(rows, options))
    if lacking := sum(len(found.figures) < options.rounds and not found.given_up for found in cells.values()):
        console.print(f"{lacking} of {len(cells)} cells have fewer rounds, those left out counted in", highlight=False)
    if took := minutes_a_round(cells, () if options.all_peers else left_out(cells, WORKLOADS)):
        text = ", ".join(f"{name} {minutes:.1f}" for name, minutes in took.items())
        console.print(f"minutes of another round: {text}; of all {sum(took.values()):.1f}", highlight=False)
    footer(console)
    settings = {
        "shape": options.shape, "rounds": options.rounds, "threads": options.threads,
        "weights": options.weights,
        "workloads": {name: WORKLOADS[name].asked for name in options.workloads},
        "contenders": {asked[cell].contender.name: one["version"] for cell, one in known.items()},
    }  # fmt: skip
    save(options.out or RESULTS / f"peers-{options.shape}.json", "peers", settings, {"rows": rows})


def _table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Table:
    made = table(
        f"{options.shape}, {options.threads} threads, up to {options.rounds} rounds (xN) in turns",
        "workload", "weights", "xllm", "peers", "x best peer", "read GB/s, GFLOP/s beside",
    )  # fmt: skip
    for row in rows:
        cells = {}
        for name, cell in row["cells"].items():
            cells[name] = cell if isinstance(cell, str) else f"{cell.text(1, 1)} x{cell.count}"
            cells[name] += ", left out" * (name in row["left_out"])
            if not isinstance(cell, str) and name in row["failures"]:
                cells[name] += f", once {row['failures'][name]}"
        ours = {name: cells.pop(name) for name in list(cells) if is_ours(name)}
        scales = {"read_bytes_per_second": (1e-9, 1), "flops_per_second": (1e-9, 0)}
        beside = "\n".join(row["ceiling"][key].text(*scale) for key, scale in scales.items() if key in row["ceiling"])
        times = "\n".join(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in ours)
        mine, peers = ("\n".join(f"{name} {text}" for name, text in part.items()) for part in (ours, cells))
        title = f"{row['workload']}: {row['figure']}, {row['unit']}"
        made.add_row(title, row["weights"], mine, peers, times, beside)
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contender.name for contender in CONTENDERS if contender is not XLLM]
    parser.add_argument("--shape", default="qwen3-0.6b", choices=tuple(SHAPES))
    parser.add_argument("--peers", nargs="*", default=names, choices=names)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=tuple(WORKLOADS))
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--rounds", type=int, default=5, help="until every cell has so many, earlier runs counted in")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that took longer than is left")
    parser.add_argument("--all-peers", action="store_true", help="later rounds too run peers that cannot be the best")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured of these workloads and weights")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="default: bench/results/peers-SHAPE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
