"""Learned positions of a model become a table of rows by position, and its segments join a table that is read anyway.

Which embedding is read by what is found out by asking: the model runs on a few equal tokens, up to its first layer, and
what each embedding is indexed with tells words (the tokens), positions (ascending, from some offset on) and segments
(zero).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xllm.errors import CompileError
from xllm.ir.program import Weight
from xllm.ir.weight_rules import Concat, Reshape, Slice, Sum, WeightRule

_TOKENS = 8


@dataclass(frozen=True)
class Lookups:
    """Paths of the embeddings; row `offset` of the positions is that of position 0. follows: given position ids, the
    model reads the rows that they and the offset name.
    """

    words: str | None = None
    positions: str | None = None
    offset: int = 0
    segments: str | None = None
    follows: bool = False


class _Reached(Exception):
    """The first layer: what comes after it reads no tables."""


class _Recorder(TorchFunctionMode):
    """Notes what each embedding of a model on the meta device is indexed with, the first time. Indices keep their
    values: what the model's code makes on the device of its weights is made on the CPU.
    """

    def __init__(self, paths: Mapping[int, str]) -> None:
        super().__init__()
        self.paths = paths  # of the embeddings, by identity of the weight
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding and id(args[1]) in self.paths:
            self.seen.setdefault(self.paths[id(args[1])], args[0])
            return torch.empty(*args[0].shape, args[1].shape[1], device="meta")
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type == "meta":
            kwargs = {**kwargs, "device": "cpu"} if func in _FACTORIES else kwargs
        return func(*args, **kwargs)


_FACTORIES = frozenset({torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor})


def find_lookups(model: nn.Module, first_layer: nn.Module, pad: int | None) -> Lookups:
    """Raises CompileError for an embedding that is read by something else."""
    words = torch.full((1, _TOKENS), (pad or 0) + 1, dtype=torch.long)
    found = _told_apart(_read(model, first_layer, words, {}), words)
    if found.positions is None or not accepts(model, "position_ids"):
        return found
    given = torch.arange(3, 3 + _TOKENS)
    index = _read(model, first_layer, words, {"position_ids": given[None]}).get(found.positions)
    follows = index is not None and not index.is_meta and torch.equal(index.reshape(-1), given + found.offset)
    return replace(found, follows=follows)


def _read(model: nn.Module, first_layer: nn.Module, words: Tensor, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each embedding is indexed with before the first layer, by its path."""

    def stop(*_: Any) -> None:
        raise _Reached

    hook = first_layer.register_forward_pre_hook(stop)
    tables = {path: module.weight for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if accepts(model, "token_type_ids"):
        extra = {**extra, "token_type_ids": torch.zeros_like(words)}
    recorder = _Recorder({id(weight): path for path, weight in tables.items()})
    # Rotary modules keep what they computed last: here it would be without values.
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        with recorder:
            model(input_ids=words, **extra)
    except Exception:  # layers, or what mixes devices before them: the tables were read by then
        pass
    finally:
        hook.remove()
        for module, attributes, buffers in before:
            module.__dict__ = {**attributes, "_buffers": buffers}
    return recorder.seen


def _told_apart(seen: Mapping[str, Tensor], words: Tensor) -> Lookups:
    words_path, positions, offset, segments = None, None, 0, None
    for path, index in seen.items():
        flat = index.reshape(-1)
        # A buffer of the model, which has no values here: 0, 1, … in every model that keeps its positions in one.
        ascending = index.is_meta or torch.equal(flat, torch.arange(len(flat)) + flat[0])
        if index.is_meta and len(flat) != _TOKENS:
            raise _unknown(path)
        if not index.is_meta and torch.equal(flat, words.reshape(-1)):
            words_path = path
            continue
        if ascending and positions is None:
            positions, offset = path, 0 if index.is_meta else int(flat[0])
        elif not index.is_meta and not flat.any() and segments is None:
            segments = path
        else:
            raise _unknown(path)
    return Lookups(words_path, positions, offset, segments)


def lift_lookups(
    model: nn.Module,
    lookups: Lookups,
    tensors: dict[str, tuple[str, Weight]],
    length: int,
    positions: Callable[[], Tensor],
    paired: bool,
) -> None:
    """Makes the embedding of positions give rows of one table [length, H], and that of segments nothing.

    paired: token t of segment s is read as id s * vocab + t, from a table of words that has every segment's row added.
    Otherwise all tokens are of segment 0. `tensors` (checkpoint tensors by path) gets the tables; `positions` gives
    those of the step being traced.
    """
    segment = _segment_rows(model, lookups, tensors)
    if paired and segment and lookups.words is not None:
        words = model.get_submodule(lookups.words)
        _, weight = tensors[f"{lookups.words}.weight"]
        count, width = weight.shape
        held = Weight((len(segment) * count, width), Concat(tuple(Sum((weight.rule, row)) for row in segment)))
        _adopt(words, lookups.words, held, tensors)
        words.register_forward_hook(lambda module, args, _: torch.ops.aten.embedding(module.rows, args[0]))
        segment = ()
    if lookups.positions is None:
        if segment and lookups.segments is not None:
            table = model.get_submodule(lookups.segments)
            width = tensors[f"{lookups.segments}.weight"][1].shape[1]
            _adopt(table, lookups.segments, Weight((width,), segment[0]), tensors)
            table.register_forward_hook(lambda module, *_: module.rows)
        return
    table = model.get_submodule(lookups.positions)
    _, weight = tensors[f"{lookups.positions}.weight"]
    rule = Slice(weight.rule, 0, lookups.offset, lookups.offset + length)
    held = Weight((length, weight.shape[1]), Sum((rule, segment[0])) if segment else rule)
    _adopt(table, lookups.positions, held, tensors)
    where = lookups.positions

    def rows(module: Any, _: Any, output: Any) -> Tensor:
        """In the form the embedding gives its own: [T, H], or [1, T, H]."""
        if not isinstance(output, Tensor) or output.dim() not in (2, 3):
            raise _unknown(where, "gives more than its rows")
        found = torch.ops.xllm.rows(module.rows, positions())
        return found if output.dim() == 2 else found.unsqueeze(0)

    table.register_forward_hook(rows)


def _segment_rows(
    model: nn.Module, lookups: Lookups, tensors: Mapping[str, tuple[str, Weight]]
) -> tuple[WeightRule, ...]:
    """The row of each segment. The embedding itself gives nothing from now on: the sum is spelled word + segment +
    position, and zero is dropped from it.
    """
    if lookups.segments is None:
        return ()
    table = model.get_submodule(lookups.segments)
    table.register_forward_hook(lambda *_: torch.zeros((), device="meta"))
    _, weight = tensors[f"{lookups.segments}.weight"]
    count, width = weight.shape
    return tuple(Reshape(Slice(weight.rule, 0, at, at + 1), (width,)) for at in range(count))


def _adopt(table: nn.Module, path: str, weight: Weight, tensors: dict[str, tuple[str, Weight]]) -> None:
    """Gives an embedding the table `rows` beside its own weight."""
    table.rows = nn.Parameter(torch.empty(weight.shape, device="meta"))
    tensors[f"{path}.rows"] = (f"{path}.rows", weight)


def rows_of(model: nn.Module, path: str | None, default: int) -> int:
    """Rows of the embedding at `path`; `default` where there is none."""
    table = model.get_submodule(path) if path is not None else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else default


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in inspect.signature(model.forward).parameters


def _unknown(path: str, what: str = "is read neither by tokens nor by positions nor by segments") -> CompileError:
    return CompileError(
        f"an embedding {what}",
        code="unsupported-positions",
        pass_name="capture",
        where=path,
        try_="a model that embeds tokens, positions and segments only",
    )
