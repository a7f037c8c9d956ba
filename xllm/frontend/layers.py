"""Which layers of a model are worth capturing: the stack, the kind of each layer, a short walk that shows them all.

Layers of equal kind that stand between equal neighbours compute the same, so one of them is captured and stamped for
the others. The index of a layer is no part of its kind; that nothing is made of it is for `alike.py` to see.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from xllm.errors import CompileError
from xllm.ir.program import LayerSource

_MODULE_FIELDS = frozenset(vars(nn.Module()))


class Irregular(Exception):
    """Layers of one kind do not compute the same; the message says what shows it."""


@dataclass(frozen=True)
class Stack:
    """The repeated layers of a model: their module path and the modules, in order."""

    path: str
    layers: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Walk:
    """The layers to capture (indices into the model, ascending) and what each stands for."""

    layers: tuple[int, ...]
    sources: tuple[LayerSource, ...]


def find_stack(model: nn.Module, within: str = "") -> Stack:
    """The outermost module list below `within` with the most parameters. Raises CompileError when the model repeats
    nothing.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or path.startswith(inside) or not f"{path}.".startswith(within):
            continue
        inside = (*inside, f"{path}.")
        elements = sum(parameter.numel() for parameter in module.parameters())
        if len(module) and (best is None or elements > best[0]):
            best = (elements, path, module)
    if best is None:
        raise CompileError(
            f"{type(model).__name__} has no list of decoder layers",
            code="no-layer-stack",
            pass_name="capture",
            try_="a decoder model whose layers are a torch.nn.ModuleList",
        )
    return Stack(best[1], tuple(best[2]))


def layer_kinds(stack: Stack, config: Mapping[str, Any]) -> tuple[Sequence[Hashable], list[str]]:
    """One comparable value per layer: module tree, tensor shapes, plain attributes, and the entry of every per-layer
    list of the config. And the attributes left out of it, which only count the layers (see `attribute_of`).
    """
    count = len(stack.layers)
    memo: dict[int, str] = {}
    facts = [_facts(layer, memo) for layer in stack.layers]
    for key, value in config.items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            for entry, found in zip(value, facts, strict=True):
                found[f"config {key}"] = repr(entry)
    counters = _counters(facts)
    kinds = [tuple(sorted((key, value) for key, value in found.items() if key not in counters)) for found in facts]
    return kinds, sorted(counters)


def attribute_of(counter: str) -> tuple[str, str]:
    """Module path in the layer, and the attribute's name."""
    path, _, name = counter.removeprefix("attribute ").rpartition(".")
    return path, name


def share_tensors(stack: Stack) -> bool:
    """Whether two layers hold one parameter, or are one module."""
    owners = [(id(held), index) for index, layer in enumerate(stack.layers) for held in {*layer.parameters(), layer}]
    return len({held for held, _ in owners}) < len(set(owners))


def choose_walk(kinds: Sequence[Hashable]) -> Walk:
    """The shortest walk found by cutting: every (previous, kind, next) of the model stays, every step is a step of
    the model.
    """
    count = len(kinds)
    contexts = [
        (kinds[i - 1] if i else None, kind, kinds[i + 1] if i + 1 < count else None) for i, kind in enumerate(kinds)
    ]
    kept = list(range(count))
    while (cut := _longest_cut([contexts[i] for i in kept])) is not None:
        begin, end = cut
        del kept[begin:end]
    stands_for: list[list[int]] = [[] for _ in kept]
    previous = -1
    for context in contexts:
        follows = previous + 1
        if follows >= len(kept) or contexts[kept[follows]] != context:
            follows = next(c for c, i in enumerate(kept) if contexts[i] == context)
        stands_for[follows].append(sum(map(len, stands_for)))
        previous = follows
    return Walk(tuple(kept), tuple(LayerSource(c, tuple(real)) for c, real in enumerate(stands_for)))


