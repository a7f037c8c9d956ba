"""The same work without HTTP, and how much work it is: rates of the bare executor and of the engine, bytes and
operations of a step counted from the plan."""

from __future__ import annotations

import mmap
import queue
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from xllm.artifact import Artifact
from xllm.llm import open_engine
from xllm.plan import Plan
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.targets.cpu.executor import CpuExecutor

SEED = 0


@dataclass(frozen=True)
class Rates:
    """One sequence alone: seconds to the first token of the prompt, seconds of a decode step (median)."""

    prefill_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Demand:
    """What one sequence asks of the machine: operations of its prefill, bytes that one decode step must read."""

    prefill_flops: float
    step_bytes: float


def demand(plan: Plan, prompt_tokens: int, output_tokens: int) -> Demand:
    """Counted from the plan's calls. Operations: products and attention, the output head for one row. Bytes: each
    product's weights once, and keys and values of a sequence halfway through its answer."""
    flops, read = 0.0, float(plan.kv.token_bytes * (prompt_tokens + output_tokens / 2))
    for call in plan.calls:
        if call.op in ("xllm.linear", "xllm.gated_linear"):
            rows = call.rows.at({"T": prompt_tokens, "S": 1})
            flops += 2.0 * rows * call.ints["n"] * call.ints["k"] * (2 if "act" in call.ints else 1)
            read += plan.weights[call.args["weight"].removeprefix("@")].bytes
        if call.kernel.startswith(("attention.", "latent_attention.")):
            pairs = prompt_tokens * (prompt_tokens + 1) / 2
            flops += 2.0 * pairs * call.ints["q_heads"] * (call.ints["key_dim"] + call.ints["value_dim"])
    return Demand(flops, read)


def executor_rates(artifact: Path, threads: int, prompt_tokens: int, output_tokens: int, repeats: int) -> list[Rates]:
    """The executor driven by a loop that does nothing else: no scheduler, no KV pool, no overlap of host work."""
    opened = Artifact.open(artifact)
    executor = CpuExecutor(opened, threads, verify=False)
    spec = executor.kv
    groups = -(-(prompt_tokens + output_tokens) // spec.group_tokens)
    memory = mmap.mmap(-1, groups * spec.group_bytes)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    chunk, found = executor.limits.max_tokens_per_step, []
    for repeat in range(repeats + 1):  # the first touches the memory and is not counted
        prompt, steps, number = _prompt(prompt_tokens, executor.limits.vocab, repeat), [], 0
        executor.attach(0, Request(f"{repeat}", tuple(prompt), params), ())
        token, begin = 0, time.perf_counter()
        for start in range(0, prompt_tokens, chunk):
            part = prompt[start : start + chunk]
            row = Row(0, base, start, part, start + chunk >= prompt_tokens)
            result = executor.launch(Batch(number, (row,))).result()
            number += 1
            token = int(result.tokens[0]) if row.sample else token
        prefill = time.perf_counter() - begin
        for at in range(prompt_tokens, prompt_tokens + output_tokens - 1):
            begin = time.perf_counter()
            result = executor.launch(Batch(number, (Row(0, base, at, (token,), True),))).result()
            token, number = int(result.tokens[0]), number + 1
            steps.append(time.perf_counter() - begin)
        executor.detach(0)
        found.append(Rates(prefill, statistics.median(steps)))
    executor.close()
    return found[1:]


def engine_rates(artifact: Path, threads: int, prompt_tokens: int, output_tokens: int, repeats: int) -> list[Rates]:
    """The engine as `xllm.LLM` and the server use it, timed where its outputs leave it."""
    arrivals: queue.SimpleQueue[tuple[float, list[TokenOutput]]] = queue.SimpleQueue()
    opened = Artifact.open(artifact)
    engine, _ = open_engine(
        opened, lambda items: arrivals.put((time.perf_counter(), items)), threads=threads, prefix_cache=False
    )
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output_tokens)
    found = []
    try:
        for repeat in range(repeats + 1):
            prompt = _prompt(prompt_tokens, opened.manifest["model"]["vocab"], repeat)
            times, ended, begin = [], False, time.perf_counter()
            engine.submit(Request(f"bench-{repeat}", tuple(prompt), params))
            while not ended:
                now, items = arrivals.get()
                times += [now] * sum(item.token is not None for item in items)
                ended = any(item.finish_reason is not None for item in items)
            gaps = [b - a for a, b in pairwise(times)]
            found.append(Rates(times[0] - begin, statistics.median(gaps)))
    finally:
        engine.stop()
    return found[1:]


def _prompt(count: int, vocab: int, seed: int) -> list[int]:
    return np.random.default_rng(SEED + seed).integers(0, vocab, count).tolist()
