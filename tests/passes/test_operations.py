"""What a target and the runtime get to see of a program: sizes, views, literals; and the numerics check itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.fx as fx

from tests.ir.small import HIDDEN, VOCAB, Builder, aten, attend, small, xllm
from tests.passes.zoo import CONTEXT
from xllm.errors import CompileError
from xllm.ir import Program
from xllm.passes import PLANS, run_pipeline
from xllm.passes.emit import emit_plan
from xllm.passes.numerics import check_same, random_sources
from xllm.passes.operations import Reader, bytes_of
from xllm.plan import Plan
from xllm.targets.base import Extent


def compiled(body: object) -> Plan:
    program, _ = run_pipeline(small(body), PLANS, CONTEXT)  # pyright: ignore[reportArgumentType]
    return emit_plan(program)


def in_torch(plan: Plan, op: str) -> list[object]:
    """Operands of the one call of `op` that is left to torch, by name."""
    (call,) = (call for call in plan.calls if call.kernel == "torch" and call.op == op)
    return [operand for _, operand in call.operands]


def test_a_view_of_a_weight_or_an_input_is_that_weight_or_input() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        row = b.call(aten.reshape.default, b.weight("scale", HIDDEN), [1, HIDDEN])
        column = b.call(aten.reshape.default, b.positions, [-1, 1])
        return b.call(aten.add.Tensor, b.call(aten.atan2.default, x, row), column)

    plan = compiled(body)
    (angle, add) = (in_torch(plan, name) for name in ("aten.atan2.default", "aten.add.Tensor"))
    assert angle[1] == {"ref": "@model.layers.0.scale", "shape": [1, HIDDEN], "dtype": "float32"}
    assert add[1] == {"ref": "$positions", "shape": [{"T": 1}, 1], "dtype": "int32"}


def test_literals_that_json_cannot_spell() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        floor = b.call(aten.clamp.default, x, float("-inf"), float("inf"))  # no kernel: its bounds are no numbers
        made = b.call(aten.full.default, [HIDDEN], float("inf"), dtype=torch.float32, device=torch.device("meta"))
        return b.call(aten.mul.Tensor, floor, made)

    plan = compiled(body)
    assert in_torch(plan, "aten.clamp.default")[1:] == [{"float": "-inf"}, {"float": "inf"}]
    assert in_torch(plan, "aten.full.default")[2:] == [{"torch": "float32"}, {"value": "cpu"}]
    assert Plan.from_json(plan.to_json()) == plan


def test_sizes_are_polynomials_of_the_dims() -> None:
    builder = Builder()
    tokens = builder.ids.meta["val"].shape[0]
    reader = Reader(builder.program)
    assert reader.size(7, builder.ids) == 7
    assert reader.size(3 * tokens + 2, builder.ids) == Extent.of(2, T=3)
    assert reader.size(tokens * tokens - 1, builder.ids) == Extent({"T*T": 1, "": -1})
    with pytest.raises(CompileError, match="is no polynomial of the program's dims"):
        reader.size(tokens // 2, builder.ids)


def test_bytes_of_a_value_with_two_symbolic_sizes() -> None:
    builder = Builder()
    x = builder.call(
        xllm.embedding.default, builder.ids, builder.weight("model.embed_tokens.weight", VOCAB, HIDDEN)
    )  # fmt: skip
    square = builder.call(aten.matmul.default, x, builder.call(aten.transpose.int, x, 0, 1))
    reader = Reader(builder.program)
    assert bytes_of(reader.tensor(x)) == Extent.of(T=4 * HIDDEN)
    assert bytes_of(reader.tensor(square)) == Extent({"T*T": 4})


def scaled(program: Program, by: float) -> Program:
    changed = program.copy()
    next(node for node in changed.calls() if node.target is xllm.attention.default).update_arg(8, by)
    return changed


@pytest.mark.parametrize("scale", [0.5001, float("nan")])
def test_the_numerics_check_names_the_pass_that_changed_them(scale: float) -> None:
    program = small(attend)
    sources = random_sources(program)
    assert check_same(program, program.copy(), "nothing", sources) == 0.0
    with pytest.raises(CompileError, match="change-scale: the program computes something else") as caught:
        check_same(program, scaled(program, scale), "change-scale", sources)
    assert caught.value.code == "numerics"


def test_random_sources_do_not_depend_on_what_else_is_there() -> None:
    one, two = random_sources(small(attend)), random_sources(small(attend, layers=2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
