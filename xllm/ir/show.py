"""How a program prints: one value a line, names local to their layer, identical layers folded, plan columns trailing.

The text is for reading and diffing; nothing parses it. `digest` covers what the text leaves out too: full names, every
weight rule, the bytes of every constant.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.fx as fx

from xllm.ir.effects import is_symbolic
from xllm.ir.program import Program, arguments, layer_of, path_of
from xllm.ir.weight_rules import rule_text

_DTYPES = {torch.float32: "f32", torch.int32: "i32", torch.int64: "i64", torch.bool: "bool", torch.bfloat16: "bf16"}

# Operators that are what their module is for: their values take the module's name.
_NAMED_BY_MODULE = ("linear", "embedding", "rms_norm", "add_rms_norm")


def digest(program: Program) -> str:
    """sha256 over all a plan could depend on: every node in full, dims, state, layers, weight rules, constants."""
    sha = hashlib.sha256(repr((program.dims, program.kv, program.layers, program.layers_path)).encode())
    sha.update(repr(program.outputs).encode())
    names = Names(program)
    for node in program.graph.nodes:
        kind = names.type(node.meta["val"]) if "val" in node.meta else ""
        place = (path_of(node), layer_of(node))
        sha.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {kind} {place}\n".encode())
    for name, weight in sorted(program.weights.items()):
        sha.update(f"{name} {weight.shape} {rule_text(weight.rule)}\n".encode())
    for name, array in sorted(program.constants.items()):
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return sha.hexdigest()


def text(
    program: Program,
    *,
    stage: str = "",
    target: str = "",
    unfold: bool = False,
    notes: Iterable[str] = (),
    columns: Callable[[fx.Node], str] | None = None,
) -> str:
    """The program as text. `stage` and `target` go into the head line, `notes` under it, `columns` behind each call."""
    names, kind = Names(program), "function" if program.is_function else "step"
    head = [part for part in (program.name, target and f"target {target}", stage and f"stage {stage}") if part]
    lines = ["// xllm ir 1 · " + " · ".join(head), *(f"// {note}" for note in notes), f"program {kind} {{"]
    lines += [f"  dim {dim.name} in [{dim.min}, {dim.max}]" for dim in program.dims]
    if program.is_function:
        lines += [f"  input {names.value(node)} : {names.type(node.meta['val'])}" for node in program.inputs()]
    else:
        lines.append(f"  state %kv : {_kv_text(program)}")
    if fixed := _fixed_text(program):
        lines.append(f"  state %fixed : {fixed}")
    for group in _folded(_groups(program, names, columns), unfold):
        if group.layers:
            lines += [f"  layer {_ranges(group.layers)} {{", *(f"    {line}" for line in group.lines()), "  }"]
        else:
            lines += [f"  {line}" for line in group.lines()]
    results = ", ".join(names.argument(arg, None) for arg in program.output().all_input_nodes)
    return "\n".join([*lines, f"  return {results}", "}", ""])


class Names:
    """Printed names: from the module path and the operator, unique within a layer, the same in every equal layer."""

    def __init__(self, program: Program) -> None:
        self.symbols = program.symbols()
        self.program = program
        self._names: dict[fx.Node, str] = {}
        self._expressions: dict[Any, str] = {}  # sympy takes long to print, and a deep model repeats few sizes
        self._order = {layer.index: place for place, layer in enumerate(program.layers)}
        taken: dict[int | None, set[str]] = {}
        for node in program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._names[node] = node.target if node.op == "placeholder" else self._weight(node)
            elif node.op == "call_function" and not is_symbolic(node):
                layer = layer_of(node)
                self._names[node] = self._unique(self._stem(node), taken.setdefault(layer, set()))

    def value(self, node: fx.Node) -> str:
        return ("@" if node.op == "get_attr" else "%") + self._names[node]

    def argument(self, arg: Any, layer: int | None) -> str:
        """An argument as seen from `layer`: values of the layer before carry a prime, of any other layer its number."""
        match arg:
            case fx.Node():
                if is_symbolic(arg):
                    return self.expression(arg.meta["val"])
                home = layer_of(arg) if arg.op == "call_function" else None
                if home is None or home == layer:
                    return self.value(arg)
                here = self._order.get(layer, len(self._order)) if layer is not None else len(self._order)
                return self.value(arg) + ("'" if here - self._order.get(home, 0) == 1 else f"@{home}")
            case list() | tuple():
                return "[" + ", ".join(self.argument(item, layer) for item in arg) + "]"
            case float():
                return f"{arg:g}" if float(f"{arg:g}") == arg else repr(arg)
        return str(arg).removeprefix("torch.")

    def type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            shape = ", ".join(self.expression(size) for size in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{shape}]"
        if isinstance(value, list | tuple):
            return "(" + ", ".join(self.type(item) for item in value) + ")"
        return "()" if value is None else str(value)

    def expression(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        key = size.node.expr if isinstance(size, torch.SymInt) else size
        if key not in self._expressions:
            self._expressions[key] = re.sub(r"\w+", lambda word: self.symbols.get(word[0], word[0]), str(size))
        return self._expressions[key]

    def _weight(self, node: fx.Node) -> str:
        """Short weight name: without the prefix all share, without the layer's own path, without ".weight"."""
        name = str(node.target)
        stack = self.program.layers_path
        if stack and name.startswith(f"{stack}."):
            name = name.removeprefix(f"{stack}.").partition(".")[2]
        else:
            name = name.removeprefix(stack.rpartition(".")[0] + ".") if "." in stack else name
        return name.removesuffix(".weight")

    def _stem(self, node: fx.Node) -> str:
        path = path_of(node)
        if node.target is operator.getitem:
            source, index = arguments(node)
            return f"{self._names[source]}.{index}"
        short = getattr(node.target, "_opname", getattr(node.target, "__name__", "call"))
        leaf = path.rpartition(".")[2]
        return leaf if short in _NAMED_BY_MODULE and leaf and not leaf.isdigit() else short

    @staticmethod
    def _unique(stem: str, taken: set[str]) -> str:
        name, count = stem, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        return name


