"""How a step runs: laid out when it is launched, one native call, of which drawing is a part."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bench.checkpoints import write_checkpoint
from tests.models import FAMILIES
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.kernels.cpu import Runner
from xllm.kernels.cpu.sampling import Sampler
from xllm.measure.machine import state_memory
from xllm.runtime.errors import StepError
from xllm.runtime.executor import Batch, Row, StepResult
from xllm.runtime.masks import Masks
from xllm.runtime.request import Request, SamplingParams
from xllm.targets.cpu.executor import CpuExecutor, Ticket

PARAMS = SamplingParams(temperature=0.9, seed=7, logprobs=2)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("executor")
    checkpoint = write_checkpoint(folder / "tiny", FAMILIES["qwen3"], dtype="float32")
    compile_checkpoint(checkpoint, folder / "tiny.xllm", CompileOptions(max_batch_tokens=64, max_len=128, max_seqs=4))
    return Artifact.open(folder / "tiny.xllm")


class Anything:
    """A grammar that lets every token be drawn, and makes no mask before somebody waits for it."""

    def __init__(self) -> None:
        self.waited_for = threading.Event()
        self.seconds = 0.0  # that it took from then on

    def start(self) -> Anything:
        return self

    def take(self, tokens: list[int]) -> None:
        pass

    def fill(self, bits: np.ndarray) -> None:
        self.waited_for.wait()
        self.waited_for.clear()
        began = time.perf_counter()
        bits[:] = 0xFFFFFFFF
        self.seconds += time.perf_counter() - began


def answers(artifact: Artifact, grammar: Anything | None = None, ahead: bool = True) -> tuple[list[bytes], float]:
    """Tokens and logprobs of a prompt and of four steps behind it, all launched at once, each as a placeholder for what
    the one before it draws; or one by one. And seconds of choosing tokens."""
    executor = CpuExecutor(artifact, 2)
    memory = state_memory(executor.kv.bytes_for(64))
    executor.times = took = []
    results: list[StepResult] = []
    try:
        executor.attach(0, Request("one", (5, 6, 7), replace(PARAMS, grammar=grammar)), ())
        handles = []
        for at in range(5):
            tokens = (5, 6, 7) if at == 0 else (-1,) if ahead else (int(results[-1].tokens[0]),)
            row = Row(0, memory.ctypes.data, 2 + at if at else 0, tokens, True)
            handles.append(executor.launch(Batch(at, (row,))))
            if not ahead:
                results.append(handles[-1].result())
        results = [handle.result() for handle in handles]
    finally:
        executor.close()
    assert all(result.tokens[0] >= 0 for result in results)
    found = [result.tokens.tobytes() + result.logprobs.tobytes() + result.top_ids.tobytes() for result in results]
    return found, sum(step.sample for step in took)


def test_a_step_is_one_native_call_and_two_where_a_mask_may_be_late(artifact, monkeypatch) -> None:
    calls: Counter[str] = Counter()
    grammar, wait = Anything(), Masks.wait
    monkeypatch.setattr(Masks, "wait", lambda *args: (grammar.waited_for.set(), wait(*args))[1])

    def counted(kind, name: str) -> None:
        inner = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, **named: (calls.update([name]), inner(*args, **named))[1])

    counted(Runner, "_run")
    counted(Sampler, "draw")
    alone, _ = answers(artifact)
    assert calls == {"_run": 5} and len(set(alone)) > 1
    calls.clear()
    masked, drawing = answers(artifact, grammar)
    assert masked == alone and calls == {"_run": 5, "draw": 5}
    assert drawing > grammar.seconds > 0, "the wait for masks is part of choosing tokens"


def test_placeholders_stand_for_what_the_step_before_drew(artifact) -> None:
    assert answers(artifact)[0] == answers(artifact, ahead=False)[0]


def test_a_step_that_cannot_be_is_refused_and_the_next_one_runs(artifact) -> None:
    executor = CpuExecutor(artifact, 1)
    memory = state_memory(executor.kv.bytes_for(64))

    def launch(slot: int, tokens: tuple[int, ...], sample: bool = True) -> Ticket:
        return executor.launch(Batch(0, (Row(slot, memory.ctypes.data, 0, tokens, sample),)))

    try:
        for slot, tokens, why in ((99, (5,), "slots"), (0, (-99,), "row 98"), (0, (5,) * 65, "65 tokens and 1 rows")):
            with pytest.raises(StepError, match=f"device_error: .*{why}"):
                launch(slot, tokens)
        with pytest.raises(StepError, match="not attached"):
            launch(0, (5,)).result()
        executor.attach(0, Request("one", (5,), PARAMS), ())
        first = launch(0, (5,))
        missing, behind, silent, lost = launch(0, (-2,)), launch(0, (-1,)), launch(0, (5,), False), launch(0, (-1,))
        assert first.result().tokens[0] >= 0 and behind.result().tokens[0] >= 0
        assert len(silent.result().tokens) == 0
        for handle in (missing, lost):
            with pytest.raises(StepError, match="outside the vocabulary"):
                handle.result()
        # A prompt that is scored is laid out later; what others launch is not.
        asking = replace(PARAMS, prompt_logprobs=0)
        executor.attach(1, Request("two", (5, 6), asking), ())
        with pytest.raises(StepError, match="65 tokens"):
            launch(0, (5,) * 65)
        with pytest.raises(StepError, match="65 tokens"):
            launch(1, (5,) * 66).result()
    finally:
        executor.close()
