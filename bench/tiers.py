"""Seconds to have the keys and values of N tokens: computed, loaded from the host tier, from files the system has in
memory, and from files it has not; from which N on loading is faster; and by how much longer steps take beside which
keys and values are copied out.

    python -m bench.tiers [--checkpoint DIR] [--artifact DIR] [--repeats 3] [--tokens 16 64 256 1024]

Computing is the time to the first token of a prompt of N tokens and one more, less that of the same prompt when all of
N is in the KV pages. A load runs from the engine's asking for it until its last page is there, checked.
"""

from __future__ import annotations

import argparse
import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import report
from bench.report import RESULTS, Spread, footer, save, table
from bench.subject import add_flags, subject
from xllm.artifact import Artifact
from xllm.llm import load_cost, open_engine
from xllm.runtime.config import LoadCost
from xllm.runtime.prefix import extend_chain
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.runtime.rest import forget
from xllm.runtime.tiered import TieredPool
from xllm.targets.cpu.executor import state_identity
from xllm.targets.fitted import cost_of

WAYS = ("computed", "host", "disk, in memory", "disk")
GROUP, LOADS = 16, 5
COPYING = ("none", "host", "host and disk")
BESIDE = (4, 256, 32)  # requests, tokens of prompt and of answer, all of which are copied out


class Timed:
    """An engine with both tiers, asked one prompt at a time."""

    def __init__(self, artifact: Artifact, threads: int, folder: Path, room: int):
        self._outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
        self.engine, _ = open_engine(
            artifact, self._outputs.put, threads=threads, host_cache=room, disk_cache=folder, disk_cache_size=room
        )
        assert self.engine._tiers is not None and isinstance(self.engine.pool, TieredPool)
        self.pool = self.engine.pool
        self._tiers, self._stores = self.engine._tiers, self.engine._tiers._stores
        self._identity = state_identity(artifact)

    def first_token(self, prompt: Sequence[int]) -> float:
        """Seconds until it came."""
        begin = time.perf_counter()
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1)
        self.engine.submit(Request(f"bench-{begin}", tuple(prompt), params))
        self._outputs.get()
        return time.perf_counter() - begin

    def settle(self, groups: int) -> None:
        """Wait until so many groups are stored."""
        while min(tier.stored for tier in self.engine.stats().tiers) < groups:
            time.sleep(0.01)

    def load(self, prompt: Sequence[int], way: str) -> float:
        """Seconds of a load into an empty cache. Raises RuntimeError where it was not all of the prompt."""
        pool, chain, ended = self.pool, list[bytes](), threading.Event()
        forget(pool)  # a text that needs all of the pool would take minutes to compute
        extend_chain(chain, prompt, GROUP, self._identity)
        self._tiers._stores = [store for store in self._stores if store.name in way]
        self._tiers._changed = ended.set
        begin = time.perf_counter()
        self._tiers.load(chain, lambda: True)
        ended.wait()
        seconds = time.perf_counter() - begin
        self._tiers._stores = self._stores
        if (groups := pool.refresh(chain)) != len(chain):
            raise RuntimeError(f"{groups} of {len(chain)} groups were loaded ({way})")
        return seconds


def beside_steps(artifact: Artifact, threads: int, tiers: str, repeat: int, folder: str) -> float:
    """Seconds to serve a few requests whose keys and values are copied to these tiers meanwhile."""
    count, prompt, answer = BESIDE
    room = 2 * count * (prompt + answer) * artifact.plan.kv.token_bytes
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    engine, _ = open_engine(
        artifact, outputs.put, threads=threads, host_cache=room if "host" in tiers else 0,
        disk_cache=folder if "disk" in tiers else None, disk_cache_size=room,
    )  # fmt: skip
    try:
        source, vocab = np.random.default_rng(repeat), artifact.manifest["model"]["vocab"]
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=answer)
        engine.submit(Request("first", tuple(source.integers(0, vocab, GROUP).tolist()), params))
        while not any(output.finish_reason for output in outputs.get()):
            pass
        begin, left = time.perf_counter(), count
        for at in range(count):
            engine.submit(Request(f"beside-{at}", tuple(source.integers(0, vocab, prompt).tolist()), params))
        while left:
            left -= sum(output.finish_reason is not None for output in outputs.get())
        return time.perf_counter() - begin
    finally:
        engine.stop()


