"""Canonicalize: the batch dimension goes wherever a rule knows how, and every view, slice and copy has one spelling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.fx as fx

from tests.ir.small import HEAD_DIM, HEADS, HIDDEN, Builder, aten, small, xllm
from tests.passes.test_near_misses import run
from tests.passes.zoo import CONTEXT, FAMILIES, rewritten
from xllm.ir.program import Program
from xllm.ir.show import text
from xllm.passes import run_pipeline
from xllm.passes.canonicalize import Canonicalize


def batched(b: Builder, x: fx.Node, *steps: Callable[[Builder, fx.Node], fx.Node]) -> fx.Node:
    """`steps` on x [1, T, HIDDEN]."""
    x = b.call(aten.unsqueeze.default, x, 0)
    for step in steps:
        x = step(b, x)
    return b.call(aten.squeeze.dim, x, 0)


def split(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(aten.reshape.default, x, [1, -1, HEADS, HEAD_DIM])


def joined(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(aten.reshape.default, x, [1, -1, HIDDEN])


@pytest.mark.parametrize("dim", [-1, 1, 2, 3])
def test_dimensions_move_with_the_batch(dim: int) -> None:
    """softmax over dimension 1 of [1, T, H, D] is over dimension 0 of [T, H, D]: same shape, other numbers."""
    after, (_, misses) = run(
        Canonicalize(),
        lambda b, x: batched(b, x, split, lambda b, x: b.call(aten.softmax.int, x, dim), joined),
    )
    assert misses == []
    assert all(node.meta["val"].shape[0] != 1 for node in after.calls())


def test_one_call_without_a_rule_stays_one_miss() -> None:
    def flipped(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.flip.default, x, [0])

    def chain(b: Builder, x: fx.Node) -> fx.Node:
        return b.call(aten.add.Tensor, b.call(aten.neg.default, x), x)

    _, (_, misses) = run(Canonicalize(), lambda b, x: batched(b, x, chain, flipped, chain, chain))
    assert misses == ["aten.flip.default keeps its batch dimension: no rule drops it"]


def test_active_dropout_stays() -> None:
    def body(b: Builder, x: fx.Node, active: bool) -> fx.Node:
        return b.call(aten.dropout.default, x, 0.5, active)

    program, _ = run_pipeline(small(lambda b, x: body(b, x, True)), [Canonicalize()], CONTEXT)
    assert [node for node in program.calls() if node.target is aten.dropout.default]
    program, _ = run_pipeline(small(lambda b, x: body(b, x, False)), [Canonicalize()], CONTEXT)
    assert not [node for node in program.calls() if node.target is aten.dropout.default]


@pytest.mark.parametrize(
    ("start", "stop", "spelled"),
    [(8, 2**63 - 1, [8, 16]), (-4, None, [12, 16]), (0, -4, [0, 12]), (None, 4, [0, 4]), (2, 99, [2, 16])],
)
def test_slices_say_where_they_end(start: int | None, stop: int | None, spelled: list[int]) -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        part = b.call(aten.slice.Tensor, x, 1, start, stop)
        return b.linear(part, "proj", HIDDEN)

    after, _ = run(Canonicalize(), body)
    (cut,) = (node for node in after.calls() if node.target is aten.slice.Tensor)
    assert list(cut.args[1:]) == [-1, *spelled]


def test_rows_picked_by_an_index_with_a_batch_are_rows() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        index = b.call(aten.unsqueeze.default, b.program.input("positions"), 0)
        table = b.weight("table", 64, HIDDEN)
        return b.call(aten.add.Tensor, x, b.call(aten.squeeze.dim, b.call(aten.index.Tensor, table, [index]), 0))

    after, _ = run(Canonicalize(), body)
    called = [node.target for node in after.calls()]
    assert xllm.rows.default in called and aten.index.Tensor not in called


def moved(program: Program) -> list[object]:
    """The turns, cuts and products of a program, in order."""
    wanted = (aten.transpose.int, aten.slice.Tensor, aten.mul.Tensor)
    return [node.target for node in program.calls() if node.target in wanted]


def test_turns_around_cuts_and_products_go() -> None:
    """As gated convolutions are written: channels before tokens, cut along channels."""

    def body(b: Builder, x: fx.Node) -> fx.Node:
        turned = b.call(aten.transpose.int, x, -1, -2)
        one, other = (b.call(aten.slice.Tensor, turned, -2, first, first + HIDDEN // 2) for first in (0, HIDDEN // 2))
        made = b.call(aten.transpose.int, b.call(aten.mul.Tensor, one, other), -1, -2)
        return b.call(aten.cat.default, [made, made], -1)

    after, _ = run(Canonicalize(), body)
    assert moved(after) == [aten.slice.Tensor, aten.slice.Tensor, aten.mul.Tensor]


def test_a_sum_that_is_more_than_a_sum_of_turned_values_stays() -> None:
    """alpha is a keyword: x + 2 y must not become x + y, nor 0 + 2 y become y."""

    def body(b: Builder, x: fx.Node) -> fx.Node:
        other = b.call(aten.neg.default, x)
        one, two = (b.call(aten.transpose.int, part, -1, -2) for part in (x, other))
        summed = b.call(aten.transpose.int, b.call(aten.add.Tensor, one, two, alpha=2), -1, -2)
        nothing = b.call(aten.zeros_like.default, x)
        return b.call(aten.add.Tensor, summed, b.call(aten.add.Tensor, nothing, x, alpha=2))

    after, _ = run(Canonicalize(), body)
    kept = [node.kwargs for node in after.calls() if node.target is aten.add.Tensor and node.kwargs]
    assert kept == [{"alpha": 2}, {"alpha": 2}]


def test_a_cut_along_an_axis_that_is_not_turned_stays_behind_the_turn() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        turned = b.call(aten.transpose.int, b.call(aten.reshape.default, x, [-1, HEADS, HEAD_DIM]), 0, 1)
        cut = b.call(aten.slice.Tensor, turned, -1, 0, HEAD_DIM // 2)
        return b.call(
            aten.reshape.default,
            b.call(aten.transpose.int, b.call(aten.cat.default, [cut, cut], -1), 0, 1),
            [-1, HIDDEN],
        )

    after, _ = run(Canonicalize(), body)
    assert moved(after) == [aten.transpose.int, aten.slice.Tensor, aten.transpose.int]


def test_joining_with_nothing_goes() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        nothing = b.call(aten.slice.Tensor, x, -1, HIDDEN, HIDDEN)
        return b.call(aten.cat.default, [x, nothing], -1)

    after, _ = run(Canonicalize(), body)
    assert not [node for node in after.calls() if node.target is aten.cat.default]


@pytest.mark.parametrize("lead", [[3, -1, -1], [3, 1, -1, -1]])
def test_one_of_equal_parts_is_what_was_expanded(lead: list[int]) -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        wide = (
            b.call(aten.unsqueeze.default, x, 0) if len(lead) == 3 else b.call(aten.reshape.default, x, [1, -1, HIDDEN])
        )
        several = b.call(aten.slice.Tensor, b.call(aten.expand.default, wide, lead), 0, 1, 3)
        part = b.call(aten.select.int, several, 0, 1)
        return b.call(aten.neg.default, b.call(aten.reshape.default, part, [-1, HIDDEN]))

    after, _ = run(Canonicalize(), body)
    assert not [node for node in after.calls() if node.target in (aten.expand.default, aten.select.int)]


def test_a_part_of_another_axis_stays() -> None:
    """The first of equal columns is no row: [T, 1, H] seen as [T, 3, H], of which token 0 is read."""

    def body(b: Builder, x: fx.Node) -> fx.Node:
        wide = b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, 1), [-1, 3, -1])
        row = b.call(aten.sum.dim_IntList, b.call(aten.select.int, wide, 0, 0), [0], True)
        return b.call(aten.add.Tensor, x, row)

    after, _ = run(Canonicalize(), body)
    assert [node for node in after.calls() if node.target is aten.select.int]


# Of these a second run drops leading ones that the first took for heads: of tables, and of the key all heads share.
NOT_YET_ONCE = {"glm4", "deepseek_v2", "deepseek_v3"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_YET_ONCE))
def test_twice_is_once(family: str) -> None:
    once = rewritten(family)[0][1]
    again, (record,) = run_pipeline(once, [Canonicalize()], CONTEXT)
    assert (record.hits, text(again)) == (0, text(once))
