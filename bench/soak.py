"""Does a server stay what it was? A long mix of requests, then what it kept: memory, pages, descriptors, threads.

    python -m bench.soak [--requests 100000] [--clients 32] [--artifact DIR] [--seed 0] [-- FLAG...]

Runs `xllm serve` on the model that comes with the project, or on an artifact. A sample is taken when so many requests
have ended and nothing runs. The slope is of private memory over requests, by least squares behind the first fifth;
beside it stands how well it is known. Ends with 1 when a page was leaked or an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from bench.mix import Mix, perform
from bench.report import RESULTS, console, footer, save, table
from bench.server import Server, serving
from bench.subject import story
from xllm.artifact import Artifact

WARM = 0.2  # the share of samples in which caches and heaps fill
SETTLE_SECONDS = 30.0
FLAGS = ("--memory", "1GiB", "--max-seqs", "32", "--max-wait", "0")


@dataclass(frozen=True)
class Sample:
    """What the server holds when nothing runs. private: bytes no other process shares; used: KV pages in use."""

    requests: int
    private: int
    descriptors: int
    threads: int
    used: int


@dataclass(frozen=True)
class Slope:
    """Bytes a request, and the standard error of that."""

    bytes: float
    error: float

    @staticmethod
    def of(samples: Sequence[Sample]) -> Slope:
        """By least squares. NaN for fewer than three samples."""
        if len(samples) < 3:
            return Slope(math.nan, math.nan)
        xs, ys = [float(sample.requests) for sample in samples], [float(sample.private) for sample in samples]
        x, y, count = sum(xs) / len(xs), sum(ys) / len(ys), len(xs)
        spread = sum((a - x) ** 2 for a in xs)
        slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread
        rest = sum((b - y - slope * (a - x)) ** 2 for a, b in zip(xs, ys, strict=True))
        return Slope(slope, math.sqrt(rest / (count - 2) / spread))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="at a time (default 32)")
    parser.add_argument("--samples", type=int, default=25, metavar="N", help="looks at the server (default 25)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the mix")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="one that generates (default: the story model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json", metavar="FILE")
    parser.add_argument(
        "flags", nargs="*", metavar="FLAG", help=f"of xllm serve, behind -- (default {' '.join(FLAGS)})"
    )
    options = parser.parse_args()
    out = console()
    with story(options.artifact) as artifact:
        max_len = Artifact.open(artifact).manifest["limits"]["max_len"]
        with serving(artifact, *(options.flags or FLAGS)) as server:
            begin = time.perf_counter()
            samples, kinds, wrong = asyncio.run(_soak(server, Mix(options.seed, max_len), options))
            seconds = time.perf_counter() - begin
    slope = Slope.of(samples[int(len(samples) * WARM) :])
    leaked = max(sample.used for sample in samples)
    made = table(f"xllm serve, {options.requests:,} requests in {seconds:,.0f} s", "", "first", "last", "most")
    for name, scale in (("private", 1e6), ("descriptors", 1), ("threads", 1), ("used", 1)):
        held = [getattr(sample, name) / scale for sample in samples]
        unit = " MB" if scale > 1 else ""
        made.add_row(
            {"used": "KV pages in use"}.get(name, name) + unit, *(f"{v:,.4g}" for v in (held[0], held[-1], max(held)))
        )
    out.print(made)
    out.print(
        f"memory slope: {slope.bytes / 10:+.2f} MB in 100,000 requests (standard error {slope.error / 10:.2f})\n"
        f"leaked pages: {leaked}; wrong answers: {sum(wrong.values())} of {options.requests:,}",
        highlight=False,
    )
    for what, count in wrong.most_common(10):
        out.print(f"  {count} x {what}", highlight=False, markup=False)
    out.print(", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()), highlight=False)
    footer(out)
    settings = {"requests": options.requests, "clients": options.clients, "seed": options.seed, "model": artifact.name}
    results = {
        "seconds": seconds, "slope": slope, "leaked_pages": leaked, "wrong": dict(wrong), "kinds": dict(kinds),
        "samples": [vars(sample) for sample in samples],
    }  # fmt: skip
    save(options.out, "soak", settings, results)
    return 1 if leaked or wrong else 0


async def _soak(
    server: Server, mix: Mix, options: argparse.Namespace
) -> tuple[list[Sample], Counter[str], Counter[str]]:
    samples: list[Sample] = []
    kinds: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    with Progress(transient=True) as progress:
        task = progress.add_task("requests", total=options.requests)

        async def client(acts: Iterator[None]) -> None:
            for _ in acts:
                act = mix.draw()
                kinds[act.kind] += 1
                if error := await perform(server.url, act):
                    wrong[error] += 1
                progress.advance(task)

        for at in range(options.samples):
            share = options.requests * (at + 1) // options.samples - options.requests * at // options.samples
            acts = iter([None] * share)
            async with asyncio.TaskGroup() as group:
                for _ in range(options.clients):
                    group.create_task(client(acts))
            samples.append(await _sample(server, sum(kinds.values())))
    return samples, kinds, wrong


async def _sample(server: Server, requests: int) -> Sample:
    """Waits until nothing runs: what is held then is held for good."""
    limit = time.perf_counter() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(0.2)
        figures = await asyncio.to_thread(_metrics, server.url)
        busy = figures["num_running_requests"] + figures["num_waiting_requests"] + figures["num_concurrent_requests"]
        if not busy or time.perf_counter() > limit:
            break
    folder = Path(f"/proc/{server.process.pid}")
    lines = (folder / "smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
    return Sample(
        requests,
        private * 1024,
        len(list((folder / "fd").iterdir())),
        len(list((folder / "task").iterdir())),
        int(figures["num_used_blocks"]),
    )


def _metrics(url: str) -> dict[str, float]:
    """By name: the figures of the server, and those of its one model."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    pairs = (line.rpartition(" ") for line in lines)
    return {name.partition("{")[0]: float(value) for name, _, value in pairs if "," not in name}


if __name__ == "__main__":
    sys.exit(main())
