"""Brings a captured graph into one spelling, so that every later pattern is written once.

before:  %u = aten.unsqueeze(%ids, 0)                          after:  %e = xllm.embedding(%ids, @embed_tokens)
         %e = aten.embedding(@embed_tokens, %u)      [1, T, H]         %q = xllm.linear(%e, @q_proj, None)      [T, N]
         %c = aten.to(%e, f32)
         %q = aten.linear(%c, @q_proj)               [1, T, N]

The batch dimension of one that frontends add is dropped, casts and copies that change nothing go, views merge, sizes
that follow from the value become -1, linear/embedding/row gathers join the dialect, dead code goes. A call whose batch
dimension cannot be dropped keeps it (reported as a miss); its result loses it again, so that one miss stays one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Constant, Permute, Program, Slice, Weight
from xllm.ir.build import prune
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments
from xllm.ir.verify import same_type
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.batch_dimension import drop_batch
from xllm.passes.rewrite import Editor, is_call, is_weight, sizes, undo_transposes

aten = torch.ops.aten
xllm = torch.ops.xllm

_IDENTITIES = (
    aten.to.dtype, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten.expand.default, aten.lift_fresh_copy.default, aten._to_copy.default, aten.slice.Tensor, aten.type_as.default,
    aten.to.dtype_layout, aten.to.device,
)  # fmt: skip
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
          aten.flatten.using_ints, aten.squeeze.default, aten.view_as.default)  # fmt: skip


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
        for node in list(program.calls()):
            _read_behind_expansion(editor, node)
        prune(program)
        if not program.is_function:  # whose inputs have the batch they say
            drop_batch(editor)
        done = -1
        while done < len(editor.hits):  # what one step leaves may be what another looks for
            done = len(editor.hits)
            for step in STEPS:
                for node in list(program.calls()):
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


# --- one spelling ----------------------------------------------------------------------------------------------------


def _drop_identities(editor: Editor, node: fx.Node) -> None:
    """Casts to the dtype it has, copies, expansions to the shape it has, slices of all of it, joins with nothing, sums
    with zero.
    """
    source = None
    off = is_call(node, aten.dropout.default) and node.args[2] is False
    if off or is_call(node, *_IDENTITIES):
        source = node.args[0]
    elif is_call(node, aten.add.Tensor) and not node.kwargs and any(map(_is_zero, node.args)):
        source = node.args[0] if _is_zero(node.args[1]) else node.args[1]
    elif is_call(node, aten.cat.default):
        held = [part for part in arguments(node)[0] if 0 not in sizes(part)]
        source = held[0] if len(held) == 1 else None
    if isinstance(source, fx.Node) and same_type(node.meta["val"], source.meta["val"]):
        node.replace_all_uses_with(source)
        editor.hit(node)


def _cast_constants(editor: Editor, node: fx.Node) -> None:
    """A whole number made at compile time is float32 from the start where it is read as that."""
    if not is_call(node, aten.to.dtype, aten._to_copy.default) or node.meta["val"].dtype is not torch.float32:
        return
    source: Any = node.args[0]
    rule = editor.program.weights[str(source.target)].rule if is_weight(source) else None
    if isinstance(rule, Constant):
        name = f"{rule.name}.float32"
        editor.program.constants[name] = editor.program.constants[rule.name].astype("float32")
        node.replace_all_uses_with(editor.weight(name, Weight(sizes(source), Constant(name))))
        editor.hit(node)


def _is_zero(value: Any) -> bool:
    """Zero as a number, or zeros of any shape."""
    if isinstance(value, fx.Node):
        return is_call(value, *_ZEROS) or (is_call(value, aten.full.default) and bool(value.args[1] == 0))
    return value == 0


def _read_behind_expansion(editor: Editor, node: fx.Node) -> None:
    """One of the equal parts that an expansion makes is what was expanded: positions that have one coordinate each,
    given to a model of several.
    """
    if not is_call(node, aten.select.int):
        return
    source, dim, _ = arguments(node)
    axis = dim % len(sizes(source))
    while is_call(source, aten.slice.Tensor) and _axis(source) == axis:
        source = arguments(source)[0]
    if not is_call(source, aten.expand.default):
        return
    inner = arguments(source)[0]
    own = axis - (len(sizes(source)) - len(sizes(inner)))  # below 0: the expansion made the axis
    if own >= 0 and sizes(inner)[own] != 1:
        return
    if [size for size in sizes(inner) if size != 1] != [size for size in sizes(node) if size != 1]:
        return  # another axis is expanded too
    wanted = [size if isinstance(size, int) else -1 for size in sizes(node)]
    if wanted.count(-1) <= 1:
        with editor.before(node):
            node.replace_all_uses_with(editor.emit(aten.reshape.default, inner, wanted, like=node))
        editor.hit(node)


def _axis(cut: fx.Node) -> int:
    """The axis of a slice, from the front."""
    named = named_arguments(cut)
    return named.get("dim", 0) % len(sizes(named["self"]))


def _join_dialect(editor: Editor, node: fx.Node) -> None:
    """aten.linear, addmm, layer_norm, embedding and x[index] under their dialect names."""
    given = arguments(node)
    if is_call(node, aten.index.Tensor) and len(given[1]) == 1 and (flat := _flat_index(given[1][0])) is not None:
        with editor.before(node):  # rows picked by [1, T] numbers
            picked = editor.emit(xllm.rows.default, given[0], flat, like=node)
            shape = [size if isinstance(size, int) else -1 for size in sizes(node)]
            node.replace_all_uses_with(editor.emit(aten.reshape.default, picked, shape, like=node))
        return editor.hit(node)
    if is_call(node, aten.linear.default):
        target, args = xllm.linear.default, (*given, None)[:3]
    elif (
        is_call(node, aten.addmm.default) and not node.kwargs and all(is_weight(part) for part in (given[0], given[2]))
    ):
        target, args = xllm.linear.default, (given[1], _transposed(editor, given[2]), given[0])
    elif is_call(node, aten.layer_norm.default) and len(given[1]) == 1:
        weight, bias, eps, *_ = (*given[2:], *(None, None, 1e-5)[len(given) - 2 :])
        target, args = xllm.layer_norm.default, (given[0], weight, bias, eps)
    elif is_call(node, aten.embedding.default) and (moved := _position(given[1])) is not None:
        target, args = xllm.rows.default, (_table(editor, given[0], moved[1]), moved[0])
    elif is_call(node, aten.embedding.default):
        target, args = xllm.embedding.default, (_index(given[1]), given[0])
    elif is_call(node, aten.index.Tensor) and len(given[1]) == 1 and _is_row_index(given[1][0]):
        target, args = xllm.rows.default, (given[0], given[1][0])
    else:
        return
    with editor.before(node):
        node.replace_all_uses_with(editor.emit(target, *args, like=node))
    editor.hit(node)


def _index(index: fx.Node) -> fx.Node:
    """Whole numbers of 32 bits as they are, where a wider copy of them is what rows are read by."""
    while is_call(index, aten.to.dtype, aten._to_copy.default) and arguments(index)[0].meta["val"].dtype is torch.int32:
        index = arguments(index)[0]
    return index


def _transposed(editor: Editor, weight: fx.Node) -> fx.Node:
    """The weight [K, N] of a product written x @ w, as [N, K]."""
    held = editor.program.weights[str(weight.target)]
    return editor.weight(f"{weight.target}.T", Weight(held.shape[::-1], Permute(held.rule, (1, 0))))


def _position(index: fx.Node) -> tuple[fx.Node, int] | None:
    """The positions of the step and what is added to them, where an index is that."""
    if is_call(index, aten.to.dtype, aten._to_copy.default):
        return _position(arguments(index)[0])
    if is_call(index, aten.add.Tensor) and isinstance(index.args[1], int) and index.args[1] >= 0 and not index.kwargs:
        inner = _position(arguments(index)[0])
        return (inner[0], inner[1] + index.args[1]) if inner is not None else None
    return (index, 0) if index.op == "placeholder" and index.target == "positions" else None


def _table(editor: Editor, weight: fx.Node, first: int) -> fx.Node:
    """A table of learned positions, from the row of position 0 on."""
    if first == 0:
        return weight
    held = editor.program.weights[str(weight.target)]
    rule = Slice(held.rule, 0, first, held.shape[0])
    return editor.weight(f"{weight.target}[{first}:]", Weight((held.shape[0] - first, *held.shape[1:]), rule))


def _split_to_slices(editor: Editor, node: fx.Node) -> None:
    """Parts of split, chunk and unbind are slices: whoever reads one knows where it lies."""
    if not is_call(node, operator.getitem) or not is_call(node.args[0], *_SPLITS):
        return
    split, index = arguments(node)
    source, *rest = arguments(split)
    named = split.kwargs.get("dim", rest[-1] if len(rest) == 2 or (rest and split.target is aten.unbind.int) else 0)
    rank = len(sizes(source))
    axis = named % rank - rank
    with editor.before(node):
        if split.target is aten.unbind.int:
            part = editor.emit(aten.select.int, source, axis, index, like=node)
        else:
            widths = [one.shape[axis] for one in split.meta["val"]]
            if not all(isinstance(width, int) for width in widths):
                return
            start = sum(widths[:index])
            part = editor.emit(aten.slice.Tensor, source, axis, start, start + widths[index], like=node)
    node.replace_all_uses_with(part)
    editor.hit(node)


def _flat_index(index: Any) -> fx.Node | None:
    """The list of row numbers that an index of more dimensions, all but one of them one, is a view of."""
    if not isinstance(index, fx.Node) or not _is_view(index):
        return None
    inner = arguments(index)[0]
    long = [size for size in sizes(index) if size != 1]
    return inner if _is_row_index(inner) and long == list(sizes(inner)) else None


def _is_row_index(index: Any) -> bool:
    """A list of row numbers; a mask is none."""
    value = index.meta["val"] if isinstance(index, fx.Node) else None
    return value is not None and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)


def _merge_views(editor: Editor, node: fx.Node) -> None:
    """Every view of memory in order is one reshape from its first source, with -1 for the symbolic size."""
    if not _is_view(node):
        return
    source = arguments(node)[0]
    while _is_view(source):
        source = arguments(source)[0]
    if same_type(node.meta["val"], source.meta["val"]):
        node.replace_all_uses_with(source)
        return editor.hit(node)
    wanted = [size if isinstance(size, int) else -1 for size in sizes(node)]
    if wanted.count(-1) > 1 or (is_call(node, aten.reshape.default) and list(node.args) == [source, wanted]):
        return
    with editor.before(node):
        node.replace_all_uses_with(editor.emit(aten.reshape.default, source, wanted, like=node))
    editor.hit(node)


def _is_view(node: Any) -> bool:
    """Memory in order under another shape; picking the only index of a dimension is one."""
    if is_call(node, aten.select.int):
        source, dim, _ = arguments(node)
        return sizes(source)[dim] == 1
    return is_call(node, *_VIEWS)


def _merge_transposes(editor: Editor, node: fx.Node) -> None:
    if undo_transposes(node):
        editor.hit(node)


def _turn_late(editor: Editor, node: fx.Node) -> None:
    """A cut along a turned axis, and what is computed of values turned alike, are turned afterwards: two turns then
    meet, and undo each other.
    """
    parts = node.all_input_nodes
    if not all(is_call(part, aten.transpose.int) and len(sizes(part)) == len(sizes(node)) for part in parts):
        return
    rank, turns = len(sizes(node)), [sorted(axis % len(sizes(node)) for axis in arguments(part)[1:]) for part in parts]
    if is_call(node, aten.slice.Tensor) and len(parts) == 1 and len(node.args) > 2 and _axis(node) in turns[0]:
        source, _, *bounds = arguments(node)
        cut = [arguments(source)[0], next(other for other in turns[0] if other != _axis(node)) - rank, *bounds]
    elif len(parts) > 1 and _pointwise(node) and not node.kwargs and all(turn == turns[0] for turn in turns):
        if any(sizes(part) != sizes(node) or len(part.users) > 1 for part in parts):
            return
        cut = [arguments(arg)[0] if isinstance(arg, fx.Node) else arg for arg in node.args]
    else:
        return
    assert callable(node.target)
    with editor.before(node):
        held = editor.emit(node.target, *cut, like=node)
        node.replace_all_uses_with(editor.emit(aten.transpose.int, held, *turns[0], like=node))
    editor.hit(node)


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _count_from_end(editor: Editor, node: fx.Node) -> None:
    """Dimensions of slices, joins and means count from the end, -1 being the width whatever the rank; a slice says
    where it ends.
    """
    if not is_call(node, aten.slice.Tensor, aten.cat.default, aten.mean.dim) or len(node.args) < 2:
        return
    shape, (source, dims, *rest) = sizes(node.all_input_nodes[0]), arguments(node)
    rank = len(shape)
    counted: Any = [dim % rank - rank for dim in dims] if isinstance(dims, list | tuple) else dims % rank - rank
    if is_call(node, aten.slice.Tensor) and isinstance(shape[counted], int):
        rest = _bounds(rest, shape[counted])
    if list(node.args) != [source, counted, *rest]:
        node.args = (source, counted, *rest)
        editor.hit(node)


def _bounds(given: list[Any], width: int) -> list[Any]:
    """start, stop and step of a slice of `width` elements, with 0 <= start <= stop <= width; a step of one goes."""
    start, stop, *step = [*given, None, None][: max(len(given), 2)]
    if isinstance(start, fx.Node) or isinstance(stop, fx.Node):
        return given
    first, last, _ = slice(start, stop).indices(width)
    return [first, max(first, last), *(step if step != [1] else [])]


STEPS = (
    _cast_constants,
    _split_to_slices,
    _drop_identities,
    _join_dialect,
    _merge_views,
    _merge_transposes,
    _turn_late,
    _count_from_end,
)
