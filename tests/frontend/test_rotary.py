"""Rotary tables: the row of a position is what the module gives in decoding; with longrope, for the whole length."""

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.frontend import zoo
from xllm.frontend.rotary import is_rotary, make_tables


@pytest.mark.parametrize("name", sorted(set(zoo.ROPES) - {"llama-longrope"}))
def test_rows_are_those_of_decoding_step_by_step(name: str) -> None:
    config = zoo.ROPES[name]()
    tables = make_tables(LlamaRotaryEmbedding(config), 80)
    assert tables is not None
    decoding, x = LlamaRotaryEmbedding(config), torch.empty(1)
    for position in range(80):
        cos, sin = decoding(x, torch.tensor([[position]]))
        torch.testing.assert_close(torch.from_numpy(tables[""].cos[position]), cos[0, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(torch.from_numpy(tables[""].sin[position]), sin[0, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [16, 17, 80])
def test_the_length_compiled_for_decides_the_factors_of_longrope(length: int) -> None:
    module, positions = LlamaRotaryEmbedding(zoo.ROPES["llama-longrope"]()), torch.arange(length)
    tables = make_tables(module, length)
    assert tables is not None
    for part, wanted in zip((tables[""].cos, tables[""].sin), module(torch.empty(1), positions[None]), strict=True):
        torch.testing.assert_close(torch.from_numpy(part), wanted[0], rtol=0, atol=2e-5)
    assert ("every position takes the long factors" in tables[""].note) == (length > 16)


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_long_tables_take_few_calls_of_the_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = LlamaRotaryEmbedding.forward

    def counted(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        return original(self, x, position_ids)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", counted)
    assert make_tables(LlamaRotaryEmbedding(zoo.ROPES[name]()), 4096) is not None
    assert 0 < calls < 400


def test_other_modules_are_not_taken_for_rotary_ones() -> None:
    assert is_rotary(LlamaRotaryEmbedding(zoo.CONFIGS["llama"]()))
    assert not is_rotary(torch.nn.Linear(2, 2))


def test_a_module_that_returns_something_else_is_left_alone() -> None:
    class Angles(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(4))

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return position_ids[..., None] * torch.ones(4)

    assert make_tables(Angles(), 8) is None
