"""Brings a captured graph into one spelling, so that every later pattern is written once.

before:  %u = aten.unsqueeze(%ids, 0)                          after:  %e = xllm.embedding(%ids, @embed_tokens)
         %e = aten.embedding(@embed_tokens, %u)      [1, T, H]         %q = xllm.linear(%e, @q_proj, None)      [T, N]
         %c = aten.to(%e, f32)
         %q = aten.linear(%c, @q_proj)               [1, T, N]

The batch dimension of one that frontends add is dropped, casts and copies that change nothing go, views merge, sizes that
follow from the value become -1, linear/embedding/row gathers join the dialect, dead code goes. A call whose batch dimension
cannot be dropped keeps it (reported as a miss) and stays correct.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.build import emit, prune
from xllm.ir.effects import is_symbolic
from xllm.ir.verify import type_key
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor

aten = torch.ops.aten
xllm = torch.ops.xllm

_IDENTITIES = (
    aten.to.dtype, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.expand.default,
    aten.dropout.default, aten.lift_fresh_copy.default, aten._to_copy.default, aten.slice.Tensor,
)  # fmt: skip
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
          aten.flatten.using_ints, aten.squeeze.default)  # fmt: skip


@dataclass(frozen=True)
class Canonicalize(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if node.target is aten._assert_tensor_metadata.default:
                program.graph.erase_node(node)
                editor.hit(node)
        prune(program)
        _weights_first(program)
        _drop_batch(editor)
        for step in (_drop_identities, _join_dialect, _merge_views, _merge_transposes, _count_from_end):
            for node in list(program.calls()):
                if node.target is not None:
                    step(editor, node)
            prune(program)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))


def _weights_first(program: Program) -> None:
    """Weights and inputs stand before all calls, so that any pass may use them anywhere."""
    first = next(iter(program.calls()))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            first.prepend(node)


# --- batch dimension -------------------------------------------------------------------------------------------------


def _drop_batch(editor: Editor) -> None:
    """Rebuilds, front to back, every value [1, ...] without its leading one. `bare` maps old nodes to the new values."""
    program = editor.program
    bare: dict[fx.Node, fx.Node] = {}
    for node in list(program.calls()):
        if is_symbolic(node):
            continue
        with program.graph.inserting_before(node):
            if node.target is aten.unsqueeze.default and node.args[1] == 0 and node.args[0] not in bare:
                bare[node] = node.args[0]  # pyright: ignore[reportArgumentType]
                continue
            if not any(arg in bare for arg in node.all_input_nodes):
                continue
            _rebuild_bare(editor, node, bare)


def _rebuild_bare(editor: Editor, node: fx.Node, bare: dict[fx.Node, fx.Node]) -> None:
    program = editor.program
    takes_lead = (aten.select.int, (0, 0)), (aten.squeeze.dim, (0,))
    if (node.target, node.args[1:]) in takes_lead and node.args[0] in bare:
        node.replace_all_uses_with(bare[node.args[0]])
        editor.hit(node)
        return
    if node.target in (aten.reshape.default, aten.view.default) and not _leads_with_one(node):
        source = bare[node.args[0]]  # pyright: ignore[reportArgumentType]
        new = emit(program, aten.reshape.default, (source, node.args[1]), like=node)
        node.replace_all_uses_with(new)
        editor.hit(node)
        return
    rule = _RULES.get(node.target) if callable(node.target) else None
    args = rule(node, bare) if rule is not None and _leads_with_one(node) else None
    if args is not None:
        new = emit(program, node.target, args, like=node, kwargs=node.kwargs)  # pyright: ignore[reportArgumentType]
        if type_key(new.meta["val"]) == _without_lead(node):
            bare[node] = new
            editor.hit(node)
            return
        program.graph.erase_node(new)
    # No rule: give the call back the dimension it was written for.
    for arg in node.all_input_nodes:
        if arg in bare:
            node.replace_input_with(arg, emit(program, aten.unsqueeze.default, (bare[arg], 0), like=node))
    editor.miss(node, f"{node.target} keeps its batch dimension: no rule drops it")


def _leads_with_one(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[0], int) and value.shape[0] == 1


def _without_lead(node: fx.Node) -> object:
    value = node.meta["val"]
    return (tuple(str(size) for size in value.shape[1:]), str(value.dtype))


def _same(node: fx.Node, bare: dict[fx.Node, fx.Node]) -> tuple[Any, ...] | None:
    """Elementwise calls and calls on the last dimension: the same arguments, bare."""
    rank = node.meta["val"].dim()
    for arg in node.all_input_nodes:
        value = arg.meta.get("val")
        if arg not in bare and isinstance(value, torch.Tensor) and value.dim() >= rank and arg.op != "get_attr":
            return None
    return fx.node.map_arg(node.args, lambda arg: bare.get(arg, arg))


def _shift_dims(*places: int) -> Callable[[fx.Node, dict[fx.Node, fx.Node]], tuple[Any, ...] | None]:
    """Calls that name dimensions at argument `places`: positive ones move down by one, naming dimension 0 is refused."""

    def rule(node: fx.Node, bare: dict[fx.Node, fx.Node]) -> tuple[Any, ...] | None:
        source = node.all_input_nodes[0]
        if source not in bare or any(arg not in bare for arg in node.all_input_nodes):
            return None
        rank = source.meta["val"].dim() + (1 if node.target is aten.unsqueeze.default else 0)
        args = list(node.args)
        for place in places:
            if place >= len(args):
                continue
            dims = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            moved = [(dim % rank) - 1 for dim in dims]  # pyright: ignore
            if any(dim < 0 for dim in moved):
                return None
            args[place] = moved if isinstance(args[place], list | tuple) else moved[0]
        return fx.node.map_arg(tuple(args), lambda arg: bare[arg] if arg in bare else arg)

    return rule


def _sizes(node: fx.Node, bare: dict[fx.Node, fx.Node]) -> tuple[Any, ...] | None:
    """view, reshape, expand to [1, ...]: the sizes behind the one."""
    source, sizes, *rest = node.args
    return (bare[source], list(sizes)[1:], *rest) if source in bare else None  # pyright: ignore


def _index(node: fx.Node, bare: dict[fx.Node, fx.Node]) -> tuple[Any, ...] | None:
    """x[:, index]: the leading None goes."""
    source, indices = node.args
    if source not in bare or indices[0] is not None:  # pyright: ignore
        return None
    return (bare[source], list(indices)[1:])  # pyright: ignore


_ELEMENTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.pow.Tensor_Scalar,
    aten.rsqrt.default, aten.sqrt.default, aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.tanh.default,
    aten.relu.default, aten.exp.default, aten.cos.default, aten.sin.default, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.linear.default, aten.alias.default, aten.detach.default, aten.square.default,
    xllm.rms_norm.default, xllm.linear.default, aten.mul.Scalar, aten.add.Scalar, aten.softmax.int, aten.dropout.default,
)  # fmt: skip
_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, fx.Node]], tuple[Any, ...] | None]] = {
    **{target: _same for target in _ELEMENTWISE},
    aten.embedding.default: _same,
    aten.transpose.int: _shift_dims(1, 2),
    aten.permute.default: lambda node, bare: (
        (bare[node.args[0]], [dim - 1 for dim in node.args[1][1:]]) if node.args[1][0] == 0 else None  # pyright: ignore
    ),
    aten.slice.Tensor: _shift_dims(1),
    aten.unsqueeze.default: _shift_dims(1),
    aten.mean.dim: _shift_dims(1),
    aten.cat.default: _shift_dims(1),
    aten.view.default: _sizes,
    aten.reshape.default: _sizes,
    aten.expand.default: _sizes,
    aten.index.Tensor: _index,
}


# --- one spelling ----------------------------------------------------------------------------------------------------


def _drop_identities(editor: Editor, node: fx.Node) -> None:
    """Casts to the dtype a value has, copies, expansions to the shape it has, slices of all of it."""
    if node.target in _IDENTITIES and type_key(node.meta["val"]) == type_key(_source(node).meta["val"]):
        node.replace_all_uses_with(_source(node))
        editor.hit(node)


def _join_dialect(editor: Editor, node: fx.Node) -> None:
    """aten.linear, aten.embedding and x[index] under their dialect names."""
    args: tuple[Any, ...]
    if node.target is aten.linear.default:
        target, args = xllm.linear.default, (*node.args, None)[:3]
    elif node.target is aten.embedding.default:
        target, args = xllm.embedding.default, (node.args[1], node.args[0])
    elif node.target is aten.index.Tensor and len(node.args[1]) == 1 and _is_row_index(node.args[1][0]):  # pyright: ignore
        target, args = xllm.rows.default, (node.args[0], node.args[1][0])  # pyright: ignore
    else:
        return
    with editor.before(node):
        node.replace_all_uses_with(editor.emit(target, *args, like=node))
    editor.hit(node)


def _is_row_index(index: Any) -> bool:
    return isinstance(index, fx.Node) and index.meta["val"].dim() == 1 and not index.meta["val"].dtype.is_floating_point


def _merge_views(editor: Editor, node: fx.Node) -> None:
    """Every view of memory in order is one reshape from its first source, with -1 for the symbolic size."""
    if node.target not in _VIEWS:
        return
    source = _source(node)
    while source.op == "call_function" and source.target in _VIEWS:
        source = _source(source)
    if type_key(node.meta["val"]) == type_key(source.meta["val"]):
        node.replace_all_uses_with(source)
        editor.hit(node)
        return
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) > 1 or (node.target is aten.reshape.default and list(node.args) == [source, sizes]):
        return
    with editor.before(node):
        node.replace_all_uses_with(editor.emit(aten.reshape.default, source, sizes, like=node))
    editor.hit(node)


def _merge_transposes(editor: Editor, node: fx.Node) -> None:
    """A transpose of the transpose it undoes."""
    if node.target is not aten.transpose.int:
        return
    source = _source(node)
    rank = node.meta["val"].dim()
    if source.target is aten.transpose.int and _swapped(node, rank) == _swapped(source, rank):
        node.replace_all_uses_with(_source(source))
        editor.hit(node)


def _count_from_end(editor: Editor, node: fx.Node) -> None:
    """Dimensions of slices, joins and means are counted from the end: -1 is the width whatever the rank."""
    if node.target not in (aten.slice.Tensor, aten.cat.default, aten.mean.dim):
        return
    rank, dims = node.all_input_nodes[0].meta["val"].dim(), node.args[1]
    if isinstance(dims, list | tuple):
        counted: Any = [dim % rank - rank for dim in dims]  # pyright: ignore
    else:
        counted = dims % rank - rank  # pyright: ignore
    if counted != dims:
        node.update_arg(1, counted)
        editor.hit(node)


def _swapped(node: fx.Node, rank: int) -> frozenset[int]:
    return frozenset(dim % rank for dim in node.args[1:])  # pyright: ignore


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node) and node.target is not operator.getitem
    return source
