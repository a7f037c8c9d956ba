"""What is legal: a program must pass before and after every pass. One rule a function, each names the node at fault."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xllm.ir.build import fake_mode, proven_value
from xllm.ir.effects import effects, is_symbolic, named_arguments, operator_of
from xllm.ir.program import STATES, KVLayer, Program, layer_of

INPUTS = ("ids", "positions", "slots", "last", "kv")
_NAMESPACES = ("aten", "xllm")
# Calls found right, as text: equal calls of equal layers are run once, and once for all passes.
_checked: WeakKeyDictionary[FakeTensorMode, set[str]] = WeakKeyDictionary()


class VerifyError(ValueError):
    """The program is not legal: `node` is where, the message says which rule it breaks."""

    def __init__(self, node: fx.Node | None, message: str) -> None:
        self.node = node
        where = f" at %{node.name} = {node.target}" if node is not None else ""
        super().__init__(f"{message}{where}")


def verify(program: Program) -> None:
    """Raises VerifyError naming the first broken rule; returns None for a legal program."""
    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise VerifyError(None, f"graph is malformed: {str(error).partition(chr(10))[0]}") from error
    for rule in RULES:
        try:
            rule(program)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # what it reads is of no form it can read
            raise VerifyError(None, f"{rule.__name__}: {type(error).__name__}: {error}") from error


def inputs_are_the_step(program: Program) -> None:
    """ids, positions and slots [T] int32, last [S] int32, kv [layers, slots, tokens, width] float32; and fixed [layers,
    slots, floats] float32 where a layer keeps what does not grow.
    """
    if program.is_function:
        return
    names = tuple(node.target for node in program.graph.nodes if node.op == "placeholder")
    takes = (*INPUTS, "fixed") if any(layer.fixed_floats for layer in program.kv) else INPUTS
    if names != takes:
        raise VerifyError(None, f"inputs are {names}, a step takes {takes}")
    lengths = {}
    for name in takes:
        node = program.input(name)
        value = node.meta.get("val")
        wanted = ({"kv": 4, "fixed": 3}[name], torch.float32) if name in STATES else (1, torch.int32)
        if not isinstance(value, torch.Tensor) or (value.dim(), value.dtype) != wanted:
            raise VerifyError(node, f"input {name} is {type_key(value)}, a step takes rank {wanted[0]} of {wanted[1]}")
        lengths[name] = str(value.shape[0])
    if not lengths["ids"] == lengths["positions"] == lengths["slots"] != lengths["last"]:
        raise VerifyError(None, f"ids, positions and slots share T and last has S; lengths are {lengths}")


def calls_are_operators(program: Program) -> None:
    for node in program.calls():
        if node.target is operator.getitem or is_symbolic(node):
            continue
        found = operator_of(node)
        if found is None or found.namespace not in _NAMESPACES:
            raise VerifyError(node, f"only operators of {' and '.join(_NAMESPACES)} may be called")


def values_are_typed(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(node, "value has no type (emit nodes with ir.build.emit)")


def nothing_hides_in_meta(program: Program) -> None:
    for node in program.graph.nodes:
        if extra := set(node.meta) - {"val", "custom"}:
            raise VerifyError(node, f"meta holds {sorted(extra)}; plans are side tables")


def weights_exist(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        weight = program.weights.get(str(node.target))
        if weight is None:
            raise VerifyError(node, f"weight {node.target!r} has no entry in the weight table")
        shape = tuple(node.meta["val"].shape)
        if shape != weight.shape:
            raise VerifyError(node, f"weight is {weight.shape} in the table, {shape} in the graph")


def only_state_is_mutated(program: Program) -> None:
    states = program.states()
    for node in program.calls():
        for written in effects(node, states).writes:
            if written not in states:
                raise VerifyError(node, f"writes {written.name}, which is not state")


def state_stays_in_the_dialect(program: Program) -> None:
    """Only operators of the dialect touch the state, directly: a view of it would hide a dependence."""
    for node in (user for state in program.states() for user in state.users):
        found = operator_of(node)
        if found is None or found.namespace != "xllm":
            raise VerifyError(node, "touches the state; only operators of the dialect may")


def state_is_written_before_it_is_read(program: Program) -> None:
    """Each layer's KV is written once, by a call of the shape the state table says, and read only after that."""
    states = frozenset() if program.is_function else frozenset({program.input("kv")})
    written: set[int] = set()
    for node in program.calls():
        found = effects(node, states)
        if not found.reads:
            continue
        layer = _layer_named(node, program)
        held = replace(program.kv[layer], fixed_floats=0)
        if (kept := _kept(node)) is not None and kept != held:
            raise VerifyError(node, f"keeps {kept} for layer {layer}, the state table says {held}")
        if found.writes and layer in written:
            raise VerifyError(node, f"writes the state of layer {layer} a second time")
        if not found.writes and layer not in written:
            raise VerifyError(node, f"reads the state of layer {layer} before anything is written there")
        written.add(layer)


