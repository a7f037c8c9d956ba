"""Linear-attention hybrids: captured from transformers' modules, the recurrence lifted, right however steps are cut."""

from __future__ import annotations

import pytest
import torch

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.huggingface import capture_config
from xllm.frontend.recurrent import RecurrentCalls
from xllm.ir.effects import operator_of
from xllm.ir.program import KVLayer
from xllm.ir.verify import verify


@pytest.mark.parametrize("name", zoo.HYBRIDS)
def test_equals_transformers_however_steps_are_cut(name: str) -> None:
    program = zoo.stamped(name)
    verify(program)
    _, _, expected = zoo.reference(name)
    for got, want in zip(zoo.mixed_logits(program, name), expected, strict=True):
        assert (got - want).norm() / want.norm() < 1e-5


def test_stamped_equals_captured_in_full() -> None:
    stamped, full = zoo.stamped("qwen3-next"), zoo.captured("qwen3-next", full=True)
    assert len(zoo.captured("qwen3-next").layers) < len(full.layers)
    assert zoo.nodes(stamped) == zoo.nodes(full)
    assert stamped.kv == full.kv


def test_each_layer_keeps_what_it_needs() -> None:
    channels, taps, state = 2 * 2 * 8 + 4 * 12, 4, 4 * 8 * 12
    recurrent = KVLayer(0, 0, 0, fixed_floats=channels * (taps - 1) + state)
    attending = KVLayer(2, 16, 16)
    assert zoo.stamped("qwen3-next").kv == (*[recurrent] * 4, attending, recurrent)


def test_the_recurrence_is_two_operators_and_no_name_stays_changed() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    before = theirs.causal_conv1d_fn, theirs.torch_chunk_gated_delta_rule
    program = capture_config(zoo.HYBRIDS["qwen3-next"](), name="fresh", max_len=16)
    assert (theirs.causal_conv1d_fn, theirs.torch_chunk_gated_delta_rule) == before
    called = [found._opname for node in program.calls() if (found := operator_of(node)) and found.namespace == "xllm"]
    recurrent = sum(layer.fixed_floats > 0 for layer in program.kv)
    assert called.count("causal_conv") == called.count("gated_delta") == recurrent
    assert "aten.cumsum.default" not in {str(node.target) for node in program.calls()}


def test_names_are_put_back_when_the_trace_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    before = theirs.causal_conv1d_fn
    monkeypatch.setattr(theirs.Qwen3NextMLP, "forward", lambda self, x: 1 / 0)
    with pytest.raises(CompileError):
        capture_config(zoo.HYBRIDS["qwen3-next"](), name="fails", max_len=16)
    assert theirs.causal_conv1d_fn is before


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32)}, "'cu_seqlens'"),
        ({"initial_state": torch.zeros(1, 2, 4, 4)}, "'initial_state'"),
        ({"g": torch.zeros(1, 5, 2, 4)}, "one number per head"),
    ],
)
def test_what_the_operator_does_not_compute_is_refused(extra: dict[str, torch.Tensor], why: str) -> None:
    calls = RecurrentCalls(lambda: pytest.fail("nothing may be emitted"), lambda: ("layers.0 (Net)", 0))
    wide, narrow = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 2)
    given = {"query": wide, "key": wide, "value": wide, "g": narrow, "beta": narrow} | extra
    with pytest.raises(CompileError, match=why) as refusal:
        calls.gated_delta(**given)  # pyright: ignore
    assert refusal.value.where == "layers.0 (Net)"
