"""transformers' continuous batching in bfloat16, `generate_batch`: all prompts at once; it notes when tokens came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from bench.peers.child import Arrivals, Job


class TransformersBatch:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
        self._model = model.eval()

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        settings = transformers.GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1)
        found = self._model.generate_batch(
            inputs=[list(prompt) for prompt in prompts], generation_config=settings, record_timestamps=True
        )
        ordered = sorted(found.values(), key=lambda one: int(one.request_id.rsplit("_", 1)[-1]))
        return [list(zip(one.timestamps or (), one.generated_tokens, strict=True)) for one in ordered]


def open_peer(job: Job) -> TransformersBatch:
    return TransformersBatch(job)
