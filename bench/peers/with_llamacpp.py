"""llama.cpp, through the C interface that llama-cpp-python binds: prompts in pieces of its batch, then one step after
another for all sequences."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from bench.peers.child import Arrivals, Job

BATCH = 2048  # its default for what one call may bring; it computes 512 at a time


class LlamaCpp:
    def __init__(self, job: Job) -> None:
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(job.model.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        each = -(-(job.prompt + job.output) // 256) * 256
        settings.n_ctx, settings.n_seq_max, settings.n_batch = each * job.sequences, job.sequences, BATCH
        settings.n_threads = settings.n_threads_batch = job.threads
        self._context = model and llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not open {job.model}")
        self._vocab, self._batch = job.vocab, llama_cpp.llama_batch_init(BATCH, 0, 1)

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> Arrivals:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        arrivals: Arrivals = [[] for _ in prompts]
        for row, prompt in enumerate(prompts):
            for at in range(0, len(prompt), BATCH):
                part = prompt[at : at + BATCH]
                last = at + len(part) == len(prompt)
                rows = [(token, at + index, row, last and index + 1 == len(part)) for index, token in enumerate(part)]
                self._decode(rows)
            arrivals[row].append((time.perf_counter(), self._best(-1)))
        for step in range(output - 1):
            self._decode([(a[-1][1], len(prompts[row]) + step, row, True) for row, a in enumerate(arrivals)])
            tokens = [self._best(row) for row in range(len(prompts))]
            now = time.perf_counter()
            for row, token in enumerate(tokens):
                arrivals[row].append((now, token))
        return arrivals

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """float32 [vocab] behind the prompt's last token (at most one batch)."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._decode([(token, at, 0, at + 1 == len(prompt)) for at, token in enumerate(prompt)])
        return self._logits(-1).copy()

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """One call for rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, wanted
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode said {code}")

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self._vocab,))

    def _best(self, row: int) -> int:
        return int(self._logits(row).argmax())


def open_peer(job: Job) -> LlamaCpp:
    return LlamaCpp(job)
