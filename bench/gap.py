"""How long a device waits between steps: the overlapped loop beside the plain one, with many sequences decoding.

    python -m bench.gap [--sequences 32] [--tokens 64] [--rounds 3] [--checkpoint DIR] [--artifact DIR]

Every sequence is drawn with a temperature, penalties and logprobs. A gap is from the end of a step's sampling to the
beginning of the next step's first operator, as the executor's own thread tells it; the loops take turns.
"""

from __future__ import annotations

import argparse
import queue
import random
from dataclasses import replace
from pathlib import Path

from bench.report import RESULTS, Spread, console, footer, percentile, save, table
from bench.subject import add_flags, subject
from xllm.llm import engine_config, open_model
from xllm.memory import plan_memory
from xllm.runtime import Request, SamplingParams, TokenOutput
from xllm.runtime.engine import Engine
from xllm.targets import host
from xllm.targets.cpu.bound import StepTimes
from xllm.targets.cpu.executor import CpuExecutor

LOOPS = {"overlapped": True, "plain": False}
SHARES = (0.5, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gap", description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("--sequences", type=int, default=32, metavar="N", help="decoding together (default 32)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="in turns (default 3)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=RESULTS / "gap.json", metavar="FILE")
    options = parser.parse_args()
    out = console()
    threads = host.threads(options.threads).count
    with subject(options, out) as given:
        runs: dict[str, list[tuple[list[float], float]]] = {loop: [] for loop in LOOPS}
        for _ in range(options.rounds):
            for loop, overlapped in LOOPS.items():
                runs[loop].append(measure(given.artifact, options.sequences, options.tokens, threads, overlapped))
    made = table(
        f"between steps of {options.sequences} sequences", "loop", "p50 us", "p99 us", "step ms", "share of a step"
    )
    results = {}
    for loop, found in runs.items():
        p50, p99 = (Spread.of(percentile(gaps, share) for gaps, _ in found) for share in SHARES)
        step = Spread.of(seconds for _, seconds in found)
        made.add_row(loop, p50.text(1e6, 0), p99.text(1e6, 0), step.text(1e3, 1), f"{p50.median / step.median:.2%}")
        results[loop] = {"p50_seconds": p50, "p99_seconds": p99, "step_seconds": step}
    out.print(made)
    footer(out)
    artifact = open_model(given.artifact) if given.artifact.exists() else None
    settings = {
        "shape": options.shape, "artifact": artifact.manifest["digest"] if artifact else None, "threads": threads,
        "sequences": options.sequences, "tokens": options.tokens, "rounds": options.rounds,
    }  # fmt: skip
    save(options.out, "gap", settings, results)


def measure(path: Path, sequences: int, tokens: int, threads: int, overlapped: bool) -> tuple[list[float], float]:
    """Gaps between steps that decode all of them, and the median time from step to step; seconds."""
    artifact = open_model(path)
    executor = CpuExecutor(artifact, threads)
    times = executor.times = []
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    ledger = plan_memory(artifact, None, 2 * sequences, True)
    config = engine_config(artifact, ledger, None, overlapped)
    room = 2 * sequences * ledger.pool.page_bytes  # all of them run, however small the pages' number was
    engine = Engine(executor, replace(config, kv_bytes=max(config.kv_bytes, room)), outputs.put)
    source, vocab = random.Random(0), artifact.manifest["model"]["vocab"]
    drawn = SamplingParams(
        temperature=1.0, top_p=0.95, presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.1,
        logprobs=5, max_tokens=tokens, ignore_eos=True,
    )  # fmt: skip
    for at in range(sequences):
        prompt = tuple(source.randrange(vocab) for _ in range(16))
        engine.submit(Request(f"{at}", prompt, replace(drawn, seed=at)))
    engine.start()
    try:
        left = sequences
        while left:
            left -= sum(output.finish_reason is not None for output in outputs.get())
    finally:
        engine.stop()
    return between([step for step in times if step.tokens == sequences])


def between(steps: list[StepTimes]) -> tuple[list[float], float]:
    begins = [step.ended - step.sample - float(step.calls.sum()) for step in steps]
    gaps = [begin - step.ended for begin, step in zip(begins[1:], steps, strict=False)]
    periods = [after.ended - step.ended for after, step in zip(steps[1:], steps, strict=False)]
    return gaps, percentile(periods, 0.5)


if __name__ == "__main__":
    main()
