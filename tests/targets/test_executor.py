"""How a step runs: laid out when it is launched, one native call, of which drawing is a part."""

from __future__ import annotations

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
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams
from xllm.targets.cpu.executor import CpuExecutor

PARAMS = SamplingParams(temperature=0.9, seed=7, logprobs=2)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("executor")
    checkpoint = write_checkpoint(folder / "tiny", FAMILIES["qwen3"], dtype="float32")
    compile_checkpoint(checkpoint, folder / "tiny.xllm", CompileOptions(max_batch_tokens=64, max_len=128, max_seqs=4))
    return Artifact.open(folder / "tiny.xllm")


class Anything:
    """A grammar that lets every token be drawn."""

    def start(self) -> Anything:
        return self

    def take(self, tokens: list[int]) -> None:
        pass

    def fill(self, bits: np.ndarray) -> None:
        bits[:] = 0xFFFFFFFF


def answers(artifact: Artifact, grammar: Anything | None) -> list[bytes]:
    """Tokens and logprobs of a prompt and of four steps behind it, each launched before the one before it has ended."""
    executor = CpuExecutor(artifact, 2)
    memory = state_memory(executor.kv.bytes_for(64))
    params = replace(PARAMS, grammar=grammar)
    try:
        executor.attach(0, Request("one", (5, 6, 7), params), ())
        rows = [Row(0, memory.ctypes.data, 0, (5, 6, 7), True)]
        rows += [Row(0, memory.ctypes.data, 3 + at, (-1,), True) for at in range(4)]
        handles = [executor.launch(Batch(at, (row,))) for at, row in enumerate(rows)]
        results = [handle.result() for handle in handles]
    finally:
        executor.close()
    assert all(result.tokens[0] >= 0 for result in results)
    return [result.tokens.tobytes() + result.logprobs.tobytes() + result.top_ids.tobytes() for result in results]


def test_a_step_is_one_native_call_and_two_where_a_mask_may_be_late(artifact, monkeypatch) -> None:
    calls: Counter[str] = Counter()

    def counted(kind, name: str) -> None:
        inner = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, **named: (calls.update([name]), inner(*args, **named))[1])

    counted(Runner, "_run")
    counted(Sampler, "draw")
    alone = answers(artifact, None)
    assert calls == {"_run": 5}
    calls.clear()
    assert answers(artifact, Anything()) == alone
    assert calls == {"_run": 5, "draw": 5}


def test_what_cannot_be_laid_out_is_refused_at_its_launch(artifact) -> None:
    executor = CpuExecutor(artifact, 1)
    memory = state_memory(executor.kv.bytes_for(64))
    try:
        for slot, tokens in ((99, (5,)), (0, (-99,)), (0, (5,) * 65)):
            with pytest.raises(StepError, match="device_error"):
                executor.launch(Batch(0, (Row(slot, memory.ctypes.data, 0, tokens, True),)))
        executor.attach(0, Request("one", (5,), PARAMS), ())
        row = Row(0, memory.ctypes.data, 0, (5,), True)
        assert executor.launch(Batch(1, (row,))).result().tokens[0] >= 0
    finally:
        executor.close()
