"""A legal program with one thing wrong in it, anywhere: the verifier refuses it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx

from tests.ir.small import attend, small
from tests.passes.zoo import rewritten
from xllm.ir import KVLayer, Program, Weight
from xllm.ir.effects import is_mutating, is_symbolic
from xllm.ir.verify import VerifyError, verify

Mutation = Callable[[Program, random.Random], bool]  # False: there was nothing to break
SOURCES = ("qwen3", "phi3", "gemma2")


def values(program: Program) -> list[fx.Node]:
    return [
        node for node in program.calls() if isinstance(node.meta.get("val"), torch.Tensor) and not is_symbolic(node)
    ]


def wrong_shape(program: Program, rng: random.Random) -> bool:
    """A value claims one element more or less along a dimension."""
    node = rng.choice([node for node in values(program) if node.meta["val"].dim()])
    shape = list(node.meta["val"].shape)
    axis = rng.randrange(len(shape))
    shape[axis] = shape[axis] + rng.choice((1, 2))
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=node.meta["val"].dtype, device="meta")
    return True


def wrong_dtype(program: Program, rng: random.Random) -> bool:
    node = rng.choice(values(program))
    other = rng.choice([d for d in (torch.float32, torch.int32, torch.bfloat16) if d != node.meta["val"].dtype])
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(node.meta["val"].shape, dtype=other, device="meta")
    return True


def wrong_weight(program: Program, rng: random.Random) -> bool:
    name = rng.choice(sorted(name for name, weight in program.weights.items() if weight.shape))
    weight = program.weights[name]
    program.weights[name] = Weight((*weight.shape[:-1], weight.shape[-1] + 1), weight.rule)
    return True


def lost_weight(program: Program, rng: random.Random) -> bool:
    del program.weights[rng.choice(sorted(program.weights))]
    return True


def used_before_made(program: Program, rng: random.Random) -> bool:
    node = rng.choice([node for node in program.calls() if any(n.op == "call_function" for n in node.all_input_nodes)])
    source = rng.choice([n for n in node.all_input_nodes if n.op == "call_function"])
    source.prepend(node)
    return True


def other_operand(program: Program, rng: random.Random) -> bool:
    """A call reads a value of another type."""
    node = rng.choice([node for node in values(program) if node.all_input_nodes])
    old = rng.choice(node.all_input_nodes)
    if not isinstance(old.meta["val"], torch.Tensor):
        return False
    earlier = []
    for other in program.graph.nodes:
        if other is node:
            break
        if isinstance(other.meta.get("val"), torch.Tensor) and other.meta["val"].dim() != old.meta["val"].dim():
            earlier.append(other)
    if not earlier:
        return False
    before = node.meta["val"]
    node.replace_input_with(old, rng.choice(earlier))
    try:  # where the operator broadcasts both to the same result, it is another program and as legal
        same = node.target(*fx.map_arg(node.args, _val), **fx.map_arg(node.kwargs, _val))  # pyright: ignore
    except Exception:
        return True
    return not isinstance(same, torch.Tensor) or (same.shape, same.dtype) != (before.shape, before.dtype)


def _val(node: fx.Node) -> object:
    return node.meta["val"]


def state_of_another_layer(program: Program, rng: random.Random) -> bool:
    states = [node for node in program.calls() if program.input("kv") in node.all_input_nodes]
    node = rng.choice(states)
    index = next(i for i, argument in enumerate(node.target._schema.arguments) if argument.name == "layer")  # pyright: ignore
    layer = node.args[index] + rng.choice((-1, 1, 7))  # pyright: ignore
    if layer >= 0 and layer < node.args[index] and not node.target._schema.is_mutable:  # pyright: ignore
        return False  # what an earlier layer kept may be read: models that share keys between layers do
    node.update_arg(index, layer)
    return True


def wrong_state_table(program: Program, rng: random.Random) -> bool:
    layer = rng.randrange(len(program.kv))
    held = program.kv[layer]
    change = rng.choice(((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    other = KVLayer(held.kv_heads + change[0], held.key_dim + change[1], held.value_dim + change[2])
    program.kv = (*program.kv[:layer], other, *program.kv[layer + 1 :])
    return True


def hidden_view_of_state(program: Program, rng: random.Random) -> bool:
    """An alias of the state hides who reads and writes it."""
    kv = program.input("kv")
    user = rng.choice(sorted(kv.users, key=lambda node: node.name))
    with program.graph.inserting_before(user):
        view = program.graph.call_function(torch.ops.aten.alias.default, (kv,))
    view.meta = {"val": kv.meta["val"], "custom": dict(user.meta["custom"])}
    user.replace_input_with(kv, view)
    return True


def second_write(program: Program, rng: random.Random) -> bool:
    writers = [node for node in program.calls() if is_mutating(node)]
    node = rng.choice(writers)
    with program.graph.inserting_after(node):
        twin = program.graph.node_copy(node)
    twin.meta = {**node.meta, "custom": dict(node.meta["custom"])}
    return True


def fact_in_meta(program: Program, rng: random.Random) -> bool:
    rng.choice(list(program.calls())).meta[rng.choice(("stream", "kernel", "offset"))] = 1
    return True


MUTATIONS: tuple[Mutation, ...] = (
    wrong_shape, wrong_dtype, wrong_weight, lost_weight, used_before_made, other_operand, state_of_another_layer,
    wrong_state_table, hidden_view_of_state, second_write, fact_in_meta,
)  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_no_broken_program_is_accepted(mutate: Mutation, mutations: int) -> None:
    rng = random.Random(mutate.__name__)
    programs = [small(attend, layers=2), *(stage for family in SOURCES for stage in rewritten(family)[0][1:])]
    refused, wanted = 0, max(mutations // len(MUTATIONS), 10)
    while refused < wanted:
        program = rng.choice(programs).copy()
        if mutate(program, rng):
            with pytest.raises(VerifyError):
                verify(program)
            refused += 1
