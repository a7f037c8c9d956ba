"""Stamping gives, node by node, what capturing every layer gives; also after a rewrite; and refuses what is unsound."""

import numpy as np
import pytest
import torch
import transformers

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.huggingface import capture_config
from xllm.frontend.layers import Irregular
from xllm.frontend.stamp import check_equal_layers, stamp
from xllm.ir.program import Program, Task, Weight, layer_of
from xllm.ir.verify import verify
from xllm.ir.weight_rules import Concat, Constant, Source, rule_sources


@pytest.mark.parametrize(("reader", "keeper", "read"), [(1, 0, [0, 0, 0, 0, 4]), (2, 0, [0, 1, 2, 3, 0]), (2, 1, None)])
def test_a_layer_may_read_the_state_of_one_that_stands_for_itself(reader: int, keeper: int, read: list[int]) -> None:
    program = zoo.captured("qwen3").copy()  # its layers stand for 0, for 1 to 3 and for 4
    for node in list(program.calls()):
        if node.target is torch.ops.xllm.attention.default and layer_of(node) == reader:
            node.args = (*node.args[:5], keeper, *node.args[6:])
    if read is None:
        with pytest.raises(CompileError, match="stands for several"):
            stamp(program)
        return
    attention = [node for node in stamp(program).calls() if node.target is torch.ops.xllm.attention.default]
    assert [node.args[5] for node in attention] == read


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_stamped_equals_captured_in_full(name: str) -> None:
    stamped, full = zoo.stamped(name), zoo.captured(name, full=True)
    assert len(zoo.captured(name).layers) < len(full.layers)
    assert zoo.nodes(stamped) == zoo.nodes(full)
    assert (stamped.weights, stamped.kv, stamped.layers) == (full.weights, full.kv, full.layers)
    assert stamped.constants.keys() == full.constants.keys()


def test_stamping_a_full_capture_changes_nothing() -> None:
    full = zoo.captured("qwen3", full=True)
    assert zoo.nodes(stamp(full)) == zoo.nodes(full)


def _with_late_adds(program: Program) -> Program:
    """The last residual addition of each layer moved into the next: two values cross the border then."""
    program = program.copy()
    for node in program.calls():
        layer = layer_of(node)
        if layer is not None and node.name == f"layers_{layer}_add_1":
            last = layer == len(program.layers) - 1
            node.meta["custom"]["layer"] = None if last else layer + 1
    return program


@pytest.mark.parametrize("name", ["qwen3", "qwen2-windows"])
def test_several_values_may_cross_after_a_rewrite(name: str) -> None:
    stamped = stamp(_with_late_adds(zoo.captured(name)))
    verify(stamped)
    for got, want in zip(zoo.mixed_logits(stamped, name), zoo.reference(name)[2], strict=True):
        assert torch.linalg.norm(got - want) / torch.linalg.norm(want) <= 1e-5


def test_rewritten_weights_are_moved_by_rule() -> None:
    program = zoo.captured("qwen3").copy()
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith("self_attn.k_proj.weight"):
            fused = str(node.target).replace("k_proj.weight", "fused")
            names = [str(node.target), str(node.target).replace("k_proj", "v_proj")]
            program.weights[fused] = Weight((64, 32), Concat(tuple(Source((name,)) for name in names)))
            node.target = fused
            node.meta["custom"]["layer"] = None  # as passes make weight nodes
    rule = stamp(program).weights["model.layers.3.self_attn.fused"].rule
    assert [source.names[0] for source in rule_sources(rule)] == [
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.self_attn.v_proj.weight",
    ]


def test_a_value_that_skips_a_layer_is_refused() -> None:
    program = zoo.captured("qwen3").copy()
    nodes = {node.name: node for node in program.graph.nodes}
    nodes["layers_2_add"].replace_input_with(nodes["layers_2_input_layernorm_to"], nodes["layers_0_add_1"])
    with pytest.raises(CompileError, match="layer 0 is read by a node that does not follow it") as refused:
        stamp(program)
    assert (refused.value.code, refused.value.node) == ("unsound-layers", "layers_2_add")


def test_borders_that_do_not_correspond_are_refused() -> None:
    program = zoo.captured("qwen3").copy()
    node = next(node for node in program.calls() if node.name == "layers_0_add_1")
    node.meta["custom"]["layer"] = 1  # two values cross into layer 1, one into layer 2
    with pytest.raises(CompileError, match="what layer 1 takes from its predecessor"):
        stamp(program)


def test_layers_that_use_their_index_are_found() -> None:
    program = zoo.captured("qwen3").copy()
    norm = next(node for node in program.calls() if node.name == "layers_1_input_layernorm_add")
    norm.args = (norm.args[0], 1e-3)
    with pytest.raises(Irregular, match=r"layers 0 and 1 .* differ at layers_1_input_layernorm_add"):
        check_equal_layers(program, ["same"] * 3)


def test_a_layer_whose_tensors_are_elsewhere_in_checkpoints_is_refused() -> None:
    program = zoo.captured("qwen3").copy()
    name = "model.layers.1.self_attn.k_proj.weight"
    elsewhere = Source((name, name.replace("model.layers", "encoder.layer")))
    program.weights[name] = Weight(program.weights[name].shape, elsewhere)
    with pytest.raises(CompileError, match="in checkpoints, which is not below") as refused:
        stamp(program)
    assert (refused.value.code, refused.value.where) == ("renamed-layers", name)
    whole = zoo.captured("qwen3", full=True).copy()
    whole.weights[name] = Weight(whole.weights[name].shape, elsewhere)
    assert stamp(whole).weights[name].rule == elsewhere


def test_layers_that_checkpoints_call_otherwise_are_moved_under_every_name() -> None:
    """GTE: `layers.1` of the model is `encoder.layer.1` in checkpoints, and three of its weights are one there."""
    sizes = {"num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    program = capture_config(transformers.AutoConfig.for_model("gte", **sizes), name="gte", task=Task("embed", "cls"))
    assert len(program.layers) < 5
    weights = stamp(program).weights
    down = next(rule_sources(weights["layers.3.mlp.down_proj.weight"].rule))
    assert down.names[:2] == ("layers.3.mlp.down_proj.weight", "encoder.layer.3.mlp.down_proj.weight")
    sources = list(rule_sources(weights["layers.3.self_attn.k_proj.weight"].rule))
    assert sources[-1].names[0] == "encoder.layer.3.attention.qkv_proj.weight"


def test_layers_with_other_constants_are_found() -> None:
    program = zoo.captured("qwen3").copy()
    for layer in range(3):
        name = f"model.layers.{layer}.input_layernorm.weight"
        program.weights[name] = Weight((32,), Constant(name))
        program.constants[name] = np.ones(32, np.float32)
    check_equal_layers(program, ["same"] * 3)
    program.constants["model.layers.1.input_layernorm.weight"][5] = 2.0
    with pytest.raises(Irregular, match="layers 0 and 1"):
        check_equal_layers(program, ["same"] * 3)
