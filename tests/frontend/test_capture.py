"""Captured programs compute what transformers computes, name what they hold, and cost the same at every depth."""

from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.hooks import Session, StepInputs
from xllm.frontend.huggingface import capture, capture_config, with_buffers
from xllm.frontend.layers import Irregular, LastOutput, SkippedLayer, Stack, every_layer
from xllm.frontend.masks import Mask, read_mask
from xllm.frontend.tokens import refuse_foreign
from xllm.ir.program import Dim, KVLayer, LayerSource
from xllm.ir.verify import verify
from xllm.ir.weight_rules import Constant, Source


@pytest.mark.parametrize("name", [*zoo.CONFIGS, *zoo.PARTS, *zoo.ROPES, *zoo.SHARED, *zoo.DIRECT])
def test_chunked_mixed_steps_give_the_logits_of_transformers(name: str) -> None:
    _, _, expected = zoo.reference(name)
    for got, want in zip(zoo.mixed_logits(zoo.stamped(name), name), expected, strict=True):
        assert torch.linalg.norm(got - want) / torch.linalg.norm(want) <= 1e-5
        assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("name", [*zoo.CONFIGS, *zoo.ROPES])
def test_program_is_legal(name: str) -> None:
    verify(zoo.captured(name))
    verify(zoo.stamped(name))


def test_program_says_what_it_reads_and_keeps() -> None:
    program = zoo.captured("qwen3")
    assert [node.target for node in program.graph.nodes if node.op == "placeholder"] == [
        "ids", "positions", "slots", "last", "kv"
    ]  # fmt: skip
    assert program.dims == (Dim("T", 1, 8192), Dim("S", 1, 4))
    assert program.layers_path == "model.layers"
    assert program.layers == (LayerSource(0, (0,)), LayerSource(1, (1, 2, 3)), LayerSource(2, (4,)))
    assert program.kv == (KVLayer(2, 16, 16),) * 3
    assert program.weights["model.embed_tokens.weight"].rule == Source(("model.embed_tokens.weight", "lm_head.weight"))
    assert program.weights["model.rotary_emb.cos"].rule == Constant("model.rotary_emb.cos")
    assert program.constants["model.rotary_emb.cos"].shape == (zoo.MAX_LEN, 16)
    linear = next(node for node in program.calls() if node.name == "layers_1_self_attn_q_proj_linear")
    assert linear.meta["custom"] == {"path": "model.layers.1.self_attn.q_proj", "layer": 1}
    assert tuple(program.input("kv").meta["val"].shape) == (3, 4, zoo.MAX_LEN, 64)


def test_each_layer_carries_its_own_window() -> None:
    program = zoo.stamped("qwen2-windows")
    attention = [node for node in program.calls() if node.target is torch.ops.xllm.attention.default]
    assert [(node.args[5], node.args[9]) for node in attention] == [(i, 5 if i % 2 else 0) for i in range(8)]


def test_layers_that_share_keys_read_them_where_they_are_kept() -> None:
    program = zoo.stamped("gemma4")
    attention = [node for node in program.calls() if node.target is torch.ops.xllm.attention.default]
    written = [node.args[5] for node in program.calls() if node.target is torch.ops.xllm.kv_write.default]
    assert [node.args[5] for node in attention] == [0, 1, 2, 3, 2, 2, 2, 2, 2, 3]
    assert written == [0, 1, 2, 3]
    assert [layer.kv_heads for layer in program.kv] == [2] * 4 + [0] * 6


def test_rotary_modules_with_several_parameterisations_give_several_tables() -> None:
    assert {name.rpartition(".")[2] for name in zoo.captured("gemma3").constants} == {
        "embed_scale", "full_attention_cos", "full_attention_sin", "sliding_attention_cos", "sliding_attention_sin"
    }  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 64])
def test_the_cost_of_capture_does_not_depend_on_depth(layers: int) -> None:
    config = zoo.CONFIGS["qwen3"]()
    config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
    program = capture_config(config, name="qwen3", max_len=zoo.MAX_LEN, max_seqs=4)
    assert len(program.layers) == min(layers, 3)
    if layers == 64:
        assert zoo.nodes(program) == zoo.nodes(zoo.captured("qwen3"))


def test_capture_leaves_the_configuration_and_the_registries_alone() -> None:
    config = zoo.CONFIGS["llama"]()
    before = config.to_dict()
    capture_config(config, name="llama", max_len=8)
    with pytest.raises(CompileError):
        capture_config(transformers.BertConfig(num_hidden_layers=1), name="bert")
    assert config.to_dict() == before
    assert "xllm" not in ALL_ATTENTION_FUNCTIONS and "xllm" not in ALL_MASK_ATTENTION_FUNCTIONS


_SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
REFUSED = {
    "recurrent": (  # its convolution is one of ours, its scan is not: the layer must not pass for lifted
        lambda: transformers.MambaConfig(**_SMALL, state_size=4),
        ("recurrent-layer", "backbone.layers.0 (MambaBlock)", "no attention call"),
    ),
    "hybrid": (
        lambda: transformers.MiniMaxConfig(
            **_SMALL, **_HEADS, num_local_experts=2, layer_types=["linear_attention", "full_attention"]
        ),
        ("recurrent-layer", "model.layers.0 (MiniMaxDecoderLayer)", "no attention call"),
    ),
    "encoder-decoder": (
        lambda: transformers.T5Config(vocab_size=97, d_model=32, num_layers=2, num_heads=2),
        ("unsupported-model", "config.json", "is_encoder_decoder"),
    ),
    "no-language-model": (lambda: transformers.CLIPConfig(), ("unsupported-model", "", "")),
    "bidirectional": (
        lambda: transformers.BertConfig(**_SMALL, num_attention_heads=2, intermediate_size=32),
        ("unsupported-attention", "bert.encoder.layer.0 (BertLayer), BertSelfAttention", "attention"),
    ),
    "chunked-attention": (
        lambda: transformers.Llama4TextConfig(**{**_SMALL, "num_hidden_layers": 4}, **_HEADS),
        ("unsupported-attention", "config.json", "layer_types: chunked_attention"),
    ),
    "mask-read": (
        lambda: transformers.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4),
        (
            "unsupported-attention",
            "transformer (MptModel)",
            "create_causal_mask( config=self.config, inputs_embeds=inputs_embeds, …",
        ),
    ),
    "positions-with-more": (  # an embedding that returns its index too
        lambda: transformers.ProphetNetConfig(
            vocab_size=97,
            hidden_size=32,
            num_decoder_layers=1,
            decoder_ffn_dim=32,
            num_decoder_attention_heads=2,
            is_decoder=True,
            is_encoder_decoder=False,
        ),
        ("unsupported-positions", "prophetnet.decoder.position_embeddings", ""),
    ),
    "positions-without-batch": (  # taken as they are: what is refused is the attention behind them
        lambda: transformers.RoFormerConfig(**_SMALL, num_attention_heads=2, intermediate_size=32, is_decoder=True),
        ("recurrent-layer", "roformer.encoder.layer.0 (RoFormerLayer)", "no attention call"),
    ),
    "experts": (
        lambda: transformers.MixtralConfig(**_SMALL, **_HEADS, num_local_experts=2, hidden_act="mish"),
        ("unsupported-experts", "model.layers.0.mlp.experts", "experts"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_by_name(name: str) -> None:
    make, (code, where, node) = REFUSED[name]
    with pytest.raises(CompileError) as refused:
        capture_config(make(), name=name)
    error = refused.value
    assert (error.code, error.where, error.node) == (code, where, node)
    assert error.try_ and error.why in str(error)


def test_attention_over_other_keys_than_the_tokens_of_a_step_is_refused() -> None:
    layer, heads, step = torch.nn.Linear(2, 2), torch.zeros(1, 2, 5, 4), torch.arange(5)
    session = Session()
    session.inputs = StepInputs(step, step[None], step, step, step, step)
    session.follow(Stack("layers", (layer,)), every_layer(1))
    keys = torch.zeros(1, 2, 7, 4)
    with pytest.raises(CompileError, match="not the tokens of a step") as refused:
        session.attention(layer, heads, keys, keys)
    assert refused.value.code == "unsupported-attention"


def test_layers_of_another_form_are_captured_one_by_one() -> None:
    """Called past its hooks, a layer has given nothing that those skipped behind it could hand on."""
    skipped = SkippedLayer(torch.nn.Identity(), LastOutput(), lambda *_: None)
    with pytest.raises(Irregular, match="neither hidden states nor a tuple"):
        skipped(torch.zeros(1, 5, 4))


def test_a_buffer_is_filled_by_the_innermost_model_around_it() -> None:
    config = zoo.CONFIGS["llama"]()

    class Part(transformers.PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(config)
            self.scale = 3.0
            self.register_buffer("factor", torch.empty(2, device="meta"), persistent=False)

        def _init_weights(self, module: Any) -> None:
            module.factor.fill_(self.scale)

    part, whole = Part(), torch.nn.Module()
    whole.add_module("part", part)
    assert with_buffers(whole, part, "part").get_buffer("factor").tolist() == [3.0, 3.0]


def test_operators_of_others_are_refused() -> None:
    program = zoo.captured("llama").copy()
    node = next(node for node in program.calls() if node.target is torch.ops.aten.silu.default)
    node.target = torch.ops.prims.neg.default
    with pytest.raises(CompileError, match=r"prims.neg.*neither torch's own nor one of our dialect.*foreign-operator"):
        refuse_foreign(program)


def test_a_branch_on_token_values_names_module_and_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x) if x.sum() > 0 else x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(CompileError) as refused:
        capture_config(zoo.CONFIGS["llama"](), name="llama")
    assert refused.value.code == "data-dependent"
    assert refused.value.where == "model.layers.0.mlp (LlamaMLP)"


def test_coordinates_are_taken_where_all_of_them_are_the_position() -> None:
    step = torch.arange(5)
    session = Session()
    session.inputs = StepInputs(step, step[None], step, step, step, step)
    assert session.index(step[None, None].expand(4, 1, -1)[1:]).tolist() == step.tolist()
    with pytest.raises(CompileError, match="several coordinates") as refused:
        session.index(step[None, None].repeat(3, 1, 1))
    assert refused.value.code == "unsupported-positions"


def test_a_folder_without_config_is_refused(tmp_path) -> None:
    with pytest.raises(CompileError) as refused:
        capture(tmp_path)
    assert refused.value.code == "no-config"


@pytest.mark.parametrize("kind", ["Qwen2MoeConfig", "PhimoeConfig"])
def test_a_window_that_only_the_mask_names_reaches_attention(kind: str) -> None:
    sizes = {**_SMALL, **_HEADS, "head_dim": 8, "num_experts_per_tok": 1, "sliding_window": 8}
    if kind == "Qwen2MoeConfig":
        sizes |= {"num_experts": 2, "moe_intermediate_size": 16, "use_sliding_window": True, "max_window_layers": 1}
    config = getattr(transformers, kind)(**sizes)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
    assert "sliding_attention" in kinds
    program = capture_config(config, name=kind)
    calls = [node for node in program.calls() if node.target is torch.ops.xllm.attention.default]
    assert [node.args[9] for node in calls] == [8 * (kind == "sliding_attention") for kind in kinds]


def test_masks_say_what_they_are_made_of() -> None:
    seen = torch.zeros(1, 4, dtype=torch.long)
    window = masking_utils.sliding_window_causal_mask_function(8)
    apart = masking_utils.packed_sequence_mask_function(seen)
    packed = masking_utils.and_masks(masking_utils.remap_positions_for_packed_sequence(window, seen), apart)
    assert read_mask(mask_function=packed) == Mask(8, causal=True)
    both = masking_utils.sliding_window_bidirectional_mask_function(8)
    assert read_mask(mask_function=both) == Mask(9, causal=False)
    assert read_mask(mask_function=masking_utils.causal_mask_function) == Mask(0, causal=True)
    assert read_mask(mask_function=masking_utils.bidirectional_mask_function) == Mask(0, causal=False)
    windowed = read_mask(mask_function=window)
    assert windowed[:, :, slice(0, None), :] is windowed  # cut to all of its tokens
    assert windowed[:, 0].unknown and windowed[..., :4].unknown
    chunked = read_mask(mask_function=masking_utils.chunked_causal_mask_function(8, seen[0]))
    assert chunked.unknown == "chunked_overlay"


@pytest.mark.parametrize(
    "config",
    [
        transformers.RobertaConfig(**_SMALL, num_attention_heads=2, intermediate_size=32, is_decoder=True),
        # takes no position ids and numbers the tokens of every call from 0
        transformers.BartConfig(**_SMALL, d_model=32, decoder_layers=2, decoder_ffn_dim=48, decoder_attention_heads=2,
                                is_decoder=True, is_encoder_decoder=False),
    ],
    ids=["RoBERTa", "BART"],
)  # fmt: skip
def test_learned_positions_of_a_decoder_begin_at_its_offset(config: Any) -> None:
    program = capture_config(config, name="positions")
    rules = {name: str(weight.rule) for name, weight in program.weights.items() if "position" in name}
    assert len(rules) == 1 and "start=2" in next(iter(rules.values()))


@pytest.mark.parametrize("kind", [transformers.DogeConfig, transformers.GPTNeoConfig])
def test_attention_looked_up_elsewhere_is_refused_by_name(kind: Any) -> None:
    """Doge looks while it runs, GPT-Neo while it is built."""
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind is transformers.GPTNeoConfig:
        sizes |= {"num_layers": 1, "attention_types": [[["global"], 1]]}
    with pytest.raises(CompileError, match="a table of its own") as caught:
        capture_config(kind(**sizes), name="other", max_len=48)
    assert caught.value.code == "no-attention-interface"


def test_a_bias_that_a_model_makes_of_its_mask_is_not_lost() -> None:
    """Falcon adds its slopes to a mask, if it has one: no mask would be taken for no slopes."""
    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True
    )
    with pytest.raises(CompileError, match="computes with its attention mask"):
        capture_config(config, name="alibi", max_len=48)
