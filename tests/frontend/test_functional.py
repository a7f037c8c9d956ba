"""Changes in place become values, right ones or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xllm.frontend.functional import make_functional, name_plainly


class _Called(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("read_later", [False, True])
def test_a_sum_in_place_on_a_view_is_a_value_unless_its_memory_is_read_by_another_name(read_later: bool) -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        base = x * 2
        turned, part = base.transpose(0, 1), base.split(1)[0]
        turned += 1
        return turned + (part if read_later else 0)

    graph = torch.export.export(_Called(add), (torch.zeros(3, 3),)).graph
    make_functional(graph)
    assert ("aten.add_.Tensor" in {str(node.target) for node in graph.nodes}) == read_later


def again(x: torch.Tensor) -> torch.Tensor:
    x[1:3] += 1
    x[:2] *= 3
    return x + 0


def through_the_cut(x: torch.Tensor) -> torch.Tensor:
    cut = x[1:]
    cut += 2
    x[1:] = cut
    return x + 0


def filled(x: torch.Tensor) -> torch.Tensor:
    x[-2:] = x[:2] * 5
    return x + 0


@pytest.mark.parametrize("function", [again, through_the_cut])
def test_a_sum_in_place_on_a_cut_is_joined_with_what_stood_beside_it(function: Callable[..., torch.Tensor]) -> None:
    found, wanted, left = called_functional(function)
    assert not left
    assert torch.equal(found, wanted)


def cut_before(x: torch.Tensor) -> torch.Tensor:
    cut = x[1:]
    cut += 1
    x[1:] *= 2
    return cut + x[1:]


def cut_behind(x: torch.Tensor) -> torch.Tensor:
    cut = x[1:]
    cut += 1
    x[1:] = cut
    cut *= 2
    return x + 0


def cut_twice(x: torch.Tensor) -> torch.Tensor:
    cut = x[1:]
    cut += 1
    cut *= 2
    return x + 0


def whole_behind(x: torch.Tensor) -> torch.Tensor:
    cut = x[1:]
    cut += 1
    x *= 2
    return cut + 0


def fills_behind(x: torch.Tensor) -> torch.Tensor:
    made = torch.empty(4, 3)
    made[:2] = x[:2]
    made[2:] = x[2:]
    made[:2].mul_(2)
    return made + 0


@pytest.mark.parametrize("function", [filled, cut_before, cut_behind, cut_twice, whole_behind, fills_behind])
def test_what_has_two_names_is_right_or_left_in_place(function: Callable[..., torch.Tensor]) -> None:
    """What is left in place is refused later; a value that lacks a later change would not be."""
    found, wanted, left = called_functional(function)
    assert left or torch.equal(found, wanted)


def called_functional(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """What a function gives as values alone, what it gives by itself, and the operators still in place."""
    program = torch.export.export(_Called(lambda x: function(x * 2)), (torch.zeros(4, 3),))
    make_functional(program.graph)
    program.graph.lint()
    called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    x = torch.randn(4, 3)
    found = torch.fx.Interpreter(program.graph_module).run(x)[0]
    return found, function(x * 2), [str(target) for target in called if target._schema.is_mutable]


def test_operators_of_two_names_go_by_one() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.multiply(torch.clip(x, 0, 1), 2.0)

    graph = torch.export.export(_Called(double), (torch.zeros(3),)).graph
    name_plainly(graph)
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.clamp.default", "aten.mul.Tensor"]
