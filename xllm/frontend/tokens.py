"""Tokens meet only in operators of the dialect: attention, recurrence, picks of rows. Whatever else reads more than one
token of a step would give another result when a prompt is cut elsewhere or sequences share a step, so it is refused.

The axis of tokens is the one whose size is a multiple of T. An operator not listed here is refused too.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.fx as fx

from xllm.errors import CompileError
from xllm.ir.effects import named_arguments
from xllm.ir.program import Program, path_of

_OPERATORS = {
    "fill": "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full fill",
    "same": "clone contiguous to _to_copy alias detach dropout lift_fresh_copy type_as copy",
    "view": "view reshape _unsafe_view flatten unflatten unsqueeze squeeze view_as reshape_as",
    "expand": "expand expand_as",
    "each": "where",  # pointwise, though not tagged so
    "turn": "transpose permute t movedim numpy_T mT",
    "pairs": "complex view_as_complex view_as_real",  # of numbers, in the last axis
    "along": "mean sum var std amax amin max min argmax argmin prod any all norm linalg_vector_norm logsumexp softmax"
    " _softmax log_softmax cumsum cumprod topk sort argsort gather scatter scatter_add index_select index_add slice"
    " select narrow split split_with_sizes chunk unbind cat concat stack roll flip repeat_interleave glu diff",
    "tile": "repeat",
    "product": "linear matmul mm bmm addmm baddbmm einsum mv dot embedding",
    "norm": "layer_norm rms_norm native_layer_norm",
    "window": "conv1d conv2d convolution group_norm native_group_norm",
}
_KIND = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}
_AXES = ("dim", "dims", "axis")


def refuse_foreign(program: Program) -> None:
    """Raises CompileError naming the first operator that is not torch's and not ours."""
    for node in program.calls():
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "xllm"):
            raise CompileError(
                f"the operator {node.target} is neither torch's own nor one of our dialect",
                code="foreign-operator",
                pass_name="capture",
                where=path_of(node),
                node=node.name,
                try_="a model whose modules call plain torch operators",
            )


def check_tokens(program: Program) -> None:
    """Raises CompileError naming the first operator that is not known to keep the tokens of a step apart."""
    symbol = program.input("ids").meta["val"].shape[0].node.expr
    for node in program.calls():
        if why := _mixes(node, symbol):
            name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
            raise CompileError(
                f"{name} {why}, so the result would depend on how a prompt is cut into steps",
                code="mixes-tokens",
                pass_name="capture",
                where=path_of(node),
                node=node.name,
                try_="a model whose tokens meet in attention, or in a causal convolution or delta rule, alone",
            )


def _mixes(node: fx.Node, symbol: Any) -> str:
    """What a call does across tokens; empty where it keeps them apart."""
    if node.target is operator.getitem or getattr(node.target, "namespace", "xllm") != "aten":
        return ""
    value = node.meta["val"]
    made = [part for part in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(part, torch.Tensor)]
    given = [arg for arg in node.all_input_nodes if _axes(arg.meta.get("val"), symbol)]
    if not made or not (given or any(_axes(part, symbol) for part in made)):
        return ""
    name = str(node.target._opname).rstrip("_")  # pyright: ignore
    kind = _KIND.get(name, "")
    if kind == "fill":
        return ""
    for part in made:
        axes = _axes(part, symbol)
        if len(axes) > 1:
            return "pairs tokens with each other"
        if any((_expression(part.shape[axis]) / symbol).free_symbols for axis in axes):
            return "makes another number of tokens"
        if not axes and given:
            return "makes one value of all tokens"
    if not given:
        return "" if kind in ("same", "view", "expand") else "counts the tokens of a step"
    if kind in ("same", "turn", "pairs", "product"):
        return ""
    if kind in ("expand", "each") or torch.Tag.pointwise in node.target.tags:  # pyright: ignore
        return _pointwise(node, made[0], symbol)
    source = given[0].meta["val"]
    axis = _axes(source, symbol)[0]
    if kind == "view":
        return _viewed(source, made[0], symbol)
    if kind == "tile":
        return "repeats tokens" if named_arguments(node)["repeats"][axis - source.dim()] != 1 else ""
    if kind == "along":
        return _along(node, made[0], axis, source.dim())
    if kind == "norm":
        return "" if axis < source.dim() - len(named_arguments(node)["normalized_shape"]) else "norms over tokens"
    if kind == "window":
        return "" if axis == 0 else "reads neighbouring tokens"
    if name == "index":
        indexed = [at for at, index in enumerate(named_arguments(node)["indices"]) if index is not None]
        return "picks tokens" if set(_axes(named_arguments(node)["self"].meta["val"], symbol)) & set(indexed) else ""
    return "is not known to keep tokens apart"


def _pointwise(node: fx.Node, made: torch.Tensor, symbol: Any) -> str:
    from_end = {axis - made.dim() for axis in _axes(made, symbol)}
    for arg in node.all_input_nodes:
        value = arg.meta.get("val")
        if isinstance(value, torch.Tensor):
            if any(axis - value.dim() not in from_end for axis in _axes(value, symbol)):
                return "pairs tokens with each other"
        elif isinstance(value, (torch.SymInt, torch.SymFloat)) and "expand" not in str(node.target):
            return "computes with the number of tokens"
    return ""


def _viewed(source: torch.Tensor, made: torch.Tensor, symbol: Any) -> str:
    """A view in order keeps tokens apart when as many numbers stand before each of them as before."""
    before = [math.prod(value.shape[: _axes(value, symbol)[0]]) for value in (source, made)]
    return "" if before[0] == before[1] else "lays tokens out anew"


def _along(node: fx.Node, made: torch.Tensor, axis: int, rank: int) -> str:
    named = named_arguments(node)
    if node.target is torch.ops.aten.slice.Tensor and tuple(made.shape) == tuple(named["self"].meta["val"].shape):
        return ""
    schema = {arg.name: arg.default_value for arg in node.target._schema.arguments}  # pyright: ignore
    dims = next((named.get(name, schema[name]) for name in _AXES if name in schema), None)
    if dims is None:
        return "goes over all axes"
    rank += "stack" in str(node.target)
    axis = axis if "stack" not in str(node.target) else -1
    named_axes = {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return "goes along tokens" if axis in named_axes else ""


def _expression(size: Any) -> Any:
    return size.node.expr


def _axes(value: Any, symbol: Any) -> list[int]:
    """Axes of a tensor whose size depends on the number of tokens."""
    if not isinstance(value, torch.Tensor):
        return []
    return [
        axis
        for axis, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols
    ]
