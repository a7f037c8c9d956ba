"""transformers in bfloat16: a static cache and a compiled step, for one sequence and for a batch of equal lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers

from bench.peers.child import Arrivals, Job


class Transformers:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
        self._model, self._job = model.eval(), job
        self._step = torch.compile(model.forward, dynamic=False)

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        """One sequence, or as many of one length as a batch of one static cache: prompts one after another, then steps
        of all."""
        batch, length = len(prompts), len(prompts[0])
        cache = transformers.StaticCache(self._model.config, max_cache_len=self._job.prompt + self._job.output)
        ids = torch.tensor(prompts)
        places = torch.arange(length)
        state = self._model(ids, past_key_values=cache, position_ids=places[None].expand(batch, -1), logits_to_keep=1)
        token = state.logits[:, -1].argmax(-1, keepdim=True)
        found = [(time.perf_counter(), token[:, 0].tolist())]
        for at in range(length, length + output - 1):
            place = torch.full((batch, 1), at)
            state = self._step(token, past_key_values=cache, position_ids=place)
            token = state.logits[:, -1].argmax(-1, keepdim=True)
            found.append((time.perf_counter(), token[:, 0].tolist()))
        return [[(now, tokens[row]) for now, tokens in found] for row in range(batch)]


def open_peer(job: Job) -> Transformers:
    return Transformers(job)
