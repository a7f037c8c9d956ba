"""From the captured layers back to the model's depth: the node group of a layer is copied for every layer it stands
for.

Weights are renamed by rule, KV operators get the real layer index, values that cross from one layer to the next are
rewired to the real predecessor. It works on a fresh capture and on one that passes have rewritten, whatever values
cross the border then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from xllm.errors import CompileError
from xllm.frontend.layers import Irregular
from xllm.ir.program import LayerSource, Program, Weight, layer_of
from xllm.ir.weight_rules import Constant, Source, move_layer, rule_sources


def stamp(program: Program) -> Program:
    """The program at full depth; its `layers` then stand for themselves. `program` is left unchanged, plans are not
    carried.

    Raises CompileError when a layer reads anything but the prologue and the layer before it, or when the values that
    cross a border do not correspond.
    """
    if not program.layers:
        return program.copy()
    return _Stamper(program).run()


def check_equal_layers(program: Program, kinds: Sequence[Hashable]) -> None:
    """Raises Irregular when captured layers of one kind differ in operators or constants: index-dependent
    computation.
    """
    groups = _groups(program)
    first: dict[Hashable, int] = {}
    for captured, kind in enumerate(kinds):
        model = first.setdefault(kind, captured)
        node = _difference(program, groups.get(model, []), groups.get(captured, []))
        if node is not None:
            raise Irregular(f"layers {model} and {captured} of the capture look alike but differ at {node.name}")


def claim_between(program: Program) -> None:
    """What a model computes between its layers becomes part of the layer behind."""
    late: set[fx.Node] = set()
    for node in program.calls():
        if layer_of(node) is not None or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    for node in reversed(list(program.calls())):
        users = [layer for user in node.users if (layer := layer_of(user)) is not None]
        if layer_of(node) is None and node in late and users:
            node.meta["custom"]["layer"] = min(users)


class _Stamper:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.whole = all(layer.stands_for == (layer.index,) for layer in program.layers)
        self.leaf = program.layers_path.rpartition(".")[2]
        self.groups = _groups(program)
        self.sources = _sources(program.layers)
        self.graph = fx.Graph()
        self.weights: dict[str, Weight] = {}
        self.reads: dict[str, fx.Node] = {}
        self.shared: dict[fx.Node, fx.Node] = {}
        self.copies: list[dict[fx.Node, fx.Node]] = []
        self.crossings: dict[int, list[tuple[fx.Node, str]]] = {}

    def run(self) -> Program:
        program = self.program
        prologue, epilogue = self._outside()
        for node in prologue:
            self._copy(node, None, 0, self.shared)
        for real, captured in enumerate(self.sources):
            self.copies.append({})
            for node in self.groups[captured]:
                self._copy(node, captured, real, self.copies[real])
        depth = len(self.sources)
        for node in epilogue:
            self._copy(node, None, depth, self.shared)
        output = self.graph.output(
            fx.map_arg(program.output().args[0], lambda arg: self._value(arg, None, depth, program.output()))
        )
        output.meta = dict(program.output().meta)
        stamped = Program(
            name=program.name,
            graph=self.graph,
            dims=program.dims,
            weights=self.weights,
            constants=dict(program.constants),
            kv=tuple(program.kv[captured] for captured in self.sources),
            layers=tuple(LayerSource(real, (real,)) for real in range(depth)),
            layers_path=program.layers_path,
            layers_named=program.layers_named,
            task=program.task,
            notes=program.notes,
        )
        for state in stamped.states():
            state.meta["val"] = state.meta["val"].new_empty((depth, *state.meta["val"].shape[1:]))
        return stamped

    def _outside(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes before and after the layers: after is what depends on a layer or stands behind the last one."""
        prologue: list[fx.Node] = []
        epilogue: list[fx.Node] = []
        late: set[fx.Node] = set()
        layered = sum(map(len, self.groups.values()))
        for node in self.program.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            if layer_of(node) is not None:
                late.add(node)
                layered -= 1
            elif not layered or any(arg in late for arg in node.all_input_nodes):
                late.add(node)
                epilogue.append(node)
            else:
                prologue.append(node)
        return prologue, epilogue

    def _copy(self, node: fx.Node, captured: int | None, real: int, made: dict[fx.Node, fx.Node]) -> None:
        def value(arg: fx.Node) -> fx.Node:
            return self._value(arg, captured, real, node)

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        name = node.name
        custom = dict(node.meta["custom"])
        if captured is not None:
            args, kwargs = _with_layer(node, args, kwargs, lambda given: self._keeper(given, captured, real, node))
            name = self._moved_name(name, captured, real)
            custom.update(path=self._moved(f"{custom['path']}.", real)[:-1], layer=real)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=name)
        new.meta = {**node.meta, "custom": custom}
        made[node] = new

    def _keeper(self, given: int, captured: int, real: int, node: fx.Node) -> int:
        """The real layer whose state an operator copied for layer `real` works on: its own, or that of a layer before
        it that stands for itself alone.
        """
        if given == captured:
            return real
        stands_for = next((layer.stands_for for layer in self.program.layers if layer.index == given), ())
        if len(stands_for) != 1 or given > captured:
            raise _unsound(f"an operator of layer {captured} names layer {given}, which stands for several", node)
        return stands_for[0]

    def _value(self, arg: fx.Node, captured: int | None, real: int, user: fx.Node) -> fx.Node:
        """What `arg` becomes for a user that is copied for layer `real` (the depth, for the epilogue)."""
        if arg.op == "get_attr":
            return self._read(arg, captured, real, user)
        home = layer_of(arg)
        if home is None:
            return self.shared[arg]
        if home == captured:
            return self.copies[real][arg]
        if self.whole and home < real:
            return self.copies[home][arg]
        consumer = captured if captured is not None else len(self.groups)
        if home != consumer - 1 or real == 0:
            raise _unsound(f"layer {home} is read by a node that does not follow it", user)
        before = self.sources[real - 1]
        return self.copies[real - 1][self._counterpart(arg, consumer, before, user)]

    def _read(self, node: fx.Node, captured: int | None, real: int, user: fx.Node) -> fx.Node:
        target = str(node.target)
        owner = None if self.whole else _layer_in(target, (self.program.layers_path,))
        if owner is not None and owner != captured:
            raise _unsound(f"the weight {target} of layer {owner} is read by another layer", user)
        weight = self.program.weights[target]
        name, custom = node.name, dict(node.meta["custom"])
        if owner is not None:
            assert captured is not None
            if captured != real:
                _check_moves(target, weight, self.program.stacks)
            weight = Weight(weight.shape, move_layer(weight.rule, self.program.stacks, real))
            target = self._moved(target, real)
            name = self._moved_name(name, captured, real)
            layer = None if custom["layer"] is None else real
            custom.update(path=self._moved(f"{custom['path']}.", real)[:-1], layer=layer)
        if target not in self.reads:
            self.weights[target] = weight
            self.reads[target] = self.graph.create_node("get_attr", target, name=name)
            self.reads[target].meta = {**node.meta, "custom": custom}
        return self.reads[target]

    def _counterpart(self, arg: fx.Node, consumer: int, before: int, user: fx.Node) -> fx.Node:
        """The value of captured layer `before` in the role that `arg` has for `consumer`."""
        if before == consumer - 1:
            return arg
        here, there = self._crossing(consumer), self._crossing(before + 1)
        if [role for _, role in here] != [role for _, role in there]:
            raise _unsound(
                f"what layer {consumer} takes from its predecessor is not what layer {before} hands on", user
            )
        return next(other for (one, _), (other, _) in zip(here, there, strict=True) if one is arg)

    def _crossing(self, consumer: int) -> list[tuple[fx.Node, str]]:
        """What a captured layer (or the epilogue) reads from the one before, in the order it first reads it, each with
        its role: type of the value, operator and place of its first use.
        """
        if consumer not in self.crossings:
            found: dict[fx.Node, str] = {}
            for node in self.groups.get(consumer) or self._outside()[1]:
                for place, arg in enumerate(node.all_input_nodes):
                    if arg.op != "get_attr" and layer_of(arg) == consumer - 1:
                        found.setdefault(arg, f"{_type(arg)} {node.target} {place}")
            self.crossings[consumer] = list(found.items())
        return self.crossings[consumer]

    def _moved(self, name: str, real: int) -> str:
        rule = move_layer(Source((name,)), (self.program.layers_path,), real)
        assert isinstance(rule, Source)
        return rule.names[0]

    def _moved_name(self, name: str, captured: int, real: int) -> str:
        pattern = rf"(^|_){re.escape(self.leaf)}_{captured}(?=_|$)"
        moved, count = re.subn(pattern, rf"\g<1>{self.leaf}_{real}", name, count=1)
        return moved if count else f"{self.leaf}_{real}_{name}"


