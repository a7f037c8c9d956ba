"""The one way to change a graph: patterns that match, and an editor that replaces, counts hits and explains misses.

A pattern is a tree of `Op`, `Var`, `Num`, `Param`, `Maybe`, lists and literals. Matching backtracks over commutative
operators and remembers the deepest place where it failed, so that a near miss can say what was expected and what stood
there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.fx as fx

from xllm.ir import Program, Weight
from xllm.ir.build import emit, emit_weight, prune
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments

Binds = dict[str, Any]


@dataclass(frozen=True)
class Var:
    """Any value; the same name twice must be the same node."""

    name: str


@dataclass(frozen=True)
class Num:
    """A Python number, bound by name (the same name twice must be the same number), or exactly `equals`."""

    name: str = ""
    equals: float | int | None = None


@dataclass(frozen=True)
class Param:
    """A weight of the program."""

    name: str


@dataclass(frozen=True)
class Maybe:
    """A value or None: an optional argument."""

    name: str


@dataclass(frozen=True)
class Op:
    """A call of one of `targets`. `commutes` also tries the first two arguments swapped; a node matched inside of a
    pattern must have no other user unless `shared`. `name` binds the node itself; keyword arguments other than
    `options` change what a call means (`alpha` of a sum), so a call that has them does not match."""

    targets: tuple[Callable[..., Any], ...]
    args: tuple[Any, ...]
    commutes: bool = False
    shared: bool = False
    name: str = ""
    options: tuple[str, ...] = ()


@dataclass
class Miss:
    """The deepest failure of a match: how many pattern nodes had matched before, and why the next did not."""

    depth: int = -1
    why: str = ""

    def note(self, depth: int, why: str) -> None:
        if depth > self.depth:
            self.depth, self.why = depth, why


def match(pattern: Any, value: Any, miss: Miss) -> Binds | None:
    """The first consistent binding of `pattern` against `value`, or None with `miss` filled in."""
    return next(_match(pattern, value, {"__depth": 0}, miss, root=True), None)


def _match(pattern: Any, value: Any, binds: Binds, miss: Miss, root: bool = False) -> Iterator[Binds]:
    depth = binds["__depth"]
    match pattern:
        case Var(name):
            if not isinstance(value, fx.Node):
                miss.note(depth, f"expected a value for {name}, found {value!r}")
            elif binds.get(name, value) is not value:
                miss.note(depth, f"{name} is %{binds[name].name} in one place and %{value.name} in another")
            else:
                yield {**binds, name: value}
        case Num(name, equals):
            if isinstance(value, bool) or not isinstance(value, int | float):
                miss.note(depth, f"expected a number, found {_describe(value)}")
            elif equals is not None and value != equals:
                miss.note(depth, f"expected {equals}, found {value}")
            elif binds.get(name, value) != value:
                miss.note(depth, f"{name} is {binds[name]} in one place and {value} in another")
            else:
                yield {**binds, name: value} if name else binds
        case Param(name):
            if not (isinstance(value, fx.Node) and value.op == "get_attr"):
                miss.note(depth, f"expected a weight for {name}, found {_describe(value)}")
            elif binds.get(name, value) is not value:
                miss.note(depth, f"{name} is @{binds[name].target} in one place and @{value.target} in another")
            else:
                yield {**binds, name: value}
        case Maybe(name):
            if value is None or isinstance(value, fx.Node):
                yield {**binds, name: value}
            else:
                miss.note(depth, f"expected a value or nothing for {name}, found {value!r}")
        case list():
            if isinstance(value, list | tuple) and len(value) == len(pattern):
                yield from _match_all(tuple(pattern), tuple(value), binds, miss)
            else:
                miss.note(depth, f"expected {len(pattern)} items, found {_describe(value)}")
        case Op():
            yield from _match_op(pattern, value, binds, miss, root)
        case _ if value == pattern:
            yield binds
        case _:
            miss.note(depth, f"expected {pattern!r}, found {_describe(value)}")


def _match_op(pattern: Op, value: Any, binds: Binds, miss: Miss, root: bool) -> Iterator[Binds]:
    depth = binds["__depth"]
    names = "/".join(str(target) for target in pattern.targets)
    if not (isinstance(value, fx.Node) and value.op == "call_function" and value.target in pattern.targets):
        miss.note(depth, f"expected {names}, found {_describe(value)}")
        return
    if not root and not pattern.shared and len(value.users) > 1:
        miss.note(depth, f"%{value.name} has {len(value.users)} users, so it cannot be fused away")
        return
    if extra := sorted(set(value.kwargs) - set(pattern.options)):
        miss.note(depth, f"%{value.name} is given {', '.join(extra)}, which changes what {names} means")
        return
    if len(value.args) != len(pattern.args):
        miss.note(depth, f"{names} has {len(value.args)} arguments at %{value.name}, expected {len(pattern.args)}")
        return
    orders = [value.args]
    if pattern.commutes:
        orders.append((value.args[1], value.args[0], *value.args[2:]))
    started = {**binds, "__depth": depth + 1, **({pattern.name: value} if pattern.name else {})}
    for order in orders:
        yield from _match_all(pattern.args, order, started, miss)


def _match_all(patterns: tuple[Any, ...], values: tuple[Any, ...], binds: Binds, miss: Miss) -> Iterator[Binds]:
    if not patterns:
        yield binds
        return
    for bound in _match(patterns[0], values[0], binds, miss):
        yield from _match_all(patterns[1:], values[1:], bound, miss)


def _describe(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name} ({value.target})" if value.op == "call_function" else f"%{value.name} ({value.op})"
    return repr(value)


@dataclass
class Editor:
    """Edits one program for one pass run: emit, replace, count. Call `finish()` once at the end."""

    program: Program
    hits: list[str] = field(default_factory=list)
    misses: list[tuple[str, str]] = field(default_factory=list)

    def before(self, node: fx.Node) -> AbstractContextManager[Any]:
        return self.program.graph.inserting_before(node)

    def emit(self, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        return emit(self.program, target, args, like=like, kwargs=kwargs)

    def weight(self, name: str, weight: Weight) -> fx.Node:
        return emit_weight(self.program, name, weight)

    def hit(self, node: fx.Node) -> None:
        self.hits.append(node.name)

    def miss(self, node: fx.Node, why: str) -> None:
        self.misses.append((node.name, why))

    def finish(self) -> None:
        prune(self.program)


def is_call(value: Any, *targets: Callable[..., Any]) -> TypeGuard[fx.Node]:
    """Whether an argument is the result of a call of one of `targets`."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def is_weight(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a value."""
    return tuple(node.meta["val"].shape)


