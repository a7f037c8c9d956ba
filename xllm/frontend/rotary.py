"""Rotary embeddings become tables: the row of position p is what the model's own module gives for position p.

A module that makes (cos, sin) from positions alone needs no operators in the program: it is run once, here, on the
CPU in float32. Where frequencies depend on the current length, a token must not depend on how its prompt was cut:
longrope changes all rows at once when a text outgrows the original length, so the length compiled for decides; with
dynamic NTK the row of position p is what the module gives at length p + 1, as in decoding token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SAMPLES = 24  # positions at which a vectorised table is compared with the module run for that position alone


@dataclass(frozen=True)
class Tables:
    """cos and sin, float32 [positions, rotary_dim]. paired: the module gives complex numbers, which rotate pairs of
    neighbours, so that each cosine and sine stands twice. note: what the user has to know of how they were made."""

    cos: np.ndarray
    sin: np.ndarray
    paired: bool = False
    note: str = ""


def is_rotary(module: nn.Module) -> bool:
    """Whether the module has the structure of a rotary embedding: inverse frequencies as a buffer of its own."""
    return bool(_variants(module))


def make_tables(module: nn.Module, max_len: int) -> dict[str, Tables] | None:
    """Tables by variant ("" or the layer type that the module is asked for); None when it does not make (cos, sin).

    `module` lies on the CPU with its buffers filled; it is copied, never changed.
    """
    tables: dict[str, Tables] = {}
    for variant in _variants(module):
        made = _make(module, variant, max_len)
        if made is None:
            return None
        paired = isinstance(_ask(module, variant, torch.zeros(1, dtype=torch.long)), Tensor)
        tables[variant] = Tables(made[0].numpy(), made[1].numpy(), paired, _note(module, variant, max_len))
    return tables


class RotaryRows(nn.Module):
    """Stands where the rotary module stood, for code that asks what it was too, and reads rows of its tables; buffers
    `{variant}_cos`, `{variant}_sin` on meta.
    """

    def __init__(
        self, tables: Mapping[str, Tables], index: Callable[[Tensor], Tensor], module: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = module
        self._index = index
        self._paired = {variant for variant, pair in tables.items() if pair.paired}
        for variant, pair in tables.items():
            for part, table in (("cos", pair.cos), ("sin", pair.sin)):
                self.register_buffer(
                    f"{variant}_{part}".lstrip("_"), torch.empty(table.shape, device="meta"), persistent=False
                )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor] | Tensor:
        variant = layer_type or ""
        index = self._index(position_ids)
        cos, sin = (getattr(self, f"{variant}_{part}".lstrip("_")) for part in ("cos", "sin"))
        rows = torch.ops.xllm.rows(cos, index), torch.ops.xllm.rows(sin, index)
        if variant in self._paired:
            return torch.complex(rows[0][:, ::2], rows[1][:, ::2]).unsqueeze(0)
        return rows[0].unsqueeze(0), rows[1].unsqueeze(0)


def _variants(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    found = [name.removesuffix("inv_freq").rstrip("_") for name in names if name.endswith("inv_freq")]
    return sorted(variant for variant in found if not variant.endswith("original"))


def _make(module: nn.Module, variant: str, max_len: int) -> tuple[Tensor, Tensor] | None:
    positions = torch.arange(max_len)
    whole = _call(module, variant, positions)
    if whole is None:
        return None
    if _rope_type(module, variant) == "longrope" or _right(module, variant, positions, whole):
        return whole
    return _per_position(module, variant, max_len) or _by_stretches(module, variant, 0, max_len)


def _rope_type(module: nn.Module, variant: str) -> str:
    """The module's own word for its scaling, "default" without one."""
    types: Any = getattr(module, "rope_type", "default")
    return types[variant] if variant else types