def _groups(program: Program) -> dict[int, list[fx.Node]]:
    groups: dict[int, list[fx.Node]] = {layer.index: [] for layer in program.layers}
    for node in program.calls():
        layer = layer_of(node)
        if layer is not None:
            groups.setdefault(layer, []).append(node)
    return groups


def _sources(layers: Sequence[LayerSource]) -> list[int]:
    """The captured layer of every real one, by depth."""
    source = {real: layer.index for layer in layers for real in layer.stands_for}
    if sorted(source) != list(range(len(source))):
        raise CompileError(
            f"the layers {sorted(source)} that captured layers stand for are not a whole model",
            code="unsound-layers",
            pass_name="stamp",
        )
    return [source[real] for real in range(len(source))]


def _with_layer(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], moved: Callable[[int], int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the operator's `layer`, if it has one, moved to another."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "xllm":
        return args, kwargs
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name != "layer":
            continue
        if "layer" in kwargs:
            return args, {**kwargs, "layer": moved(kwargs["layer"])}
        return (*args[:position], moved(args[position]), *args[position + 1 :]), kwargs
    return args, kwargs


def _difference(program: Program, one: Sequence[fx.Node], other: Sequence[fx.Node]) -> fx.Node | None:
    """The first node of `other` that does not do what its partner in `one` does; None for equal groups."""
    if len(one) != len(other):
        longer = one if len(one) > len(other) else other
        return longer[min(len(one), len(other))]
    partner = dict(zip(one, other, strict=True))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a in partner:
                return partner[a] is b
            if a.op == "get_attr":
                alike = _without_layer(a, program) == _without_layer(b, program) and _type(a) == _type(b)
                return alike and _same_constant(a, b, program)
            both_shared = layer_of(a) is None and layer_of(b) is None
            return a is b or (not both_shared and _type(a) == _type(b))
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and a == b

    for a, b in zip(one, other, strict=True):
        here, there = layer_of(a), layer_of(b) or 0
        moved = _with_layer(
            a, a.args, dict(a.kwargs), lambda given, here=here, there=there: there if given == here else given
        )
        if a.target != b.target or not same((*moved[0], *moved[1].items()), (*b.args, *b.kwargs.items())):
            return b
    return None


def _same_constant(one: fx.Node, other: fx.Node, program: Program) -> bool:
    """Whether two weights are equal as far as capture knows their values."""
    rules = [program.weights[str(node.target)].rule for node in (one, other)]
    arrays = [program.constants[rule.name] for rule in rules if isinstance(rule, Constant)]
    return not arrays or (len(arrays) == 2 and np.array_equal(arrays[0], arrays[1]))


def _without_layer(node: fx.Node, program: Program) -> str:
    return re.sub(rf"(^|\.){re.escape(program.layers_path)}\.\d+\.", r"\1", str(node.target), count=1)


def _layer_in(name: str, stacks: Sequence[str]) -> int | None:
    match = re.search(rf"(?:^|\.)(?:{'|'.join(map(re.escape, stacks))})\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else str(type(value))


def _check_moves(target: str, weight: Weight, stacks: Sequence[str]) -> None:
    """Raises CompileError where a layer's weight has a name in the checkpoint that does not say which layer it is of:
    other layers would read the same tensor.
    """
    for source in rule_sources(weight.rule):
        for name in source.names:
            if _layer_in(name, stacks) is None:
                raise CompileError(
                    f"the weight {target} of a layer is {name!r} in checkpoints, which is not below {stacks[0]!r}",
                    code="renamed-layers",
                    pass_name="stamp",
                    where=target,
                    try_="a checkpoint in the model's own names: save_pretrained of transformers writes one",
                )


def _unsound(why: str, node: fx.Node) -> CompileError:
    return CompileError(
        why,
        code="unsound-layers",
        pass_name="stamp",
        where=str(node.meta.get("custom", {}).get("path", "")),
        node=node.name,
        try_="--bisect-passes, which names the pass that tied the layers together; --disable-pass leaves it out",
    )
