"""How a program runs in torch: node by node on real tensors. The oracle of every rewrite, and slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_aggregate

from xllm.ir.program import Program, state_shapes
from xllm.ir.weight_rules import Constant, evaluate


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> Tensor:
    """Logits [S, V] of one step. `inputs` by name (ids, positions, slots, last int32; the state, which is written to);
    `weights` by `get_attr` target (see `bind`). `observe` sees every call's value. Raises KeyError for a missing
    input or weight.
    """
    return _values(program, inputs, weights, observe)[program.output().all_input_nodes[0]]


def run_function(program: Program, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results of a function by name. Raises KeyError for a missing input or weight."""
    values, results = _values(program, inputs, weights), program.output().args[0]
    assert isinstance(results, tuple | list)
    return {name: values[node] for name, node in zip(program.outputs, results, strict=True)}  # pyright: ignore


def _values(
    program: Program,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> dict[fx.Node, Any]:
    """Every value of a run, by the node that makes it."""
    device = next(iter(inputs.values())).device
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[str(node.target)]
            elif node.op == "get_attr":
                values[node] = _weight(program, str(node.target), weights, device)
            elif node.op == "call_function":
                args = map_aggregate(node.args, lambda arg: _real(arg, values, device))
                kwargs = map_aggregate(node.kwargs, lambda arg: _real(arg, values, device))
                values[node] = node.target(*args, **kwargs)  # pyright: ignore
                if observe is not None:
                    observe(node, values[node])
    return values


def bind(program: Program, read: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Every weight as a float32 tensor, made by its rule from checkpoint arrays and the program's constants."""
    made = {}
    for name, weight in program.weights.items():
        array = np.ascontiguousarray(evaluate(weight.rule, read, program.constants)).reshape(weight.shape)
        made[name] = torch.from_numpy(array.copy() if not array.flags.writeable else array)
    return made


def empty_state(program: Program, slots: int, tokens: int) -> dict[str, Tensor]:
    """The state inputs for `run`, float32 NaN, so that reading what was never written shows: kv [layers, slots, tokens,
    width of the widest layer], and fixed [layers, slots, floats of the layer that keeps most] where a layer keeps any.
    """
    shapes = state_shapes(program, slots, tokens)
    return {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}


def _weight(program: Program, name: str, weights: Mapping[str, Tensor], device: torch.device) -> Tensor:
    if name in weights:
        return weights[name]
    rule = program.weights[name].rule
    if isinstance(rule, Constant):
        return torch.from_numpy(program.constants[rule.name]).to(device)
    raise KeyError(f"weight {name!r} of program {program.name} was not given")


def _real(arg: Any, values: Mapping[fx.Node, Any], device: torch.device) -> Any:
    if isinstance(arg, fx.Node):
        return values[arg]
    # In a program the device `meta` means wherever it runs.
    return device if isinstance(arg, torch.device) and arg.type == "meta" else arg
