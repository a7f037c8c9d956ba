"""onnxruntime-genai: one generator for a batch of prompts of one length, a step at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai  # pyright: ignore[reportMissingImports]

from bench.peers.child import Arrivals, Job


class OnnxRuntime:
    def __init__(self, job: Job) -> None:
        config = onnxruntime_genai.Config(job.model)
        threads = {"intra_op_num_threads": job.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = onnxruntime_genai.Model(config)

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        length = len(prompts[0]) + output
        params = onnxruntime_genai.GeneratorParams(self._model)
        # Held to the length asked for, it ends no sequence before.
        params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        arrivals: Arrivals = [[] for _ in prompts]
        for _ in range(output):
            generator.generate_next_token()
            now, tokens = time.perf_counter(), generator.get_next_tokens()
            for row, token in enumerate(tokens):
                arrivals[row].append((now, int(token)))
        return arrivals


def open_peer(job: Job) -> OnnxRuntime:
    return OnnxRuntime(job)
