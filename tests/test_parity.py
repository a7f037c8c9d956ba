"""The compiled plan against transformers: logits over chunked prefill and 32 decode steps, and the same greedy
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.models import DENSE, EXPERTS, FAMILIES, HYBRIDS, MLA, ODD, VOCAB, WatchedExecutor, build
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams

DECODE_STEPS = 32
# Their frequencies change with the length so far. A row of our table is what transformers computes when it gets there
# token by token; a prompt at once gives it other keys, and then the schedule would decide the answer.
LENGTH_DEPENDENT = ("llama-dynamic",)

FIRST_DENSE = ("glm4-moe", "deepseek-v2-moe", "deepseek-v3-moe")  # of two layers


@pytest.mark.parametrize("name", [*FAMILIES, *ODD, *DENSE, *HYBRIDS])
def test_float32(name: str, tmp_path: Path) -> None:
    assert worst_difference(tmp_path, name, "float32", CompileOptions()) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "qwen3-moe", "qwen3-next", "qwen3.5"])
def test_bfloat16_weights(name: str, tmp_path: Path) -> None:
    """transformers runs in float32 on the same rounded weights."""
    assert worst_difference(tmp_path, name, "bfloat16", CompileOptions(kv="float32")) <= 1e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name: str, tmp_path: Path) -> None:
    assert worst_difference(tmp_path, name, "float32", CompileOptions()) <= 1e-5
    layers = [call.kernel for call in Artifact.open(tmp_path / "tiny.xllm").plan.calls if call.kernel == "moe.f32"]
    assert len(layers) == 2 - FIRST_DENSE.count(name)


@pytest.mark.parametrize("name", MLA)
def test_latent_attention(name: str, tmp_path: Path) -> None:
    assert worst_difference(tmp_path, name, "float32", CompileOptions()) <= 1e-5


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_latent_attention_expanded(name: str, tmp_path: Path) -> None:
    """Without the pass: full keys, and values of another width, kept for every head."""
    assert worst_difference(tmp_path, name, "float32", CompileOptions(disable=("absorb-mla",))) <= 1e-5


@pytest.mark.parametrize(("kv", "most"), [("bfloat16", 2e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "deepseek-v3"])
def test_rounded_state(name: str, kv: str, most: float, tmp_path: Path) -> None:
    assert worst_difference(tmp_path, name, "float32", CompileOptions(kv=kv)) <= most


@pytest.mark.parametrize("disabled", ["fuse-rms-norm", "fuse-rope"])
def test_operators_alone(disabled: str, tmp_path: Path) -> None:
    """Without a fusion its operators run one by one, and compute the same."""
    assert worst_difference(tmp_path, "qwen3", "float32", CompileOptions(disable=(disabled,))) <= 1e-5


def worst_difference(folder: Path, name: str, dtype: str, options: CompileOptions) -> float:
    """Largest ‖out - ref‖/‖ref‖ over a prefill in uneven chunks and a greedy decode, with another sequence beside it.

    Asserts that greedy tokens are equal as long as both saw the same history (always, with float32 state).
    """
    config = {**FAMILIES, **ODD, **DENSE, **HYBRIDS, **EXPERTS, **MLA}[name]
    checkpoint, path = build(folder, config, dtype=dtype, options=options)
    in_torch = [call.node for call in Artifact.open(path).plan.calls if call.kernel == "torch"]
    assert not in_torch
    return worst_beside(path, Reference(checkpoint, at_once=name not in LENGTH_DEPENDENT), options)


def worst_beside(path: Path, reference: Reference, options: CompileOptions) -> float:
    """As `worst_difference`, of the artifact at `path`."""
    prompt = np.random.default_rng(7).integers(0, VOCAB, 45).tolist()
    worst = 0.0
    with opened(path) as (executor, spans):
        greedy = SamplingParams(temperature=0)
        for slot in (0, 1):
            executor.attach(slot, Request(str(slot), tuple(prompt), greedy), ())
        other = prompt[::-1]
        executor.launch(
            Batch(0, (Row(1, spans[1], 0, other[:33], True), Row(0, spans[0], 0, prompt[:17], False)))
        ).result()
        tokens = list(prompt)
        result = executor.launch(
            Batch(1, (Row(0, spans[0], 17, prompt[17:], True), Row(1, spans[1], 33, other[33:], True)))
        ).result()
        for step in range(DECODE_STEPS):
            wanted = reference.logits(tokens)
            got = executor.seen[0, len(tokens) - 1]
            worst = max(worst, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
            if options.kv in (None, "float32"):
                assert int(result.tokens[0]) == int(wanted.argmax())
            tokens.append(int(wanted.argmax()))
            row = Row(0, spans[0], len(tokens) - 1, tokens[-1:], True)
            result = executor.launch(Batch(2 + step, (row,))).result()
    return worst


class Reference:
    """transformers in float32 with its own cache: the prompt at once or token by token, then one token at a time."""

    def __init__(self, checkpoint: Path, at_once: bool) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()
        self._cache = DynamicCache(config=model.config)
        self._known, self._at_once = 0, at_once

    def logits(self, tokens: list[int]) -> np.ndarray:
        new = tokens[self._known :]
        self._known = len(tokens)
        with torch.no_grad():
            for piece in [new] if self._at_once else [[token] for token in new]:
                out = self._model(input_ids=torch.tensor([piece]), past_key_values=self._cache, use_cache=True)
        return out.logits[0, -1].numpy()  # pyright: ignore[reportPossiblyUnboundVariable]


@contextmanager
def opened(path: Path) -> Iterator[tuple[WatchedExecutor, list[int]]]:
    """An executor and two spans of plain memory, filled with NaN so that reading an unwritten position shows."""
    executor = WatchedExecutor(Artifact.open(path), threads=2)
    length = executor.kv.bytes_for(128)
    memory = np.full(2 * length + 64, 0xFF, np.uint8)
    base = -(-memory.ctypes.data // 64) * 64
    try:
        yield executor, [base, base + length]
    finally:
        executor.close()
