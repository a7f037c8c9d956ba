"""transformers' continuous batching in bfloat16, `generate_batch`: all prompts at once; it notes when tokens came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from bench.peers.child import Arrivals, Job

PAGE_TOKENS = 256
BATCH_TOKENS = 2048  # its default, 8192, takes a mask of gigabytes; so much is one call of llama.cpp's too


class TransformersBatch:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
        pages = job.sequences * -(-(job.prompt + job.output) // PAGE_TOKENS)
        # Left to itself it takes nine tenths of what memory is free.
        self._cache = transformers.ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=pages + 1, max_batch_tokens=BATCH_TOKENS
        )
        self._model = model.eval()

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        settings = transformers.GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1)
        found = self._model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=settings,
            continuous_batching_config=self._cache,
            record_timestamps=True,
            persistent_manager=True,  # the cache is made when it warms up, as every other peer's is
        )
        ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        return [list(zip(one.timestamps or (), one.generated_tokens, strict=True)) for one in ordered]


def open_peer(job: Job) -> TransformersBatch:
    return TransformersBatch(job)
