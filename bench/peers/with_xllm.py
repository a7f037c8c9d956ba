"""xllm in a process of its own: the engine that `xllm.LLM` and the server use, timed where its outputs leave it."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence

from bench.peers.child import Arrivals, Job
from xllm.artifact import Artifact
from xllm.llm import open_engine
from xllm.runtime.request import Request, SamplingParams, TokenOutput


class Xllm:
    def __init__(self, job: Job) -> None:
        self._outputs: queue.SimpleQueue[tuple[float, list[TokenOutput]]] = queue.SimpleQueue()
        self._engine, _ = open_engine(
            Artifact.open(job.model),
            lambda items: self._outputs.put((time.perf_counter(), items)),
            threads=job.threads,
            prefix_cache=False,
        )
        self._runs = 0

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=output)
        names = {f"{self._runs}-{row}": row for row in range(len(prompts))}
        self._runs += 1
        for name, row in names.items():
            self._engine.submit(Request(name, tuple(prompts[row]), params))
        arrivals: Arrivals = [[] for _ in prompts]
        running = len(prompts)
        while running:
            now, items = self._outputs.get()
            for item in items:
                if item.token is not None:
                    arrivals[names[item.request_id]].append((now, item.token))
                running -= item.finish_reason is not None
        return arrivals


def open_peer(job: Job) -> Xllm:
    return Xllm(job)
