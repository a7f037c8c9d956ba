"""Whether a captured layer computes what the layers it stands for would: while it is traced, nothing may be done with
its index, and all of them must be called with the same, though the layers that are skipped compute nothing.

What is found irregular is captured layer by layer instead, which costs time but is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from xllm.frontend.layers import Irregular, LastOutput, SkippedLayer, Stack, Walk, attribute_of


class LayerIndex:
    """The index of a layer that stands for others, while it is traced. It counts as what it is, and remembers that it
    was asked. It is no int: what torch takes for one it would compute with unseen.
    """

    def __init__(self, value: int, name: str, used: Callable[[str], None]) -> None:
        self.value, self.name, self.used = value, name, used


def _remembered(operation: str) -> Callable[..., Any]:
    def compute(self: LayerIndex, *others: Any) -> Any:
        self.used(self.name)
        return getattr(self.value, operation)(*(o.value if isinstance(o, LayerIndex) else o for o in others))

    return compute


_OPERATIONS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow divmod neg pos abs and rand or"
    " ror xor rxor lshift rshift eq ne lt le gt ge hash bool int float index str format round"
)
for _name in _OPERATIONS.split():
    setattr(LayerIndex, f"__{_name}__", _remembered(f"__{_name}__"))


class Watch:
    """Follows one trace of a model whose layers outside of `walk` are skipped."""

    def __init__(self, stack: Stack, walk: Walk, counters: Sequence[str]) -> None:
        self._walk = walk
        self._last = LastOutput()
        self._used: list[str] = []
        self._calls: dict[int, Any] = {}
        self._alive: list[Any] = []  # what is told apart by identity
        self._path = stack.path
        for source, real in zip(walk.sources, walk.layers, strict=True):
            if len(source.stands_for) > 1:
                self._hide_index(stack.layers[real], counters)

    def skip(self, layers: nn.Module) -> None:
        """Replaces, in place, every layer that is not captured."""
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers):
            record = partial(self._record, index)
            if index in self._walk.layers:
                layer.register_forward_pre_hook(
                    lambda _, args, given, record=record: record(args, given), with_kwargs=True
                )
                layer.register_forward_hook(self._last.remember)
            else:
                layers[index] = SkippedLayer(layer, self._last, record)

    def check(self) -> None:
        """Raises Irregular when the trace has shown that layers which are stood for are not like those that stand for
        them.
        """
        if self._used:
            raise Irregular(f"{self._used[0]} is computed with")
        for source, real in zip(self._walk.sources, self._walk.layers, strict=True):
            for other in source.stands_for:
                if other != real and self._calls.get(other) != self._calls.get(real):
                    raise Irregular(f"{self._path}.{other} is not called as {self._path}.{real} is")

    def explains(self, error: Exception) -> bool:
        """Whether a trace may have failed because of what was put into it here."""
        return bool(self._used) or LayerIndex.__name__ in str(error)

    def _hide_index(self, layer: nn.Module, counters: Sequence[str]) -> None:
        for counter in counters:
            path, name = attribute_of(counter)
            module = dict(layer.named_modules()).get(path)
            if module is not None and name in vars(module):
                hidden = LayerIndex(vars(module)[name], f"{path}.{name}".strip("."), self._used.append)
                vars(module)[name] = hidden

    def _record(self, real: int, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Remembers how a layer is called: values, and where tensors and other objects come from."""
        handed = self._last.value if isinstance(self._last.value, (tuple, list)) else (self._last.value,)

        def described(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return tuple(map(described, value))
            if isinstance(value, dict):
                return tuple((key, described(item)) for key, item in value.items())
            if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
                return value
            for index, item in enumerate(handed):
                if value is item:
                    return ("of the layer before", index)
            self._alive.append(value)
            return (type(value).__name__, id(value))

        self._calls[real] = (described(args), described(given))
