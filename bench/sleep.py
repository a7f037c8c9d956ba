"""What a server gives back when it sleeps, and what it takes to wake: resident memory, seconds, the first token after.

    python -m bench.sleep [--checkpoint DIR] [--artifact DIR] [--repeats 5]

"light" leaves the weights in the system's cache of files, "deep" drops them there too, so that waking reads the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import load, report
from bench.report import RESULTS, Spread, footer, save, table
from bench.server import Memory, Server, serving
from bench.subject import add_flags, subject
from xllm.artifact import Artifact

LEVELS = ("light", "deep")
KEY = "bench"


@dataclass(frozen=True)
class Nap:
    """One sleep. Resident bytes before, asleep and once the first answer after it is there; seconds of both orders and
    to the first token after waking, and those of an equal request before."""

    before: Memory
    asleep: Memory
    after: Memory
    to_sleep: float
    to_wake: float
    first_token: float
    warm_token: float


def resident(memory: Memory) -> int:
    return memory.weights + memory.kv + memory.anonymous + memory.code


def nap(server: Server, target: load.Target, works: list[load.Work], level: str) -> Nap:
    """Raises RuntimeError when an answer or an order fails."""

    def order(path: str, body: Mapping[str, Any]) -> float:
        begin = time.perf_counter()
        answer = httpx.post(server.url + path, json=body, headers={"x-api-key": KEY}, timeout=120)
        if answer.status_code != 200 or not answer.json()["changed"]:
            raise RuntimeError(f"{path} gave {answer.status_code}: {answer.text}")
        return time.perf_counter() - begin

    def first(work: load.Work) -> float:
        outcome = asyncio.run(load.send(target, work))
        if outcome.error is not None:
            raise RuntimeError(f"the request failed: {outcome.error}")
        return outcome.events[0] - outcome.start

    first(works[0])
    warm, before = first(works[1]), server.memory()
    fell = order("/sleep", {"level": level, "mode": "wait"})
    asleep = server.memory()
    woke = order("/wakeup", {})
    token = first(works[2])
    return Nap(before, asleep, server.memory(), fell, woke, token, warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", default="4GiB", metavar="SIZE")
    parser.add_argument("--out", type=Path, default=RESULTS / "sleep.json")
    options = parser.parse_args()
    console = report.console()
    naps: dict[str, list[Nap]] = {level: [] for level in LEVELS}
    with subject(options, console) as given, tempfile.NamedTemporaryFile("w") as keys:
        os.sync()  # what is not on the disk yet cannot leave the cache
        keys.write(KEY)
        keys.flush()
        artifact = Artifact.open(given.artifact)
        extra, vocab = load.one_letter(artifact), artifact.manifest["model"]["vocab"]
        works = load.uniform(3 * options.repeats * len(LEVELS), options.prompt, 4, vocab, seed=0)
        flags = ("--threads", str(options.threads), "--memory", options.memory, "--admin-key-file", keys.name)
        with serving(given.artifact, *flags) as server:
            target = load.Target(server.url, artifact.name, extra)
            for _ in range(options.repeats):
                for level in LEVELS:
                    mine, works = works[:3], works[3:]
                    naps[level].append(nap(server, target, mine, level))
    results = {level: _figures(found) for level, found in naps.items()}
    made = table("xllm serve: sleeping and waking", "", *LEVELS)
    for name in results["light"]:
        scale, digits = (1e-6, 0) if name.endswith("bytes") else (1.0, 3)
        unit = "MB" if scale < 1 else "s"
        made.add_row(f"{name.rpartition('_')[0].replace('_', ' ')}, {unit}",
                     *(results[level][name].text(scale, digits) for level in LEVELS))  # fmt: skip
    console.print(made)
    footer(console)
    settings = {
        "shape": options.shape, "artifact": artifact.manifest["digest"], "repeats": options.repeats,
        "prompt_tokens": options.prompt, "threads": options.threads, "memory": options.memory,
        "weight_bytes": artifact.weight_bytes,
    }  # fmt: skip
    save(options.out, "sleep", settings, results)


def _figures(naps: list[Nap]) -> dict[str, Spread]:
    return {
        "resident_before_bytes": Spread.of(resident(nap.before) for nap in naps),
        "resident_asleep_bytes": Spread.of(resident(nap.asleep) for nap in naps),
        "weights_asleep_bytes": Spread.of(nap.asleep.weights for nap in naps),
        "kv_asleep_bytes": Spread.of(nap.asleep.kv for nap in naps),
        "resident_after_bytes": Spread.of(resident(nap.after) for nap in naps),
        "to_sleep_seconds": Spread.of(nap.to_sleep for nap in naps),
        "to_wake_seconds": Spread.of(nap.to_wake for nap in naps),
        "first_token_before_seconds": Spread.of(nap.warm_token for nap in naps),
        "first_token_after_seconds": Spread.of(nap.first_token for nap in naps),
    }


if __name__ == "__main__":
    main()