def unscaled(node: Any) -> tuple[Any, float]:
    """What a value is a multiple of, and how often."""
    scale = 1.0
    while is_call(node, torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor):
        if not isinstance(node.args[1], int | float) or node.kwargs:
            break
        factor = float(node.args[1])
        scale = scale * factor if node.target is torch.ops.aten.mul.Tensor else scale / factor
        node = node.args[0]
    return node, scale


def shape_arguments(editor: Editor, shape: Sequence[Any]) -> list[Any] | None:
    """A shape of a function as arguments: -1 for the only size that is not a number, else the nodes that read sizes off
    the inputs, and -1 for one that is none of theirs. None where there are more of those.
    """
    if sum(not isinstance(size, int) for size in shape) <= 1:
        return [size if isinstance(size, int) else -1 for size in shape]
    read = [size if isinstance(size, int) else _read_size(editor.program, size) for size in shape]
    return [-1 if size is None else size for size in read] if read.count(None) <= 1 else None


def _read_size(program: Program, size: Any) -> fx.Node | None:
    """The node that reads a size off an input, in front of all calls."""
    for node in program.inputs():
        axes = [axis for axis, held in enumerate(sizes(node)) if str(held) == str(size)]
        if axes:
            first = next(iter(program.calls()))
            if is_call(first, torch.ops.aten.sym_size.int) and first.args == (node, axes[0]):
                return first
            with program.graph.inserting_before(first):
                return emit(program, torch.ops.aten.sym_size.int, (node, axes[0]), like=node)
    return None


def undo_transposes(node: fx.Node) -> bool:
    """Replaces a transpose of the transpose it undoes by what stood before both; says whether it did."""
    if not is_call(node, torch.ops.aten.transpose.int):
        return False
    source, *axes = arguments(node)
    if not is_call(source, torch.ops.aten.transpose.int):
        return False
    rank = len(sizes(node))
    before, *undone = arguments(source)
    if {axis % rank for axis in axes} != {axis % rank for axis in undone}:
        return False
    node.replace_all_uses_with(before)
    return True


def transposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """What stands before a transpose of the first two axes, tokens and heads, and whether there was one."""
    if is_call(node, torch.ops.aten.transpose.int):
        source, *axes = arguments(node)
        if {axis % len(sizes(node)) for axis in axes} == {0, 1}:
            return source, True
    return node, False


def cut_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Where a cut along the last axis is taken from, and at which column it starts."""
    if is_call(node, torch.ops.aten.slice.Tensor) and len(node.args) == 4 and node.args[1] == -1 and not node.kwargs:
        return arguments(node)[0], arguments(node)[2]
    split = node.args[0] if is_call(node, operator.getitem) else None
    if is_call(split, torch.ops.aten.split_with_sizes.default):
        source, widths, *axis = arguments(split)
        if (axis or [0])[0] % len(sizes(source)) == len(sizes(source)) - 1:
            return source, sum(widths[: arguments(node)[1]])
    return None


def view(editor: Editor, value: fx.Node, shape: list[int], like: fx.Node) -> fx.Node:
    """The numbers of a value, in order, under another shape: of what stood before reshapes and moves of an axis of
    one.
    """
    source = value
    while is_call(source, torch.ops.aten.reshape.default) or (transposed(source)[1] and 1 in sizes(source)[:2]):
        source = arguments(source)[0]
    if [size if isinstance(size, int) else -1 for size in sizes(source)] == shape:
        return source
    return editor.emit(torch.ops.aten.reshape.default, source, shape, like=like)


def tokens_first(editor: Editor, value: fx.Node, like: fx.Node) -> fx.Node:
    """[H, T, D] as [T, H, D]: what stood before a transpose, the same cut of that, or a transpose; a view for one
    head.
    """
    if sizes(value)[0] == 1:
        return view(editor, value, [-1, 1, sizes(value)[-1]], like)
    source, moved = transposed(value)
    if moved:
        return source
    if (cut := cut_of(value)) is not None:
        source, moved = transposed(cut[0])
        if moved:
            bounds = (cut[1], cut[1] + sizes(value)[-1])
            return editor.emit(torch.ops.aten.slice.Tensor, source, -1, *bounds, like=like)
    return editor.emit(torch.ops.aten.transpose.int, value, 0, 1, like=like)


def attention_pairs(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """The KV write of each layer and the attention call that reads it, in program order; none where several read."""
    calls = list(program.calls())
    writes = {named_arguments(node)["layer"]: node for node in calls if is_call(node, torch.ops.xllm.kv_write.default)}
    readers: dict[int, list[fx.Node]] = {}
    for node in calls:
        if is_call(node, torch.ops.xllm.attention.default):
            readers.setdefault(named_arguments(node)["layer"], []).append(node)
    return [(nodes[0], writes[layer]) for layer, nodes in readers.items() if layer in writes and len(nodes) == 1]