@dataclass
class _Group:
    """Consecutive lines of one layer (or of none), and the model layers they stand for."""

    layers: tuple[int, ...]
    body: tuple[str, ...]
    columns: tuple[str, ...]

    def lines(self) -> list[str]:
        width = min(max((len(line) for line in self.body), default=0), 110)
        pairs = zip(self.body, self.columns, strict=True)
        return [f"{line:<{width}}  // {column}" if column else line for line, column in pairs]


def _groups(program: Program, names: Names, columns: Callable[[fx.Node], str] | None) -> list[_Group]:
    stands_for = {layer.index: layer.stands_for for layer in program.layers}
    groups = []
    calls = (node for node in program.calls() if not is_symbolic(node))
    for layer, nodes in groupby(calls, key=layer_of):
        shown = [node for node in nodes if node.target is not operator.getitem]
        body = tuple(_line(node, names) for node in shown)
        trailing = tuple(columns(node) if columns else "" for node in shown)
        groups.append(_Group(stands_for.get(layer, (layer,)) if layer is not None else (), body, trailing))
    return groups


def _line(node: fx.Node, names: Names) -> str:
    layer = layer_of(node)
    positional, named = list(node.args), dict(node.kwargs)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        called = target.namespace + "." + target._opname
        arguments = target._schema.arguments
        while positional and isinstance(positional[-1], bool | int | float | str):
            named = {arguments[len(positional) - 1].name: positional.pop(), **named}
        if layer is not None and named.get("layer") == layer:
            del named["layer"]  # implied by the block the line stands in, so that equal layers print equal
    else:
        called = str(target)
    args = [names.argument(arg, layer) for arg in positional]
    args += [f"{key}={names.argument(arg, layer)}" for key, arg in named.items()]
    parts = [names.value(user) for user in node.users if user.target is operator.getitem] or [names.value(node)]
    return f"{', '.join(parts)} = {called}({', '.join(args)}) : {names.type(node.meta['val'])}"


def _folded(groups: list[_Group], unfold: bool) -> list[_Group]:
    if unfold:
        return [
            _Group((layer,), group.body, group.columns) if group.layers else group
            for group in groups
            for layer in (group.layers or (0,))
        ]
    folded: list[_Group] = []
    for group in groups:
        if folded and group.layers and folded[-1].layers and folded[-1].body == group.body:
            folded[-1] = _Group(folded[-1].layers + group.layers, group.body, folded[-1].columns)
        else:
            folded.append(group)
    return folded


def _ranges(numbers: tuple[int, ...]) -> str:
    """0..27 for a run, 0..3 5 for a run and a single."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _kv_text(program: Program) -> str:
    kinds = [f"{layer.kv_heads} x ({layer.key_dim} + {layer.value_dim})" for layer in program.kv]
    kept = [kind if layer.kv_heads else "" for kind, layer in zip(kinds, program.kv, strict=True)]
    return " and ".join(f"{text} per token" for text in _counted(program, kept)) or "nothing"


def _fixed_text(program: Program) -> str:
    kept = [f"{layer.fixed_floats} floats" if layer.fixed_floats else "" for layer in program.kv]
    return " and ".join(f"{text} per sequence" for text in _counted(program, kept))


def _counted(program: Program, kinds: list[str]) -> list[str]:
    """How many layers of the model are of each kind; "" is none."""
    depth = {layer.index: len(layer.stands_for) for layer in program.layers}
    counts: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        if kind:
            counts[kind] = counts.get(kind, 0) + depth.get(index, 1)
    return [f"{count} layers of {kind}" for kind, count in counts.items()]