def recurrent_state_is_apart(program: Program) -> None:
    """Each call on what does not grow keeps a span of its own, inside the floats the state table gives its layer."""
    fixed = frozenset(node for node in program.states() if node.target == "fixed")
    taken: dict[int, list[tuple[int, int]]] = {}
    for node in program.calls():
        if not effects(node, fixed).reads:
            continue
        layer, floats = _layer_named(node, program), program.kv[_layer_named(node, program)].fixed_floats
        start = named_arguments(node)["offset"]
        stop = start + fixed_floats(node)
        if not 0 <= start <= stop <= floats:
            raise VerifyError(node, f"keeps floats {start} to {stop} for layer {layer}, the state table says {floats}")
        if any(start < end and begin < stop for begin, end in taken.setdefault(layer, [])):
            raise VerifyError(
                node, f"keeps floats {start} to {stop} of layer {layer}, where another call keeps its own"
            )
        taken[layer].append((start, stop))


def _layer_named(node: fx.Node, program: Program) -> int:
    layer = named_arguments(node).get("layer")
    if not isinstance(layer, int) or not 0 <= layer < len(program.kv):
        raise VerifyError(node, f"names layer {layer} of a state of {len(program.kv)} layers")
    return layer


def layers_are_contiguous(program: Program) -> None:
    """A layer's nodes stand together, and every layer is known: folding, stamping and per-layer plans rely on it."""
    known = {layer.index for layer in program.layers}
    seen: list[int | None] = []
    for node in program.calls():
        layer = layer_of(node)
        if layer is not None and (not seen or seen[-1] != layer):
            if layer in seen:
                raise VerifyError(node, f"layer {layer} is split: its nodes do not stand together")
            if known and layer not in known:
                raise VerifyError(node, f"layer {layer} is not among the layers of the program")
            seen.append(layer)


def types_match_operators(program: Program) -> None:
    """Every call, run again on fake values, gives the type its node claims."""
    mode = fake_mode(program)
    checked = _checked.setdefault(mode, set())
    for node in program.calls():
        if is_symbolic(node):
            continue
        given = fx.map_arg((node.args, node.kwargs), _layout_key)
        if (question := f"{node.target} {given} {type_key(node.meta['val'])}") in checked:
            continue
        try:
            result = proven_value(node, mode)
        except Exception as error:  # whatever an operator raises on arguments that do not fit
            raise VerifyError(node, f"operator refuses its arguments: {error}") from error
        if not same_type(result, node.meta["val"]):
            claimed = type_key(node.meta["val"])
            raise VerifyError(node, f"operator gives {type_key(result)}, the node claims {claimed}")
        checked.add(question)


