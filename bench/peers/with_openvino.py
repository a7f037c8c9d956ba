"""OpenVINO GenAI's continuous batching: requests are added, steps are made, tokens are read as they come."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai  # pyright: ignore[reportMissingImports]

from bench.peers.child import Arrivals, Job


class OpenVino:
    def __init__(self, job: Job) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 4  # GiB
        scheduler.max_num_seqs = max(job.sequences, 2)
        scheduler.enable_prefix_caching = False
        settings = {"INFERENCE_NUM_THREADS": job.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", settings)
        self._asked = 0

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = output, True, False
        handles = []
        for prompt in prompts:
            ids = openvino.Tensor(np.array([prompt], np.int64))
            handles.append(self._pipeline.add_request(self._asked, ids, config))
            self._asked += 1
        arrivals: Arrivals = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for row, handle in enumerate(handles):
                while handle.can_read():
                    for part in handle.read().values():
                        arrivals[row] += [(now, token) for token in part.generated_ids]
        return arrivals


def open_peer(job: Job) -> OpenVino:
    return OpenVino(job)
