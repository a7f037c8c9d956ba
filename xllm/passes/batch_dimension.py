"""Drops the batch dimension of one that frontends add: every value [1, ...] is rebuilt without its leading one.

Front to back; `bare` maps old nodes to new values. A call that no rule covers gets the dimension back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import emit
from xllm.ir.effects import is_symbolic
from xllm.ir.program import arguments
from xllm.ir.verify import type_key
from xllm.passes.rewrite import Editor, is_call, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm
Bare = dict[fx.Node, fx.Node]
Rule = Callable[[fx.Node, Bare], tuple[Any, ...] | None]


def drop_batch(editor: Editor) -> None:
    """Rebuilds, front to back, every value [1, ...] without its leading one. `bare` maps old nodes to new values."""
    program = editor.program
    bare: Bare = {}
    for node in list(program.calls()):
        if is_symbolic(node):
            continue
        with program.graph.inserting_before(node):
            if is_call(node, aten.unsqueeze.default) and node.args[1] == 0 and node.args[0] not in bare:
                bare[node] = arguments(node)[0]
            elif is_call(node, aten.view.default, aten.reshape.default) and _adds_lead(node, bare):
                bare[node] = emit(program, aten.reshape.default, (node.args[0], _wanted(node)[1:]), like=node)
            elif any(arg in bare for arg in node.all_input_nodes):
                _rebuild_bare(editor, node, bare)


def _rebuild_bare(editor: Editor, node: fx.Node, bare: Bare) -> None:
    program = editor.program
    source, *rest = arguments(node)
    takes_lead = (aten.select.int, [0, 0]), (aten.squeeze.dim, [0])
    if (node.target, rest) in takes_lead and source in bare:
        node.replace_all_uses_with(bare[source])
        return editor.hit(node)
    if is_call(node, aten.reshape.default, aten.view.default) and not _leads_with_one(node):
        node.replace_all_uses_with(emit(program, aten.reshape.default, (bare[source], rest[0]), like=node))
        return editor.hit(node)
    rule = _RULES.get(node.target)
    args = rule(node, bare) if rule is not None and _leads_with_one(node) else None
    if args is not None and (new := _try(program, node, args)) is not None:
        if type_key(new.meta["val"]) == _without_lead(node.meta["val"]):
            bare[node] = new
            return editor.hit(node)
        program.graph.erase_node(new)
    # No rule: give the call back the dimension it was written for, and take it from what the call gives.
    for arg in node.all_input_nodes:
        if arg in bare and not (is_call(arg, aten.unsqueeze.default, aten.reshape.default) and arg.args[0] not in bare):
            node.replace_input_with(arg, emit(program, aten.unsqueeze.default, (bare[arg], 0), like=node))
    editor.miss(node, f"{node.target} keeps its batch dimension: no rule drops it")
    if _leads_with_one(node) and isinstance(node.meta["val"], torch.Tensor):
        with program.graph.inserting_after(node):
            bare[node] = emit(program, aten.squeeze.dim, (node, 0), like=node)


def _try(program: Program, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
    """The call on other arguments, or None where the operator refuses them."""
    assert callable(node.target)
    try:
        return emit(program, node.target, args, like=node, kwargs=node.kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None


def _leads_with_one(node: fx.Node) -> bool:
    value = node.meta["val"]
    parts = value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(part, torch.Tensor) and _is_one(part.shape[:1]) for part in parts)


def _adds_lead(node: fx.Node, bare: Bare) -> bool:
    """Whether a view puts a leading one on a value that has none: [T, N] as [1, T, N]."""
    source = arguments(node)[0]
    return source not in bare and not _is_one(sizes(source)[:1]) and _leads_with_one(node)


def _wanted(node: fx.Node) -> list[Any]:
    """The sizes a view was asked for, as values of the graph."""
    return list(arguments(node)[1])


def _is_one(shape: tuple[Any, ...]) -> bool:
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 1


def _without_lead(value: Any) -> object:
    """Type of a value, or of each part of one, behind its leading one."""
    if isinstance(value, list | tuple):
        return tuple(_without_lead(part) for part in value)
    return (tuple(str(size) for size in value.shape[1:]), str(value.dtype))


def _bare_args(args: Any, bare: Bare) -> tuple[Any, ...]:
    return fx.map_arg(args, lambda arg: bare.get(arg, arg))


def _same(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
    """Elementwise calls and calls on the last dimension: the same arguments, bare."""
    rank = node.meta["val"].dim()
    for arg in node.all_input_nodes:
        value = arg.meta.get("val")
        if arg not in bare and isinstance(value, torch.Tensor) and value.dim() >= rank and arg.op != "get_attr":
            return None
    return _bare_args(node.args, bare)


def _shift_dims(*places: int, adds: int = 0, optional: tuple[int, ...] = ()) -> Rule:
    """Calls that name dimensions at argument `places`: they move down by one; naming dimension 0 is refused.

    adds: how many dimensions the named ones count more than the source has. optional: places whose default is the last
    dimension, and may stay away.
    """

    def rule(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
        if any(arg not in bare for arg in node.all_input_nodes):
            return None
        rank = len(sizes(node.all_input_nodes[0])) + adds
        args = list(node.args)
        for place in places:
            if place >= len(args):
                if place in optional:
                    continue
                return None  # the dimension meant is the first, or all
            named: Any = args[place]
            moved = [dim % rank - 1 for dim in (named if isinstance(named, list | tuple) else [named])]
            if any(dim < 0 for dim in moved):
                return None
            args[place] = moved if isinstance(named, list | tuple) else moved[0]
        return _bare_args(tuple(args), bare)

    return rule


def _permute(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
    source, dims = arguments(node)
    order = [dim % len(dims) for dim in dims]
    return (bare[source], [dim - 1 for dim in order[1:]]) if order[0] == 0 else None


def _sizes(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
    """view, reshape, expand to [1, ...]: the sizes behind the one."""
    source, wanted, *rest = arguments(node)
    return (bare[source], list(wanted)[1:], *rest) if source in bare else None


def _index(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
    """x[:, index]: the leading None goes."""
    source, indices = arguments(node)
    return (bare[source], list(indices)[1:]) if source in bare and indices[0] is None else None


def _element(node: fx.Node, bare: Bare) -> tuple[Any, ...] | None:
    """One of several results."""
    source, index = arguments(node)
    return (bare[source], index)


_ELEMENTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.rsqrt.default, aten.sqrt.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.abs.default,
    aten.tanh.default, aten.relu.default, aten.exp.default, aten.cos.default, aten.sin.default, aten.to.dtype,
    aten.clone.default, aten.contiguous.default, aten.linear.default, aten.alias.default, aten.detach.default,
    aten.square.default, aten.mul.Scalar, aten.add.Scalar, aten.div.Scalar, aten.clamp.default, aten.layer_norm.default,
    aten.type_as.default, aten.embedding.default, aten.dropout.default, aten.to.dtype_layout,
    aten.softplus.default, aten.view_as_complex.default, aten.view_as_real.default,
    xllm.rms_norm.default, xllm.linear.default,
)  # fmt: skip
_RULES: dict[Any, Rule] = {
    **{target: _same for target in _ELEMENTWISE},
    aten.transpose.int: _shift_dims(1, 2),
    aten.permute.default: _permute,
    aten.slice.Tensor: _shift_dims(1),
    aten.unsqueeze.default: _shift_dims(1, adds=1),
    aten.stack.default: _shift_dims(1, adds=1),
    aten.mean.dim: _shift_dims(1),
    aten.cat.default: _shift_dims(1),
    aten.softmax.int: _shift_dims(1),
    aten.chunk.default: _shift_dims(2),
    aten.split.Tensor: _shift_dims(2),
    aten.split_with_sizes.default: _shift_dims(2),
    aten.repeat_interleave.self_int: _shift_dims(2),
    aten.flatten.using_ints: _shift_dims(1, 2, optional=(2,)),
    aten.select.int: _shift_dims(1),
    aten.squeeze.dim: _shift_dims(1),
    aten.view.default: _sizes,
    aten.reshape.default: _sizes,
    aten.expand.default: _sizes,
    aten.index.Tensor: _index,
    operator.getitem: _element,
}