def output_is_logits(program: Program) -> None:
    """One result, [S, V] float32."""
    if program.is_function:
        return
    results = program.output().args[0]
    (result,) = results if isinstance(results, tuple) and len(results) == 1 else (results,)
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    rows = program.input("last").meta["val"].shape[0]
    key = (value.dim(), value.dtype, str(value.shape[0])) if isinstance(value, torch.Tensor) and value.dim() else ()
    if key != (2, torch.float32, str(rows)):
        raise VerifyError(program.output(), f"the result is {type_key(value)}, a step gives float32 logits [S, V]")


def function_is_whole(program: Program) -> None:
    """A function names each of its results once, its inputs are tensors, and it keeps no state."""
    if not program.is_function:
        return
    results = program.output().args[0]
    names = program.outputs
    if not isinstance(results, tuple | list) or len(results) != len(names) or len(set(names)) != len(names):
        raise VerifyError(program.output(), f"the results are not one each for {names}")
    for node in (*program.inputs(), *results):
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            raise VerifyError(program.output(), f"{node} of a function is no tensor")
    if program.kv:
        raise VerifyError(None, "a function keeps no state")
    unknown = set(program.dim_symbols.values()) - {dim.name for dim in program.dims}
    if unknown:
        raise VerifyError(None, f"symbols stand for {sorted(unknown)}, which are no dims")


def type_key(value: object) -> object:
    """Comparable shape and dtype of a fake value or a tuple of them."""
    if isinstance(value, torch.Tensor):
        return (tuple(str(size) for size in value.shape), str(value.dtype))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(type_key(item) for item in value)
    return str(value)


def _layout_key(node: fx.Node) -> Any:
    """What an operator can know of an argument before it runs: type and strides."""
    value = node.meta["val"]
    return (type_key(value), str(value.stride())) if isinstance(value, torch.Tensor) else type_key(value)


def same_type(one: object, other: object) -> bool:
    return type_key(one) == type_key(other)


def _kept(node: fx.Node) -> KVLayer | None:
    """What a call on the state takes a layer to keep; None for operators this rule does not know."""
    given = named_arguments(node)
    found = operator_of(node)
    match found._opname if found is not None else "":
        case "kv_write":
            key, value = given["k"].meta["val"].shape, given["v"].meta["val"].shape
            return KVLayer(key[1], key[2], value[2])
        case "attention":
            return KVLayer(given["kv_heads"], given["q"].meta["val"].shape[2], given["value_dim"])
        case "latent_write":
            latent, rope = given["latent"].meta["val"].shape[1], given["rope"].meta["val"].shape[1]
            return KVLayer(1, latent + rope, latent, latent=True)
        case "latent_attention":
            latent, rope = given["q_latent"].meta["val"].shape[2], given["q_rope"].meta["val"].shape[2]
            return KVLayer(1, latent + rope, latent, latent=True)
        case "qk_norm_rope_write":
            return KVLayer(given["kv_heads"], given["head_dim"], given["head_dim"])
    return None


def fixed_floats(node: fx.Node) -> int:
    """Floats that a call on the recurrent state keeps of each sequence. Raises VerifyError for an unknown operator."""
    given = named_arguments(node)
    found = operator_of(node)
    match found._opname if found is not None else "":
        case "causal_conv":
            channels, taps = given["weight"].meta["val"].shape
            return channels * (taps - 1)
        case "gated_delta":
            _, heads, width = given["v"].meta["val"].shape
            return heads * given["k"].meta["val"].shape[2] * width
        case "gated_delta_mixed":
            return given["key_dim"] * (given["mixed"].meta["val"].shape[1] - 2 * given["k_heads"] * given["key_dim"])
    raise VerifyError(node, "is not known to keep a state that does not grow")


RULES: tuple[Callable[[Program], None], ...] = (
    values_are_typed,
    inputs_are_the_step,
    function_is_whole,
    calls_are_operators,
    nothing_hides_in_meta,
    weights_exist,
    only_state_is_mutated,
    state_stays_in_the_dialect,
    state_is_written_before_it_is_read,
    recurrent_state_is_apart,
    layers_are_contiguous,
    types_match_operators,
    output_is_logits,
)
