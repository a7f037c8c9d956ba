"""Weights as the target stores them, from their rules and the mapped checkpoint, a block of rows at a time: memory
stays near a block where a rule can be read by rows, near the tensor where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3

from xllm.errors import CompileError
from xllm.ir.grids import grid
from xllm.ir.program import Program
from xllm.ir.weight_rules import (
    Concat,
    Constant,
    Dequantise,
    Shift,
    Stack,
    WeightRule,
    dequantised,
    evaluate,
    evaluate_item,
    resolve,
    rule_sources,
    widen,
)
from xllm.kernels.cpu import KernelError, pack_grid, pack_panels, quantised
from xllm.plan import StoredWeight
from xllm.targets.cpu import PANEL_ROWS

if TYPE_CHECKING:
    from xllm.frontend.weights import Checkpoint

BLOCK_BYTES = 4 << 20
PACKING = 1  # raised when the same rule and layout give other bytes than before


def blocks(program: Program, stored: StoredWeight, checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    """A weight's bytes (uint8), in order. Raises CompileError when the checkpoint's tensor has another shape."""
    weight, bits = program.weights[stored.name], _Bits(checkpoint)
    shape = checkpoint.shape_of(weight.rule, program)
    if shape != weight.shape:
        raise CompileError(
            f"{stored.name} is {shape} in the checkpoint, the model wants {weight.shape}",
            code="weight-shape",
            pass_name="weights",
            try_="the config.json that belongs to these weights",
        )
    rule = resolve(weight.rule, checkpoint)
    rows = _Rows(rule, program, checkpoint, bits)
    if stored.layout.form == "plain":
        for block in rows.blocks(1):
            yield laid_out(block, stored)
    elif len(shape) == 3:  # matrices, one after the other: experts
        for index in range(shape[0]):
            kept = _kept(rule, bits, stored, index, index + 1)
            if kept is None:
                kept = laid_out(evaluate_item(rule, index, bits, program.constants), stored)
            yield kept
    else:
        for start, stop in rows.spans(PANEL_ROWS):
            kept = _kept(rule, bits, stored, start, stop)
            yield laid_out(rows.read(start, stop), stored) if kept is None else kept
    for name in _names(rule, checkpoint):
        checkpoint.release(name)


def _kept(
    rule: WeightRule, read: Mapping[str, np.ndarray], stored: StoredWeight, start: int, stop: int
) -> np.ndarray | None:
    """Rows (or one matrix of a stack) of a weight that is stored as integers and was integers, without rounding again;
    None where its integers, groups or scales are not those of the storage."""
    kind = quantised(stored.layout.dtype)
    made = grid(rule, read, start, stop) if kind else None
    if kind is None or made is None:
        return None
    steps, scales, columns = made
    if steps.ndim == 3:
        steps, scales = steps[0], scales[0]
    most = (1 << kind.bits - 1) - 1
    k, group = steps.shape[-1], kind.group or steps.shape[-1]
    if columns % group or steps.min(initial=0) < -most - 1 or steps.max(initial=0) > most:
        return None
    wanted = -(-k // group)
    held = np.repeat(scales, columns // group, axis=-1)[:, :wanted]
    return pack_grid(np.ascontiguousarray(steps), np.ascontiguousarray(held, np.float32), stored.layout.dtype)


def laid_out(array: np.ndarray, stored: StoredWeight) -> np.ndarray:
    """Rows of a weight as its layout has them: uint8 of one dimension. `array` is float32, or bfloat16 as uint16."""
    if stored.layout.form == "plain":
        return np.ascontiguousarray(widen(array)).reshape(-1).view(np.uint8)
    raw = array if array.dtype == np.uint16 else widen(array)
    try:
        return pack_panels(np.ascontiguousarray(raw), stored.layout.dtype)
    except KernelError as error:
        raise CompileError(
            f"{stored.name} cannot be stored as {stored.layout.dtype}: {error}",
            code="bad-weight",
            pass_name="weights",
            try_="--weights bfloat16",
        ) from error


def origin(program: Program, stored: StoredWeight, checkpoint: Checkpoint) -> str:
    """A digest of all that decides a weight's bytes: rule, layout, and the contents of the tensors it reads."""
    weight = program.weights[stored.name]
    rule = resolve(weight.rule, checkpoint)
    made = blake3(f"{PACKING} {rule!r} {weight.shape} {stored.layout!r}".encode())
    for name in _names(rule, checkpoint):
        made.update(f" {name} {checkpoint.digest(name)}".encode())
    for name in _constants(rule):
        value = program.constants[name]
        made.update(f" {name} {value.dtype} {value.shape} ".encode()).update(np.ascontiguousarray(value).tobytes())
    return made.hexdigest()


