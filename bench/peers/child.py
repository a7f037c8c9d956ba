"""One measurement as a process of its own: a job in, one line of JSON out. Runs in the environment of a peer, so it
imports nothing of ours but the adapter, which is named on the command line.

    build/peers/NAME/bin/python -m bench.peers.child ADAPTER JOB

An adapter is a module with `open_peer(job)`, which gives an object with `run(prompts, output) -> arrivals`: for each
prompt, the tokens and the times (time.perf_counter) at which they were there. Every peer is given all prompts at once,
decodes greedily, and ends a sequence by length alone.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ADAPTERS = ("xllm", "llamacpp", "openvino", "onnxruntime", "transformers", "transformers_batch", "vllm")
WARM_TOKENS = (16, 4)  # prompt and output of the run that is not counted

Arrivals = list[list[tuple[float, int]]]


@dataclass(frozen=True)
class Job:
    """What to run: `sequences` prompts of `prompt` random ids, `output` tokens each, on `threads` threads."""

    model: str
    sequences: int
    prompt: int
    output: int
    threads: int
    vocab: int
    seed: int = 0

    def text(self) -> str:
        return json.dumps(asdict(self))


class Peer(Protocol):
    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals: ...


def prompts(job: Job, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Random ids, the same for every peer (of the standard library's generator, not of a version of numpy)."""
    source = random.Random(f"{job.seed}/{seed}")
    return [[source.randrange(job.vocab) for _ in range(tokens)] for _ in range(count)]


def figures(arrivals: Arrivals, begin: float) -> dict[str, Any]:
    """What is reported of a run: seconds to the last first token, and tokens a second while all sequences decoded.

    The rate counts from the last first token to the first last one, so that neither prefill nor a thinning batch is in.
    """
    firsts, lasts = max(times[0][0] for times in arrivals), min(times[-1][0] for times in arrivals)
    counted = sum(firsts < at <= lasts for times in arrivals for at, _ in times)
    gaps = [b - a for times in arrivals for (a, _), (b, _) in itertools.pairwise(times)]
    return {
        "prefill_seconds": firsts - begin,
        "decode_tokens_per_second": counted / (lasts - firsts) if counted else None,
        "step_seconds": statistics.median(gaps) if gaps else None,
        "tokens": [token for _, token in arrivals[0][:8]],
    }


def peak_bytes() -> int:
    """The most memory this process ever had resident, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def measure(peer: Peer, job: Job) -> dict[str, Any]:
    """Runs once to warm up, with as many sequences (some peers compile for a number of them), then for the figures.
    Raises ValueError when an answer has another length."""
    peer.run(prompts(job, job.sequences, WARM_TOKENS[0], 1), WARM_TOKENS[1])
    asked = prompts(job, job.sequences, job.prompt, 0)
    begin = time.perf_counter()
    arrivals = peer.run(asked, job.output)
    if (found := [len(times) for times in arrivals]) != [job.output] * job.sequences:
        raise ValueError(f"sequences of {found} tokens came instead of {job.sequences} of {job.output}")
    return {**figures(arrivals, begin), "peak_bytes": peak_bytes()}


def main() -> None:
    adapter, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    if adapter not in ADAPTERS:
        raise SystemExit(f"no adapter {adapter}: one of {', '.join(ADAPTERS)}")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(job.threads)
    peer = importlib.import_module(f"bench.peers.with_{adapter}").open_peer(job)
    print(json.dumps(measure(peer, job)), flush=True)
    os._exit(0)  # what a peer does at its end is not of interest, and some crash there


if __name__ == "__main__":
    main()
