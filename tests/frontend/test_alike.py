"""Layers are captured once only where that is right; tokens meet only where the program says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.huggingface import capture_config
from xllm.frontend.stamp import stamp
from xllm.ir.program import Program
from xllm.ir.verify import verify

DEPTH = 5  # layers 0, 1 and 4 would be captured


def config() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(**{**zoo._SIZES, **sizes, "num_hidden_layers": DEPTH})


def body(between: Callable[..., Any], mask: Callable[..., Any] = create_causal_mask) -> Callable[..., Any]:
    """A decoder's forward; `between(index, hidden, first, rotary)` gives the hidden states and tables of each layer."""

    def forward(self: Any, input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        hidden = first = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        seen = mask(config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None,
                    **({"position_ids": position_ids} if mask is create_causal_mask else {}))  # fmt: skip
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for index, layer in enumerate(self.layers):
            hidden, tables = between(index, hidden, first, rotary)
            hidden = layer(hidden, attention_mask=seen, position_embeddings=tables, position_ids=position_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    return forward


def with_index(scale: Callable[[Any], Any]) -> Callable[..., Any]:
    """The feed-forward block of a layer, times what is made of the layer's index."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) * scale(self.layer_idx)

    return forward


def indexed(monkeypatch: pytest.MonkeyPatch, scale: Callable[[Any], Any]) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", with_index(scale))
    made = modeling_llama.LlamaDecoderLayer.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        made(self, config, layer_idx)
        self.mlp.layer_idx = layer_idx

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", init)


def after_init(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.ModuleList], None]) -> None:
    made = modeling_llama.LlamaModel.__init__

    def init(self: Any, config: Any) -> None:
        made(self, config)
        change(self.layers)

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", init)


def share(layers: nn.ModuleList) -> None:
    layers[3].mlp.down_proj.weight = layers[1].mlp.down_proj.weight  # pyright: ignore
    layers[2].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight  # pyright: ignore


def closures(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        del layer.mlp.act_fn  # pyright: ignore
        layer.mlp.act_fn = (lambda factor: lambda x: nn.functional.silu(x) * factor)(1 + index % 4)  # pyright: ignore


def joined(index: int, hidden: Any, first: Any, rotary: Any) -> Any:
    return (hidden * index + first if index else hidden), rotary


def unturned(index: int, hidden: Any, first: Any, rotary: Any) -> Any:
    """Every third layer, of which the walk has none but where they are alike, has no positions."""
    cos, sin = rotary
    return hidden, ((torch.ones_like(cos), torch.zeros_like(sin)) if index % 3 == 2 and index < DEPTH - 1 else rotary)


ODD: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "computes with its index": lambda patch: indexed(patch, lambda index: 1 / (index + 1)),
    "branches on its index": lambda patch: indexed(patch, lambda index: 2.0 if index % 4 == 3 else 1.0),
    "torch computes with its index": lambda patch: indexed(
        patch, lambda index: torch.mul(torch.tensor(1.5, device=None), index)
    ),
    "joined between layers": lambda patch: patch.setattr(modeling_llama.LlamaModel, "forward", body(joined)),
    "tables by place": lambda patch: patch.setattr(modeling_llama.LlamaModel, "forward", body(unturned)),
    "shared tensors": lambda patch: after_init(patch, share),
    "closures": lambda patch: after_init(patch, closures),
}


@pytest.mark.parametrize("name", ODD)
def test_layers_that_are_not_alike_are_all_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ODD[name](monkeypatch)
    monkeypatch.setitem(zoo.ALL, name, config)
    program = capture_config(config(), name="odd", max_len=zoo.MAX_LEN, max_seqs=4)
    assert len(program.layers) == DEPTH
    known = name in ("shared tensors", "closures")  # before anything is traced
    assert known or "every layer was captured" in program.notes[0]
    stamped = stamp(program)
    verify(stamped)
    for got, want in zip(zoo.mixed_logits(stamped, name), zoo.reference(name)[2], strict=True):
        assert torch.linalg.norm(got - want) / torch.linalg.norm(want) <= 1e-5


def test_one_module_in_two_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    after_init(monkeypatch, lambda layers: layers.__setitem__(3, layers[2]))
    with pytest.raises(CompileError, match="two layers hold one module") as refused:
        capture_config(config(), name="odd")
    assert (refused.value.code, refused.value.where) == ("shared-modules", "model.layers.3")


def test_a_plain_mask_that_is_at_odds_with_its_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        modeling_llama.LlamaModel,
        "forward",
        body(lambda i, hidden, *given: (hidden, given[1]), create_bidirectional_mask),
    )
    with pytest.raises(CompileError, match="at odds with its call"):
        capture_config(config(), name="odd")


MIXERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "mean": (lambda x: x + x.mean(1, keepdim=True), "mean makes one value of all tokens"),
    "sum so far": (lambda x: x.cumsum(1), "cumsum goes along tokens"),
    "convolution": (
        lambda x: nn.functional.conv1d(x.transpose(1, 2), x.new_ones(32, 1, 3), padding=1, groups=32).transpose(1, 2),
        "conv1d reads neighbouring tokens",
    ),
    "attention spelled out": (lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x, "pairs tokens with each other"),
    "places in the step": (
        lambda x: x + torch.arange(x.shape[1], device=x.device)[None, :, None], "arange counts the tokens of a step"),
    "length": (lambda x: x / x.shape[1], "computes with the number of tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_layers_whose_tokens_meet_by_the_way_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, why = MIXERS[name]
    plain = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, mix(x)))
    small = config()
    small.num_hidden_layers = 1
    with pytest.raises(CompileError) as refused:
        capture_config(small, name="odd")
    assert refused.value.code == "mixes-tokens" and why in refused.value.why
    assert refused.value.where == "model.layers.0.mlp"


def test_tokens_that_shift_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", shifted)
    with pytest.raises(CompileError) as refused:
        capture_config(config(), name="odd")
    assert (refused.value.code, refused.value.where) == ("shape-guard", "LlamaForCausalLM")


def test_what_keeps_tokens_apart_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(self: Any, x: torch.Tensor) -> torch.Tensor:
        low, high = self.up_proj(x).reshape(*x.shape[:2], 2, 12).transpose(1, 2).unbind(1)
        return self.down_proj(torch.cat([low.softmax(-1), high.cumsum(-1)], -1).topk(24).values) + x.mean(
            -1, keepdim=True
        )

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", apart)
    assert isinstance(capture_config(config(), name="odd"), Program)