def drop(folder: Path) -> None:
    """Let the system forget what it has in memory of the files."""
    for file in folder.glob("kv-*/*.kv"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(artifact: Artifact, threads: int, tokens: int, repeat: int, folder: Path) -> dict[str, list[float]]:
    """Seconds by way, of one text."""
    vocab, groups = artifact.manifest["model"]["vocab"], tokens // GROUP
    prompt = np.random.default_rng(1000 * tokens + repeat).integers(0, vocab, tokens + 1).tolist()
    engine = Timed(artifact, threads, folder, (groups + 64) * (artifact.plan.kv.group_bytes + 8192))
    try:
        engine.first_token(prompt[::-1][:GROUP])  # the first step of a process touches memory
        seconds = engine.first_token(prompt)
        engine.settle(groups)
        found = {"computed": [seconds - engine.first_token(prompt)]}
        for way in WAYS[1:]:
            found[way] = []
            for _ in range(LOADS):
                if way == "disk":
                    drop(folder)
                found[way].append(engine.load(prompt, way))
    finally:
        engine.engine.stop()
    return found


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds a token, and seconds that there are without any (not below 0), by least squares of relative errors."""
    tokens, seconds = np.array([n for n, _ in points], float), np.array([s for _, s in points])
    weights = 1 / np.maximum(seconds, 1e-9)
    columns = np.stack([tokens, np.ones_like(tokens)], 1)
    slope, rest = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)[0]
    return float(slope), max(0.0, float(rest))


def crossover(load: tuple[float, float], compute: float) -> int | None:
    """Fewest tokens, in whole groups, that are loaded faster than computed; None: there are none."""
    slope, wait = load
    return None if slope >= compute else GROUP * (int(wait / (compute - slope)) // GROUP + 1)


def rule(cost: LoadCost, disk: bool) -> int | None:
    """The same, as the engine decides by the costs of the artifact."""
    sizes = range(GROUP, 1 << 16, GROUP)
    return next((n for n in sizes if cost.pays(n, 0 if disk else n, n if disk else 0)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024], metavar="N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS / "tiers.json")
    options = parser.parse_args()
    if any(n % GROUP for n in options.tokens):
        parser.error(f"--tokens are whole groups of {GROUP}")
    console = report.console()
    with subject(options, console) as given:
        artifact = Artifact.open(given.artifact)
        rounds = [(tokens, repeat) for repeat in range(options.repeats) for tokens in options.tokens]
        held: dict[tuple[int, str], list[float]] = {}
        for tokens, repeat in track(rounds, "loading", console=console, transient=True):
            with tempfile.TemporaryDirectory(dir=given.artifact.parent, prefix="tiers-") as folder:
                for way, seconds in measure(artifact, options.threads, tokens, repeat, Path(folder)).items():
                    held.setdefault((tokens, way), []).extend(seconds)
        with tempfile.TemporaryDirectory(dir=given.artifact.parent, prefix="tiers-") as folder:
            cost = load_cost(artifact, folder, cost_of(artifact, options.threads)[0])
        copying: dict[str, list[float]] = {}
        for repeat in track(range(options.repeats), "copying beside steps", console=console, transient=True):
            for tiers in COPYING:
                with tempfile.TemporaryDirectory(dir=given.artifact.parent, prefix="tiers-") as folder:
                    seconds = beside_steps(artifact, options.threads, tiers, repeat, folder)
                copying.setdefault(tiers, []).append(seconds)
    found = {way: {n: Spread.of(held[n, way]) for n in options.tokens} for way in WAYS}
    fits = {way: fit([(n, spread.median) for n, spread in found[way].items()]) for way in WAYS}
    (compute, _) = fits["computed"]
    crossed = {way: crossover(fits[way], compute) for way in WAYS[1:]}
    ruled = {"host": rule(cost, False), "disk": rule(cost, True)}
    token_bytes = artifact.plan.kv.token_bytes
    console.print(_report(found, fits, token_bytes))
    _say(console, crossed, ruled)
    costs = {
        tiers: Spread.of(one / none - 1 for one, none in zip(copying[tiers], copying["none"], strict=True))
        for tiers in COPYING if tiers != "none"
    }  # fmt: skip
    told = ", ".join(f"{tiers} {spread.text(100, 1)} %" for tiers, spread in costs.items())
    console.print(f"copying out beside steps makes them longer by: {told}", highlight=False)
    footer(console)
    settings = {
        "shape": options.shape, "artifact": artifact.manifest["digest"], "repeats": options.repeats,
        "threads": options.threads, "kv_bytes_per_token": token_bytes,
    }  # fmt: skip
    results = {
        "seconds": found,
        "fits": {way: {"seconds_per_token": slope, "wait_seconds": wait} for way, (slope, wait) in fits.items()},
        "crossover_tokens": crossed, "rule_tokens": ruled, "rule": vars(cost),
        "copying_seconds": copying, "copying_costs": costs,
    }  # fmt: skip
    save(options.out, "tiers", settings, results)


def _report(found: dict[str, dict[int, Spread]], fits: dict[str, tuple[float, float]], token_bytes: int) -> Table:
    made = table("keys and values of N tokens", "tokens", "MiB", *(f"{way}, ms" for way in WAYS), "computed / disk")
    for tokens, computed in found["computed"].items():
        spreads = [found[way][tokens] for way in WAYS]
        share = computed.median / spreads[-1].median
        made.add_row(
            str(tokens), f"{tokens * token_bytes / 2**20:,.0f}", *(s.text(1e3, 1) for s in spreads), f"{share:,.0f}"
        )
    lines = (f"{wait * 1e3:.1f} + {slope * 1e3:.3f} N" for slope, wait in fits.values())
    made.add_row("fit", "", *lines, "")
    return made


def _say(console: Console, crossed: dict[str, int | None], ruled: dict[str, int | None]) -> None:
    told = ", ".join(f"{way} from {tokens} tokens on" for way, tokens in crossed.items())
    rules = ", ".join(f"{way} from {tokens}" for way, tokens in ruled.items())
    console.print(f"loading is faster: {told}; the engine's rule loads: {rules}", highlight=False)


if __name__ == "__main__":
    main()
