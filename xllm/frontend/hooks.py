"""What the model's code meets while it is traced: our attention, our experts, masks that say what they are, and the cut
to the wanted rows.

The functions are registered on the instances transformers' modules read, for the time of one capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xllm.errors import CompileError
from xllm.frontend.experts import Form, experts
from xllm.frontend.layers import Stack, Walk
from xllm.frontend.masks import Mask, read_mask
from xllm.frontend.recurrent import RecurrentCalls, Tokens
from xllm.ir.program import KVLayer

HOOK, SDPA = "xllm", "sdpa"
# Tensors models hand to every attention function although only the mask or the rotary embedding needs them.
_HARMLESS = frozenset({"position_ids", "cache_position", "position_embeddings"})


@dataclass(frozen=True)
class StepInputs:
    """The inputs of the step being traced; position_ids is `positions` as the model was given them, [1, T]."""

    positions: Tensor
    position_ids: Tensor
    slots: Tensor
    last: Tensor
    kv: Tensor
    fixed: Tensor


class Session:
    """One capture: the inputs of its step, the layer each module belongs to, and what each layer keeps.

    whole: every step holds whole sequences, so that attention may look ahead.
    """

    def __init__(self, whole: bool = False) -> None:
        self.inputs: StepInputs | None = None
        self._cut: StepInputs | None = None  # the step whose hidden states are cut already
        self._whole = whole
        self._layer_of: dict[nn.Module, int] = {}
        self._names: list[str] = []
        self._kv: dict[int, KVLayer] = {}
        self._written: dict[int, tuple[Tensor, Tensor]] = {}  # the keys and values that a captured layer keeps
        self._traced: int | None = None  # the captured layer whose forward is running
        self._recurrent = RecurrentCalls(self._tokens, self._running)
        self.experts: dict[nn.Module, Form] = {}
        self._plain: set[bool] = set()  # whether the plain masks that the model made are causal
        self.segmented = False  # whether the model has a table of segments
        self._layers: list[nn.Module] = []  # the captured ones
        self._doubtful: list[int] = []  # layers of which only a convolution is known

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Puts our functions where the models look for them; whatever happens, they are gone afterwards."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[HOOK] = self.attention
        masks = (
            ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
        )  # masks are made for what stands there, not for the instance
        # Who calls torch's function may take no mask for no bias either: this one is never none.
        theirs, function = masks[SDPA], nn.functional.scaled_dot_product_attention
        masks[HOOK], masks[SDPA] = self.mask, read_mask
        nn.functional.scaled_dot_product_attention = partial(self.direct, function)
        ALL_EXPERTS_FUNCTIONS[HOOK] = experts(self.experts)
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[HOOK]
            del masks[HOOK]
            masks[SDPA], nn.functional.scaled_dot_product_attention = theirs, function
            del ALL_EXPERTS_FUNCTIONS[HOOK]

    def follow(self, stack: Stack, walk: Walk) -> None:
        """Learns which captured layer each module is part of."""
        for captured, real in enumerate(walk.layers):
            layer = stack.layers[real]
            if any(
                module in self._layer_of for module in layer.modules() if next(module.parameters(), None) is not None
            ):
                raise CompileError(
                    "two layers hold one module",
                    code="shared-modules",
                    pass_name="capture",
                    where=f"{stack.path}.{real}",
                    node=type(layer).__name__,
                    try_="a model whose layers share tensors, not modules",
                )
            self._layers.append(layer)
            self._names.append(f"{stack.path}.{real} ({type(layer).__name__})")
            self._layer_of.update({module: captured for module in layer.modules()})
            layer.register_forward_pre_hook(partial(self._enter, captured))
            layer.register_forward_hook(partial(self._leave, captured))

    def lifted(self, model: nn.Module) -> AbstractContextManager[None]:
        """For the time of the trace, calls of recurrent functions in the model's modules become operators."""
        return self._recurrent.lifted(model)

    def index(self, position_ids: Tensor) -> Tensor:
        """Row index [T] for the positions a rotary module was asked for."""
        assert self.inputs is not None
        if position_ids is self.inputs.position_ids:
            return self.inputs.positions
        while position_ids.dim() > 2 and (position_ids.stride(0) == 0 or position_ids.shape[0] == 1):
            position_ids = position_ids.select(0, 0)  # several coordinates, all of them the position: text
        if position_ids.dim() > 2 or (position_ids.dim() == 2 and position_ids.shape[0] != 1):
            raise CompileError(
                "positions have several coordinates per token",
                code="unsupported-positions",
                pass_name="capture",
                try_="a text-only model (multimodal rotary positions are not captured)",
            )
        return position_ids.reshape(-1)

    def keep_last_rows(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the decoder below the output head: only the rows whose logits are wanted go on. The first
        module of a step that has it cuts; those around it hand on what was cut.
        """
        assert self.inputs is not None
        if self._cut is self.inputs:
            return None
        self._cut = self.inputs
        hidden = output[0]
        return with_hidden(output, torch.ops.xllm.rows(hidden.select(0, 0), self.inputs.last).unsqueeze(0))

    def mask(self, *args: Any, **kwargs: Any) -> Mask | None:
        """Registered as transformers' mask interface. None for a mask that is plain, as models expect it."""
        mask = read_mask(*args, **kwargs)
        if mask.window or mask.unknown:
            return mask
        self._plain.add(mask.causal)
        return None

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """query, key, value [1, heads, T, width] as transformers passes them; the result is [1, T, heads, width]."""
        inputs = self.inputs
        assert inputs is not None
        layer = self._place(module, attention_mask, sliding_window, rest)
        if query.shape[2] != inputs.positions.shape[0] or key.shape[2] != query.shape[2]:
            raise self._refusal("attention whose queries or keys are not the tokens of a step", module, layer)
        window = attention_mask.window if isinstance(attention_mask, Mask) else 0
        window = window or int(sliding_window or 0)
        heads, width = int(key.shape[1]), int(key.shape[3])
        q, k, v = (part.transpose(1, 2).squeeze(0) for part in (query, key, value))
        if not is_causal(module, rest):
            self._kv[layer] = KVLayer(0, 0, 0)
            if s_aux is not None:
                raise self._refusal("attention sinks beside attention that is not causal", module, layer)
            options = (float(scaling or width**-0.5), window, float(softcap or 0.0))
            out = torch.ops.xllm.encode_attention(q, k, v, inputs.positions, inputs.slots, *options)
            return out.unsqueeze(0), None
        # Keys and values that another layer attended to are kept there: this one keeps none.
        keeper = next((at for at, held in self._written.items() if held[0] is key and held[1] is value), layer)
        self._kv[layer] = KVLayer(0, 0, 0) if keeper != layer else KVLayer(heads, width, int(value.shape[3]))
        if keeper == layer:
            self._written[layer] = (key, value)
            torch.ops.xllm.kv_write(inputs.kv, k, v, inputs.positions, inputs.slots, layer)
        scale = float(scaling) if scaling is not None else width**-0.5
        options = (keeper, heads, int(value.shape[3]), scale, window, float(softcap or 0.0))
        out = torch.ops.xllm.attention(inputs.kv, q, inputs.positions, inputs.slots, s_aux, *options)
        return out.unsqueeze(0), None

    def direct(
        self,
        theirs: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: Any = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """In the place of torch's function while a layer runs that calls it past transformers' interface; the result
        is [1, heads, T, width]. Elsewhere it is `theirs`.
        """
        if self._traced is None:
            return theirs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        causal = attn_mask.causal if isinstance(attn_mask, Mask) else bool(is_causal)
        layer = self._layers[self._traced]
        return self.attention(layer, query, key, value, attn_mask, scale, is_causal=causal)[0].transpose(1, 2)

    def kv_layers(self) -> tuple[KVLayer, ...]:
        """What each captured layer keeps."""
        none, floats = KVLayer(0, 0, 0), self._recurrent.floats
        return tuple(
            replace(self._kv.get(captured, none), fixed_floats=floats.get(captured, 0))
            for captured in range(len(self._names))
        )

    def _tokens(self) -> Tokens:
        assert self.inputs is not None
        return Tokens(self.inputs.fixed, self.inputs.positions, self.inputs.slots)

    def _running(self) -> tuple[str, int | None]:
        return ("" if self._traced is None else self._names[self._traced]), self._traced

    def _enter(self, captured: int, *called: Any) -> None:
        """Forward pre-hook of a captured layer."""
        self._traced = captured

    def _leave(self, captured: int, *called: Any) -> None:
        """Forward hook of a captured layer: refuses one whose tokens meet by other means than our operators."""
        self._traced = None
        if captured in self._recurrent.complete or (captured in self._kv and captured not in self._recurrent.floats):
            return
        if captured not in self._recurrent.floats:
            raise self._foreign(captured)
        self._doubtful.append(captured)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Around the trace and the check of its tokens: of a layer known by its convolution alone, these have to show
        that the rest keeps tokens apart. Where they fail, the layer recurs by means of its own.
        """
        try:
            yield
        except CompileError as error:
            if self._doubtful and error.code in ("mixes-tokens", "shape-guard", "data-dependent", "capture-failed"):
                raise self._foreign(self._doubtful[0]) from error
            raise

    def _foreign(self, captured: int) -> CompileError:
        return CompileError(
            "a layer mixes tokens by other means than transformers' attention interface or a gated delta rule",
            code="recurrent-layer",
            pass_name="capture",
            where=self._names[captured],
            node="no attention call",
            try_="a model whose every layer attends, or recurs, through these (other recurrent layers do not)",
        )

    def _place(self, module: nn.Module, mask: Any, window: int | None, rest: dict[str, Any]) -> int:
        """The captured layer of an attention call, after refusing what our operator does not compute."""
        layer = self._layer_of.get(module)
        refused = ""
        if layer is None:
            refused = "attention outside the decoder layers"
        elif layer in self._kv:
            refused = "a second attention in one layer"
        elif mask is not None and not isinstance(mask, Mask):
            refused = "an attention mask the model made itself"
        elif mask is not None and mask.unknown:
            refused = f"an attention mask that {mask.unknown} is part of"
        elif self._at_odds(mask, window, is_causal(module, rest)):
            refused = "an attention mask that is at odds with its call"
        elif not self._whole and not is_causal(module, rest):
            refused = "attention that is not causal"
        else:
            extra = [key for key, value in rest.items() if isinstance(value, Tensor) and key not in _HARMLESS]
            refused = f"attention with an extra tensor {extra[0]!r}" if extra else ""
        if refused:
            raise self._refusal(refused, module, layer)
        assert layer is not None
        return layer

    def _at_odds(self, mask: Mask | None, window: int | None, causal: bool) -> bool:
        if mask is None:  # any of those that are plain
            return bool(self._plain) and causal not in self._plain
        return mask.causal != causal or (window or mask.window) != mask.window

    def _refusal(self, what: str, module: nn.Module, layer: int | None) -> CompileError:
        name = type(module).__name__
        return CompileError(
            f"{what} cannot be expressed",
            code="unsupported-attention",
            pass_name="capture",
            where=f"{self._names[layer]}, {name}" if layer is not None else name,
            node="attention",
            try_="a decoder with one causal self-attention per layer, or an encoder with --task embed",
        )


def is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Whether an attention call looks back only, as the call says or else the module."""
    said = options.get("is_causal")
    return (getattr(module, "is_causal", True) if said is None else said) is not False


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of a model or of its layers (a tuple, or named) with other hidden states."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output