def _note(module: nn.Module, variant: str, max_len: int) -> str:
    config = getattr(module, "config", None)
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    original = parameters.get(variant, parameters).get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", 0) or 0
    limit = getattr(config, "max_position_embeddings", max_len)
    match _rope_type(module, variant):
        case "longrope" if 0 < original < max_len:
            return (
                f"longrope: every position takes the long factors, for max-len {max_len} is beyond the original length"
                f" {original}; with --max-len {original} all take the short ones"
            )
        case "dynamic" if max_len > limit:
            return (
                "dynamic rope: a token at position p is rotated as in a text of p + 1 tokens, however its prompt is"
                f" cut; transformers rotates a prompt longer than {limit} by its whole length"
            )
    return ""


def _call(module: nn.Module, variant: str, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) [P, rotary_dim] of a fresh copy of the module for these positions; the length is the largest plus
    one.
    """
    result = _ask(module, variant, positions)
    if isinstance(result, Tensor) and result.is_complex():
        result = tuple(part.repeat_interleave(2, dim=-1) for part in (result.real, result.imag))
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
        return None
    cos, sin = (part.reshape(-1, part.shape[-1]) for part in result)
    if cos.is_complex() or cos.shape != sin.shape or cos.shape[0] != positions.numel():
        return None
    return cos.float().contiguous(), sin.float().contiguous()


def _ask(module: nn.Module, variant: str, positions: Tensor) -> Any:
    """What a fresh copy of the module gives; None for one of another signature, which this file cannot replace."""
    extra: dict[str, Any] = {"layer_type": variant} if variant else {}
    try:
        return _fresh(module)(torch.empty(1, dtype=torch.float32), positions[None], **extra)
    except TypeError:
        return None


def _fresh(module: nn.Module) -> nn.Module:
    """The module with buffers of its own: some update their frequencies in place as the length grows."""
    fresh = copy.copy(module)
    own = {name: part.clone() for name, part in module.named_buffers(recurse=False)}
    fresh.__dict__ = {**module.__dict__, "_buffers": own}
    return fresh


def _right(module: nn.Module, variant: str, positions: Tensor, made: tuple[Tensor, Tensor]) -> bool:
    """Whether the rows agree with the module run for one position alone, at both ends and at samples between."""
    picks = torch.linspace(0, positions.numel() - 1, min(_SAMPLES, positions.numel())).long().unique()
    for pick in picks.tolist():
        alone = _call(module, variant, positions[pick : pick + 1])
        # An angle is position times frequency in float32: its rounding grows with the position.
        tolerance = 1e-6 + 2.0**-22 * float(positions[pick])
        if alone is None or any((made[i][pick] - alone[i][0]).abs().max() > tolerance for i in (0, 1)):
            return False
    return True


def _per_position(module: nn.Module, variant: str, max_len: int) -> tuple[Tensor, Tensor] | None:
    """All rows at once for frequencies that change with every length: the module's own init function given all
    lengths.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fresh = _fresh(module)
    types: Any = getattr(fresh, "rope_type", "default")
    init = ROPE_INIT_FUNCTIONS.get(_rope_type(module, variant))
    if init is None:
        return None
    positions = torch.arange(max_len)
    try:
        lengths: Any = positions[:, None] + 1
        frequencies, _ = init(module.config, None, seq_len=lengths, layer_type=variant or None)  # pyright: ignore
    except (RuntimeError, TypeError):
        return None
    setattr(fresh, f"{variant}_inv_freq".lstrip("_"), frequencies)
    fixed = {**types, variant: "default"} if variant else "default"  # so that the frequencies stay as set
    fresh.__dict__["rope_type"] = fixed
    made = _call(fresh, variant, positions)
    return made if made is not None and _right(module, variant, positions, made) else None


def _by_stretches(module: nn.Module, variant: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Rows for [begin, end), halved until both ends of a stretch agree with the module run for them alone."""
    positions = torch.arange(begin, end)
    made = _call(module, variant, positions)
    assert made is not None
    if end - begin == 1 or _right(module, variant, positions, made):
        return made
    middle = (begin + end) // 2
    left, right = (_by_stretches(module, variant, *part) for part in ((begin, middle), (middle, end)))
    return torch.cat((left[0], right[0])), torch.cat((left[1], right[1]))