class _Rows:
    """The rows of a weight, without the array of all of them where its rule allows."""

    def __init__(
        self, rule: WeightRule, program: Program, checkpoint: Checkpoint, bits: Mapping[str, np.ndarray]
    ) -> None:
        self._shape = checkpoint.shape_of(rule, program)
        self._parts: list[_Rows] = []
        self._by = rule.by if isinstance(rule, Shift) else None
        self._stacks = isinstance(rule, Stack)
        self._whole: np.ndarray | None = None
        self._made: Callable[[int, int], np.ndarray] | None = None
        match rule:
            case Dequantise():
                self._made = partial(dequantised, rule, bits)
            case Concat(parts, 0) | Stack(parts):
                self._parts = [_Rows(part, program, checkpoint, bits) for part in parts]
            case Shift(of):
                self._parts = [_Rows(of, program, checkpoint, bits)]
            case _:
                self._whole = evaluate(rule, bits, program.constants)  # a view, unless parts of it are joined below

    def blocks(self, multiple: int) -> Iterator[np.ndarray]:
        """Blocks of rows whose number is a multiple of `multiple`, the last one aside; a scalar is one block."""
        return (self.read(start, stop) for start, stop in self.spans(multiple))

    def spans(self, multiple: int) -> Iterator[tuple[int, int]]:
        """First row of each block, and the row behind it."""
        if not self._shape:
            yield 0, 1
            return
        row_bytes = 4 * max(int(np.prod(self._shape[1:])), 1)
        step = max(BLOCK_BYTES // row_bytes // multiple, 1) * multiple
        for start in range(0, self._shape[0], step):
            yield start, min(start + step, self._shape[0])

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._whole is not None:
            return self._whole[start:stop] if self._shape else self._whole
        if self._made is not None:
            return self._made(start, stop)
        if self._by is not None:
            return widen(self._parts[0].read(start, stop)) + np.float32(self._by)
        if self._stacks:
            return _joined([part.all()[None] for part in self._parts[start:stop]])
        found, at = [], 0
        for part in self._parts:
            size = part._shape[0]
            if at < stop and start < at + size:
                found.append(part.read(max(start - at, 0), min(stop - at, size)))
            at += size
        return _joined(found)

    def all(self) -> np.ndarray:
        return self.read(0, self._shape[0] if self._shape else 1)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    if len({array.dtype for array in arrays}) > 1:
        arrays = [widen(array) for array in arrays]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _names(rule: WeightRule, checkpoint: Checkpoint) -> Iterator[str]:
    """The tensors of this checkpoint that a rule reads."""
    return (next(name for name in source.names if name in checkpoint) for source in rule_sources(rule))


def _constants(rule: WeightRule) -> Iterator[str]:
    if isinstance(rule, Constant):
        yield rule.name
    parts = getattr(rule, "parts", None) or filter(None, (getattr(rule, "of", None),))
    for part in parts:
        yield from _constants(part)


class _Bits(Mapping[str, np.ndarray]):
    """A checkpoint read as it is stored, so that a bfloat16 tensor is packed without a float32 copy of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        return self._checkpoint.raw(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint)

    def __len__(self) -> int:
        return len(self._checkpoint)
