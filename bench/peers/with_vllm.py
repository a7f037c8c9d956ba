"""vLLM on a CPU, in this process (its engine otherwise runs in another, whose memory would not be counted): all prompts
at once, a step of its engine at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from bench.peers.child import Arrivals, Job

PAGE_TOKENS = 128  # its own choice
FREE_MEMORY = 0.5  # of all, that it wants to find free; nearly all by default, for pages it is not given here


class Vllm:
    def __init__(self, job: Job) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        import vllm  # reads the environment as it is imported  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        length = job.prompt + job.output
        self._engine = vllm.LLM(
            job.model, dtype="bfloat16", max_model_len=length, max_num_seqs=job.sequences, enable_prefix_caching=False,
            num_gpu_blocks_override=job.sequences * -(-length // PAGE_TOKENS) + 1, disable_log_stats=True,
            gpu_memory_utilization=FREE_MEMORY,
        ).llm_engine  # fmt: skip
        self._settings = lambda output: vllm.SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        for row, prompt in enumerate(prompts):
            self._engine.add_request(str(row), {"prompt_token_ids": list(prompt)}, self._settings(output))
        arrivals: Arrivals = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            found = self._engine.step()
            now = time.perf_counter()
            for one in found:
                arrivals[int(one.request_id)].extend((now, token) for token in one.outputs[0].token_ids)
        return arrivals


def open_peer(job: Job) -> Vllm:
    return Vllm(job)
