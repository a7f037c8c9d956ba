"""Sampler speed: microseconds per row of logits, beside the time that merely reading the row takes in the same run.

    python bench/sampling.py [--threads N] [--rows N] [--vocab N]

Two kinds of rows: "peaked", as trained models write them (a few hundred tokens far above a noisy floor), and "flat"
Gaussian ones, as random weights write them, the worst case of top-p. Both times are the best of many repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from xllm.kernels.cpu import Runner
from xllm.kernels.cpu.sampling import Sampler
from xllm.runtime.request import SamplingParams

HISTORY = 2000
CASES = {
    "greedy": SamplingParams(temperature=0, seed=1),
    "greedy, 5 logprobs": SamplingParams(temperature=0, seed=1, logprobs=5),
    "temperature": SamplingParams(seed=1),
    "top-p 0.9": SamplingParams(seed=1, top_p=0.9),
    "top-p 0.99": SamplingParams(seed=1, top_p=0.99),
    "top-k 20, top-p 0.95": SamplingParams(seed=1, top_k=20, top_p=0.95),
    "top-k 5000": SamplingParams(seed=1, top_k=5000),
    "min-p 0.05": SamplingParams(seed=1, min_p=0.05),
    f"temperature, penalties on {HISTORY} tokens": SamplingParams(
        seed=1, repetition_penalty=1.1, frequency_penalty=0.1
    ),
}


def logits(kind: str, rows: int, vocab: int) -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, vocab), np.float32) * np.float32(2)
    if kind == "peaked":
        count = min(300, vocab)
        for row in values:
            row[random.choice(vocab, count, replace=False)] += np.float32(18) * random.random(count, np.float32) ** 4
    return values


def microseconds(sampler: Sampler, rows: np.ndarray, params: SamplingParams, prompt: np.ndarray) -> float:
    """Time of a step, per row."""
    slots = np.arange(len(rows), dtype=np.int32)
    for slot in slots:
        sampler.attach(int(slot), params, prompt)
    times = []
    for _ in range(100):
        begin = time.perf_counter()
        sampler.sample(rows.ctypes.data, slots)
        times.append(time.perf_counter() - begin)
    return min(times) / len(rows) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=151_936)
    options = parser.parse_args()
    table = Table("rows", "sampling", "µs per row", "x read", title="xllm sampler")
    for column in table.columns[2:]:
        column.justify = "right"
    reads = []
    with Runner(options.threads) as runner:
        sampler = Sampler(runner, options.vocab, options.rows)
        prompt = np.random.default_rng(1).integers(0, options.vocab, HISTORY)
        for kind in ("peaked", "flat"):
            rows = logits(kind, options.rows, options.vocab)
            for name, params in CASES.items():
                # The ceiling is taken beside each case: a shared machine changes from second to second.
                reads.append(rows.nbytes / runner.read_bandwidth(rows.nbytes, repeats=100) / len(rows) * 1e6)
                taken = microseconds(sampler, rows, params, prompt)
                table.add_row(kind, name, f"{taken:.1f}", f"{taken / reads[-1]:.1f}")
        level = runner.level
    console = Console()
    console.print(table)
    console.print(
        f"{platform.machine()}, {level}, {options.threads} of {os.cpu_count()} threads, {options.rows} rows of "
        f"{options.vocab} float32; reading a row takes {statistics.median(reads):.1f} µs (median of the run)"
    )


if __name__ == "__main__":
    main()