def every_layer(count: int) -> Walk:
    """The walk that captures all layers, each standing for itself."""
    return Walk(tuple(range(count)), tuple(LayerSource(i, (i,)) for i in range(count)))


class LastOutput:
    """What the last captured layer returned while tracing: a tensor, or a tuple that starts with the hidden states."""

    def __init__(self) -> None:
        self.value: Any = None

    def remember(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a captured layer."""
        self.value = output


class SkippedLayer(nn.Module):
    """Takes the place of a layer that another one stands for: hands its input on in the form its predecessor gave it.

    Keeping the place keeps every index: configuration lists and layer indices mean what they meant in the full model.
    """

    def __init__(self, layer: nn.Module, last_output: LastOutput, record: Callable[..., None]) -> None:
        super().__init__()
        self.__dict__["_stands_in_for"] = layer  # outside the module tree, so that its parameters are not exported
        self.__dict__["_last_output"] = last_output
        self.__dict__["_record"] = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_stands_in_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_record"](args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        output = self.__dict__["_last_output"].value
        if not isinstance(output, (tuple, torch.Tensor)):  # None: the layer before was called past its hooks
            raise Irregular(f"a layer hands on {type(output).__name__}, neither hidden states nor a tuple of them")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _facts(layer: nn.Module, memo: dict[int, str]) -> dict[str, Any]:
    """Everything comparable about a layer, by path: classes, tensors, plain attributes."""
    facts: dict[str, Any] = {}
    for path, module in layer.named_modules():
        facts[f"class {path}"] = f"{type(module).__module__}.{type(module).__qualname__}"
        tensors = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
        facts.update({f"tensor {name}": f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors})
        for name, value in vars(module).items():
            if name not in _MODULE_FIELDS:
                plain = isinstance(value, int) and not isinstance(value, bool)
                facts[f"attribute {path}.{name}"] = value if plain else _described(value, memo)
    return facts


def _described(value: Any, memo: dict[int, str]) -> str:
    """The same text for what computes the same. memo: what objects and functions are, by id, while they live."""
    inside = partial(_described, memo=memo)
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return f"[{', '.join(map(inside, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{inside(key)}: {inside(item)}' for key, item in value.items())}}}"
    if id(value) not in memo:
        memo[id(value)] = type(value).__qualname__  # to what holds itself
        memo[id(value)] = _object_described(value, inside)
    return memo[id(value)]


def _object_described(value: Any, inside: Callable[[Any], str]) -> str:
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, (nn.Module, torch.Tensor, type, BuiltinFunctionType)):
        return f"{type(value).__qualname__} {name}"
    if isinstance(value, partial):
        return f"partial {inside((value.func, value.args, value.keywords))}"
    if isinstance(value, MethodType):
        return f"{inside(value.__func__)} of {type(value.__self__).__qualname__}"
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return f"{name} {inside((cells, value.__defaults__, value.__kwdefaults__))}"
    return f"{name} {inside(vars(value)) if hasattr(value, '__dict__') else repr(value)}"


def _counters(facts: Sequence[Mapping[str, Any]]) -> set[str]:
    """The attributes that merely count layers: index plus a constant in every layer that has them."""
    counters = set()
    for key in {key for found in facts for key in found}:
        held = [(index, found[key]) for index, found in enumerate(facts) if key in found]
        first, value = held[0]
        if isinstance(value, int) and all(other == value + index - first for index, other in held):
            counters.add(key)
    return counters


def _longest_cut(contexts: Sequence[Hashable]) -> tuple[int, int] | None:
    """The longest stretch [begin, end) that can go: the walk stays connected and no context is lost."""
    count = len(contexts)
    for length in range(count - 1, 0, -1):
        for begin in range(1, count - length + 1):
            end = begin + length
            if contexts[begin - 1] == contexts[end - 1]:
                left = set(contexts[:begin]) | set(contexts[end:])
                if left.issuperset(contexts[begin:end]):
                    return begin, end
    return None
