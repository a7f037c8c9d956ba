"""Programs: copies, digests, weight rules, and how nodes are made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.ir.small import HIDDEN, VOCAB, Builder, aten, attend, small, xllm
from xllm.ir import Dim, KVLayer, Program, Source, Weight
from xllm.ir.build import emit, emit_weight
from xllm.ir.show import digest, text


@pytest.fixture(scope="module")
def program() -> Program:
    return small(attend, layers=2)


def test_a_copy_reads_and_hashes_like_the_original(program: Program) -> None:
    copy = program.copy()
    assert text(copy) == text(program)
    assert digest(copy) == digest(program)
    assert [node.name for node in copy.graph.nodes] == [node.name for node in program.graph.nodes]


def scale(p: Program) -> None:
    next(n for n in p.calls() if n.target is xllm.attention.default).update_arg(8, 0.25)


def swap_layers(p: Program) -> None:
    """Prints the same: names are local to their layer."""
    first, second = (n for n in p.graph.nodes if n.op == "get_attr" and "q_proj" in n.target)
    first.target, second.target = second.target, first.target


def other_rule(p: Program) -> None:
    p.weights["lm_head.weight"] = Weight((VOCAB, HIDDEN), Source(("head",)))


def other_dim(p: Program) -> None:
    p.dims = (Dim("T", 1, 63), p.dims[1])


def other_state(p: Program) -> None:
    p.kv = (p.kv[0], KVLayer(1, 1, 1))


def other_constant(p: Program) -> None:
    p.constants["table"] = np.ones(3, np.float32)


@pytest.mark.parametrize(
    "change", [scale, swap_layers, other_rule, other_dim, other_state, other_constant], ids=lambda f: f.__name__
)
def test_the_digest_sees(program: Program, change: Callable[[Program], None]) -> None:
    changed = program.copy()
    change(changed)
    assert digest(changed) != digest(program)


def test_identical_layers_fold(program: Program) -> None:
    folded, unfolded = text(program.copy()), text(program, unfold=True)
    assert folded.count("layer 0 {") == unfolded.count("layer 0 {") == 1
    assert "layer 1 {" in unfolded
    assert "%embed_tokens, @q_proj" in unfolded  # the first layer reads the embedding, so it does not fold with others
    three = small(attend, layers=3)
    assert "layer 1..2 {" in text(three)


def test_emit_leaves_no_trace_when_the_operator_refuses(program: Program) -> None:
    changed = program.copy()
    node = [n for n in changed.calls() if n.target is xllm.linear.default][1]  # gives [T, 8], its weight takes 16
    with pytest.raises(ValueError, match="width of the weight"), changed.graph.inserting_before(node):
        emit(changed, xllm.linear.default, (node, node.args[1], None), like=node)
    assert digest(changed) == digest(program)


def test_one_name_never_stands_for_two_weights() -> None:
    builder = Builder()
    builder.call(aten.neg.default, builder.ids)
    one = Weight((2,), Source(("one",)))
    first = emit_weight(builder.program, "a.fused.weight", one)
    again = emit_weight(builder.program, "a.fused.weight", one)
    other = emit_weight(builder.program, "a.fused.weight", Weight((2,), Source(("other",))))
    assert first is again
    assert (first.target, other.target) == ("a.fused.weight", "a.fused_1.weight")
