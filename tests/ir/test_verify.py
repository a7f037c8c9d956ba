"""One mutation for every rule of the verifier: refused, by that rule, at that node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.fx as fx

from tests.ir.small import HEAD_DIM, HEADS, KV_HEADS, RECURRENT_FLOATS, aten, attend, recur, small, xllm
from xllm.ir import KVLayer, LayerSource, Program, Weight, verify
from xllm.ir.verify import RULES, VerifyError

Mutation = Callable[[Program], str]  # breaks the program, returns the name of the node at fault ("" for the whole)


def node_of(program: Program, target: object, index: int = 0) -> fx.Node:
    return [node for node in program.graph.nodes if node.target is target][index]


def rename_input(program: Program) -> str:
    program.input("slots").target = "seats"
    return ""


def swap_lengths(program: Program) -> str:
    program.input("slots").meta["val"] = program.input("last").meta["val"]
    return ""


def widen_ids(program: Program) -> str:
    ids = program.input("ids")
    ids.meta["val"] = ids.meta["val"].to(torch.int64)
    return "ids"


def call_python(program: Program) -> str:
    node = node_of(program, xllm.rows.default)
    node.target = torch.relu
    return node.name


def forget_type(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    del node.meta["val"]
    return node.name


def hide_plan(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    node.meta["stream"] = 1
    return node.name


def drop_weight(program: Program) -> str:
    del program.weights["lm_head.weight"]
    return "lm_head_weight"


def reshape_weight(program: Program) -> str:
    program.weights["lm_head.weight"] = Weight((1, 1), program.weights["lm_head.weight"].rule)
    return "lm_head_weight"


def write_elsewhere(program: Program) -> str:
    node = node_of(program, xllm.kv_write.default)
    node.update_arg(0, node.args[1])
    return node.name


def write_elsewhere_by_name(program: Program) -> str:
    node = node_of(program, xllm.kv_write.default)
    names = ("kv", "k", "v", "positions", "slots", "layer")
    node.args, node.kwargs = (), {**dict(zip(names, node.args, strict=True)), "kv": node.args[1]}
    return node.name


def view_state(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    with program.graph.inserting_before(node):
        view = program.graph.call_function(aten.reshape.default, (program.input("kv"), [-1]))
    view.meta = {"val": program.input("kv").meta["val"].reshape(-1), "custom": {"path": "", "layer": 0}}
    return view.name


def read_before_write(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    program.graph.erase_node(node_of(program, xllm.kv_write.default))
    return node.name


def read_other_layer(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    node.update_arg(5, 7)
    return node.name


def write_twice(program: Program) -> str:
    node = node_of(program, xllm.kv_write.default, 1)
    node.update_arg(5, 0)
    return node.name


def keep_other_heads(program: Program) -> str:
    program.kv = (KVLayer(HEADS, HEAD_DIM, HEAD_DIM), *program.kv[1:])
    return node_of(program, xllm.kv_write.default).name


def name_two_results(program: Program) -> str:
    program.outputs = ("one", "two")
    return "output"


def split_layer(program: Program) -> str:
    node = node_of(program, xllm.rows.default)
    node.meta["custom"] = {"path": "", "layer": 0}
    return node.name


def unknown_layer(program: Program) -> str:
    program.layers = (LayerSource(0, (0,)),)
    return node_of(program, xllm.linear.default, 4).name


def stale_type(program: Program) -> str:
    node = node_of(program, aten.reshape.default)
    node.meta["val"] = node.meta["val"].new_empty((3, HEADS, HEAD_DIM))
    return node.name


def misfit_weight(program: Program) -> str:
    node = node_of(program, xllm.linear.default)
    head = next(n for n in program.graph.nodes if n.target == "lm_head.weight")
    node.prepend(head)
    node.update_arg(1, head)
    return node.name


def odd_heads(program: Program) -> str:
    node = node_of(program, xllm.attention.default)
    node.update_arg(6, KV_HEADS + 1)
    program.kv = (KVLayer(KV_HEADS, HEAD_DIM, HEAD_DIM),) * 2
    return node.name


def return_hidden(program: Program) -> str:
    program.output().args = ((node_of(program, xllm.rows.default),),)
    node_of(program, xllm.rows.default).meta["val"] = program.input("ids").meta["val"].new_empty((1, 2))
    return node_of(program, xllm.rows.default).name


def return_tokens(program: Program) -> str:
    program.output().args = ((node_of(program, xllm.embedding.default),),)
    return "output"


def drop_recurrent_state(program: Program) -> str:
    program.kv = tuple(replace(layer, fixed_floats=0) for layer in program.kv)
    return ""


def keep_too_much(program: Program) -> str:
    program.kv = (replace(program.kv[0], fixed_floats=RECURRENT_FLOATS - 1), *program.kv[1:])
    return node_of(program, xllm.gated_delta.default).name


def share_floats(program: Program) -> str:
    node = node_of(program, xllm.gated_delta.default, 1)
    node.update_arg(9, 8)
    return node.name


def recur_elsewhere(program: Program) -> str:
    node = node_of(program, xllm.causal_conv.default)
    node.update_arg(6, 7)
    return node.name


def return_state(program: Program) -> str:
    node = node_of(program, xllm.rows.default)
    node.update_arg(0, program.input("fixed"))
    node.target = aten.index.Tensor
    return node.name


RECURRENT = (drop_recurrent_state, keep_too_much, share_floats, recur_elsewhere, return_state)
MUTATIONS: dict[Mutation, str] = {
    drop_recurrent_state: "inputs_are_the_step",
    keep_too_much: "recurrent_state_is_apart",
    share_floats: "recurrent_state_is_apart",
    recur_elsewhere: "recurrent_state_is_apart",
    return_state: "state_stays_in_the_dialect",
    rename_input: "inputs_are_the_step",
    swap_lengths: "inputs_are_the_step",
    widen_ids: "inputs_are_the_step",
    name_two_results: "function_is_whole",
    call_python: "calls_are_operators",
    forget_type: "values_are_typed",
    hide_plan: "nothing_hides_in_meta",
    drop_weight: "weights_exist",
    reshape_weight: "weights_exist",
    write_elsewhere: "only_state_is_mutated",
    write_elsewhere_by_name: "only_state_is_mutated",
    view_state: "state_stays_in_the_dialect",
    read_before_write: "state_is_written_before_it_is_read",
    read_other_layer: "state_is_written_before_it_is_read",
    write_twice: "state_is_written_before_it_is_read",
    keep_other_heads: "state_is_written_before_it_is_read",
    odd_heads: "state_is_written_before_it_is_read",
    split_layer: "layers_are_contiguous",
    unknown_layer: "layers_are_contiguous",
    stale_type: "types_match_operators",
    misfit_weight: "types_match_operators",
    return_hidden: "types_match_operators",
    return_tokens: "output_is_logits",
}


@pytest.fixture(scope="module")
def legal() -> Program:
    program = small(attend, layers=2)
    verify.verify(program)
    return program


@pytest.fixture(scope="module")
def recurrent() -> Program:
    program = small(recur, layers=2, fixed_floats=RECURRENT_FLOATS)
    verify.verify(program)
    return program


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_refuses(legal: Program, recurrent: Program, mutation: Mutation) -> None:
    program = (recurrent if mutation in RECURRENT else legal).copy()
    at = mutation(program)
    with pytest.raises(VerifyError) as caught:
        verify.verify(program)
    assert broken_rule(program) == MUTATIONS[mutation]
    assert (caught.value.node.name if caught.value.node is not None else "") == at
    assert not at or f"%{at} " in str(caught.value)


def test_every_rule_has_a_mutation() -> None:
    assert set(MUTATIONS.values()) == {rule.__name__ for rule in RULES}


def test_refuses_a_use_before_the_definition(legal: Program) -> None:
    program = legal.copy()
    node = node_of(program, xllm.attention.default)
    node_of(program, xllm.rows.default).append(node)
    with pytest.raises(VerifyError, match="graph is malformed"):
        verify.verify(program)


def test_a_copy_is_independent(legal: Program) -> None:
    widen_ids(legal.copy())
    verify.verify(legal)


def broken_rule(program: Program) -> str:
    for rule in RULES:
        try:
            rule(program)
        except VerifyError:
            return rule.__name__
    return ""
