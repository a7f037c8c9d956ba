"""Learned positions and segments of a model become one table of rows by position.

Which embedding is read by what is found out by asking: the model runs on a few equal tokens, up to its first layer, and
what each embedding is indexed with tells words (the tokens), positions (ascending, from some offset on) and segments
(zero). Every token is of segment 0: its row joins the rows of the positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xllm.errors import CompileError
from xllm.ir.program import Weight
from xllm.ir.weight_rules import Reshape, Slice, Sum

_TOKENS = 8


@dataclass(frozen=True)
class Lookups:
    """Paths of the embeddings; row `offset` of the positions is that of position 0."""

    positions: str | None = None
    offset: int = 0
    segments: str | None = None


class _Reached(Exception):
    """The first layer: what comes after it reads no tables."""


def find_lookups(model: nn.Module, first_layer: nn.Module, pad: int | None) -> Lookups:
    """Raises CompileError for an embedding that is read by something else."""
    words = torch.full((1, _TOKENS), (pad or 0) + 1, dtype=torch.long)
    seen: dict[str, Tensor] = {}

    def stop(*_: Any) -> None:
        raise _Reached

    def record(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.setdefault(path, args[0])
            return (args[0].to("meta"),)

        return hook

    hooks = [first_layer.register_forward_pre_hook(stop)]
    hooks += [
        module.register_forward_pre_hook(record(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    extra = {"token_type_ids": torch.zeros_like(words)} if accepts(model, "token_type_ids") else {}
    try:
        model(input_ids=words, **extra)
    except Exception:  # layers, or what mixes devices before them: the tables were read by then
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return _told_apart(seen, words)


def has_offset(model: nn.Module, first_layer: nn.Module, pad: int | None) -> bool:
    """Whether the model, left to itself, reads the positions of its tokens from a row behind the first on."""
    try:
        return find_lookups(model, first_layer, pad).offset > 0
    except CompileError:  # embeddings of another use, which stay as they are
        return False


def _told_apart(seen: Mapping[str, Tensor], words: Tensor) -> Lookups:
    positions, offset, segments = None, 0, None
    for path, index in seen.items():
        flat = index.reshape(-1)
        # A buffer of the model, which has no values here: 0, 1, … in every model that keeps its positions in one.
        ascending = index.is_meta or torch.equal(flat, torch.arange(len(flat)) + flat[0])
        if index.is_meta and len(flat) != _TOKENS:
            raise _unknown(path)
        if not index.is_meta and torch.equal(flat, words.reshape(-1)):
            continue
        if ascending and positions is None:
            positions, offset = path, 0 if index.is_meta else int(flat[0])
        elif not index.is_meta and not flat.any() and segments is None:
            segments = path
        else:
            raise _unknown(path)
    return Lookups(positions, offset, segments)


def lift_lookups(
    model: nn.Module,
    lookups: Lookups,
    tensors: dict[str, tuple[str, Weight]],
    length: int,
    positions: Callable[[], Tensor],
) -> None:
    """Makes the embedding of positions give rows of one table [length, H], and that of segments nothing.

    `tensors` (checkpoint tensors by path) gets the table; `positions` gives those of the step being traced.
    """
    if lookups.positions is None:
        return
    table = model.get_submodule(lookups.positions)
    assert isinstance(table, nn.Embedding)
    _, weight = tensors[f"{lookups.positions}.weight"]
    rule = Slice(weight.rule, 0, lookups.offset, lookups.offset + length)
    if lookups.segments is not None:
        _, segments = tensors[f"{lookups.segments}.weight"]
        row = Reshape(Slice(segments.rule, 0, 0, 1), (table.embedding_dim,))
        rule = Sum((rule, row))
        # The sum is spelled word + segment + position: zero, and dropped as such.
        model.get_submodule(lookups.segments).register_forward_hook(lambda *_: 0.0)
    table.rows = nn.Parameter(torch.empty(length, table.embedding_dim, device="meta"))
    name = f"{lookups.positions}.rows"
    tensors[name] = (name, Weight((length, table.embedding_dim), rule))
    table.register_forward_hook(lambda *_: torch.ops.xllm.rows(table.rows, positions()).unsqueeze(0))


def rows_of(model: nn.Module, path: str | None, default: int) -> int:
    """Rows of the embedding at `path`; `default` where there is none."""
    table = model.get_submodule(path) if path is not None else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else default


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def _unknown(path: str) -> CompileError:
    return CompileError(
        "an embedding is read neither by tokens nor by positions nor by segments",
        code="unsupported-positions",
        pass_name="capture",
        where=path,
        try_="a model that embeds tokens, positions and segments only",
    )
