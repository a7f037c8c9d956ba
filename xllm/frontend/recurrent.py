"""Recurrent layers while they are traced: their causal convolution and their delta rule leave as operators of ours.

transformers' modules call both by the names of one interface, globals of the file that defines them; for the time of
one capture these names mean what stands here. What such a layer keeps is counted as it is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xllm.errors import CompileError
from xllm.ir.dialect.activation import ACTIVATIONS

_L2_EPS = 1e-6  # of the interface: no argument changes it
_ALIGN_FLOATS = 16
# Arguments that choose an implementation or ask for a result that a step has no use for.
_HARMLESS = frozenset(
    {"chunk_size", "output_final_state", "use_cache", "position_ids", "cache_position", "position_embeddings"}
)


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of the step being traced belong."""

    fixed: Tensor
    positions: Tensor
    slots: Tensor


class RecurrentCalls:
    """The functions of one capture. `tokens` and `layer` (name and captured index) say what is being traced."""

    def __init__(self, tokens: Callable[[], Tokens], layer: Callable[[], tuple[str, int | None]]) -> None:
        self._tokens, self._layer = tokens, layer
        self.floats: dict[int, int] = {}  # kept so far, by captured layer
        self.complete: set[int] = set()  # layers whose mixing of tokens is one of our operators

    @contextmanager
    def lifted(self, model: nn.Module) -> Iterator[None]:
        """Puts our functions where the model's modules find them; whatever happens, they are gone afterwards."""
        ours: dict[str, Callable[..., Any]] = {"causal_conv1d_fn": self.causal_conv}
        for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "recurrent_gated_delta_rule"):
            ours |= {name: self.gated_delta, f"torch_{name}": self.gated_delta}
        files = {id(found): found for kind in {type(module) for module in model.modules()} if (found := _globals(kind))}
        held = [(names, name, names[name]) for names in files.values() for name in ours if callable(names.get(name))]
        for names, name, _ in held:
            names[name] = ours[name]
        try:
            yield
        finally:
            for names, name, theirs in held:
                names[name] = theirs

    def causal_conv(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **rest: Any,
    ) -> Tensor:
        """hidden_states [1, C, T], weight [C, K]; the result is [1, C, T]."""
        layer = self._place("a causal convolution", rest)
        if activation not in (None, *ACTIVATIONS):
            raise self._refused(f"a causal convolution that ends in {activation}")
        tokens = self._tokens()
        offset = self._claim(layer, int(weight.shape[0]) * (int(weight.shape[1]) - 1))
        x = hidden_states.squeeze(0).transpose(0, 1)
        place = (tokens.positions, tokens.slots, layer, offset)
        out = torch.ops.xllm.causal_conv(tokens.fixed, x, weight, bias, *place, activation or "")
        return out.transpose(0, 1).unsqueeze(0)

    def gated_delta(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """query, key [1, T, Hk, D], value [1, T, Hv, Dv], g, beta [1, T, Hv]; the result is [1, T, Hv, Dv]."""
        layer = self._place("a delta rule", rest)
        if g.dim() != 3 or beta.dim() != 3:
            raise self._refused("a delta rule whose decay is not one number per head")
        tokens = self._tokens()
        heads, width = int(value.shape[2]), int(value.shape[3])
        offset = self._claim(layer, heads * int(key.shape[3]) * width)
        self.complete.add(layer)
        parts = [part.squeeze(0) for part in (query, key, value, g, beta)]
        factor = float(scale) if scale is not None else int(key.shape[3]) ** -0.5
        place = (tokens.positions, tokens.slots, layer, offset)
        eps = _L2_EPS if use_qk_l2norm_in_kernel else 0.0
        return torch.ops.xllm.gated_delta(tokens.fixed, *parts, *place, factor, eps).unsqueeze(0), None

    def _place(self, what: str, rest: dict[str, Any]) -> int:
        """The captured layer of a call, after refusing what our operators do not compute."""
        _, layer = self._layer()
        if layer is None:
            raise self._refused(f"{what} outside the decoder layers")
        given = [name for name, value in rest.items() if value is not None and name not in _HARMLESS]
        if extra := [name for name in given if rest[name] is not False]:
            raise self._refused(f"{what} with the argument {extra[0]!r}")
        return layer

    def _claim(self, layer: int, floats: int) -> int:
        """Room for what an operator keeps, at a whole cache line."""
        offset = -(-self.floats.get(layer, 0) // _ALIGN_FLOATS) * _ALIGN_FLOATS
        self.floats[layer] = offset + floats
        return offset

    def _refused(self, what: str) -> CompileError:
        return CompileError(
            f"{what} cannot be expressed",
            code="unsupported-recurrence",
            pass_name="capture",
            where=self._layer()[0],
            node="recurrent layer",
            try_="a model whose recurrent layers are gated delta rules behind causal convolutions",
        )


def _globals(kind: type[nn.Module]) -> dict[str, Any] | None:
    return getattr(inspect.unwrap(kind.forward), "__globals__", None)
