"""Quantised checkpoints by the published layouts, packed with Python's own integers, and the plain ones they stand for.

Values are made of random codes, zeros and scales: what a quantiser would choose does not matter to who reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Maker = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Tensors, np.ndarray]]


def words(codes: np.ndarray, bits: int, *, minus_one: bool = False) -> torch.Tensor:
    """Codes along the last axis as int32, the first in the lowest bits; minus_one: every field of a word less by one,
    borrowing from the next.
    """
    *lead, count = codes.shape
    per = 32 // bits
    packed = []
    for row in codes.reshape(-1, count).tolist():
        row += [0] * (-count % per)
        for at in range(0, len(row), per):
            word = sum(code << (bits * place) for place, code in enumerate(row[at : at + per]))
            word -= sum(1 << (bits * place) for place in range(per)) if minus_one else 0
            packed.append((word + (1 << 31)) % (1 << 32) - (1 << 31))
    return torch.tensor(packed, dtype=torch.int32).reshape(*lead, -1)


@dataclass(frozen=True)
class Numbers:
    """codes [..., rows, columns], zeros and scales [..., rows or blocks of them, G], and what they make, float32."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    plain: np.ndarray
    order: np.ndarray


def numbers(
    shape: tuple[int, ...],
    generator: np.random.Generator,
    *,
    bits: int,
    block: tuple[int, int],
    zeros: str = "any",
    dtype: torch.dtype = torch.float16,
    shuffled: bool = False,
) -> Numbers:
    """Random ones; zeros: "any" of a code's range, the "middle" of it. shuffled: columns are in any group."""
    *lead, rows, columns = shape
    grid = (*lead, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    codes = generator.integers(0, 1 << bits, shape)
    zero = generator.integers(0, 1 << bits, grid) if zeros == "any" else np.full(grid, 1 << (bits - 1))
    size = columns**-0.5 / (1 << (bits - 1))
    scales = torch.from_numpy(generator.uniform(0.5 * size, size, grid)).to(dtype)
    order = np.arange(columns) // block[1]
    if shuffled:
        order = generator.permutation(order)
    down = np.arange(rows) // block[0]
    each = scales.double().numpy()[..., down, :][..., order]
    plain = (codes - zero[..., down, :][..., order]) * each
    return Numbers(codes, zero, scales, plain.astype(np.float32), order)


def gptq(bits: int, group: int, *, version: int = 1, zeros: str = "any", act_order: bool = False) -> Maker:
    def make(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        columns = group if group > 0 else shape[1]
        made = numbers(shape, generator, bits=bits, block=(1, columns), zeros=zeros, shuffled=act_order)
        stem = name.removesuffix("weight")
        return {
            f"{stem}qweight": words(made.codes, bits).T.contiguous(),
            f"{stem}qzeros": words(made.zeros.T, bits, minus_one=version == 1),
            f"{stem}scales": made.scales.T.contiguous(),
            f"{stem}g_idx": torch.from_numpy(made.order.astype(np.int32)),
        }, made.plain

    return make


def awq(group: int) -> Maker:
    """Eight outputs in a word, 0 2 4 6 1 3 5 7 from the lowest bits on."""

    def pack(codes: np.ndarray) -> torch.Tensor:
        return words(codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.shape), 4)

    def make(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        made = numbers(shape, generator, bits=4, block=(1, group))
        stem = name.removesuffix("weight")
        return {
            f"{stem}qweight": pack(made.codes.T),
            f"{stem}qzeros": pack(made.zeros.T),
            f"{stem}scales": made.scales.T.contiguous(),
        }, made.plain

    return make


def packed(bits: int, group: int, *, symmetric: bool = True, act_order: bool = False) -> Maker:
    """compressed-tensors' pack-quantized; group -1: per channel."""

    def make(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        block = (1, group if group > 0 else shape[-1])
        kinds = {"zeros": "middle" if symmetric else "any", "dtype": torch.bfloat16, "shuffled": act_order}
        made = numbers(shape, generator, bits=bits, block=block, **kinds)
        parts = {
            f"{name}_packed": words(made.codes, bits),
            f"{name}_scale": made.scales,
            f"{name}_shape": torch.tensor(shape),
        }
        if not symmetric:
            across = words(made.zeros.swapaxes(-1, -2), bits)
            parts[f"{name}_zero_point"] = across.transpose(-1, -2).contiguous()
        if act_order:
            parts[f"{name}_g_idx"] = torch.from_numpy(made.order.astype(np.int32))
        return parts, made.plain

    return make


def int8(group: int = -1, *, symmetric: bool = True) -> Maker:
    def make(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        block = (1, group if group > 0 else shape[-1])
        zeros = "middle" if symmetric else "any"
        made = numbers(shape, generator, bits=8, block=block, zeros=zeros, dtype=torch.bfloat16)
        parts = {name: torch.from_numpy((made.codes - 128).astype(np.int8)), f"{name}_scale": made.scales}
        if not symmetric:
            parts[f"{name}_zero_point"] = torch.from_numpy((made.zeros - 128).astype(np.int8))
        return parts, made.plain

    return make


def float8(block: tuple[int, int] | None, scale: str = "_scale_inv", dtype: torch.dtype = torch.float32) -> Maker:
    """Eight-bit floats; block (1, 0): a scale for each row, None: one for all."""

    def make(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Tensors, np.ndarray]:
        rows, columns = block or shape[-2:]
        made = numbers(shape, generator, bits=8, block=(rows, columns or shape[-1]), dtype=torch.float32)
        scales = made.scales / 2 if dtype == torch.float32 else (made.scales.log2().ceil().exp2() / 4).to(dtype)
        codes = torch.from_numpy(generator.standard_normal(shape)).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        each = scales.float().numpy()[..., np.arange(shape[-2]) // rows, :][..., made.order]
        parts = {name: codes, f"{name}{scale}": scales if block else scales.reshape(1)}
        return parts, codes.float().numpy() * each

    return make


def rewrite(
    checkpoint: Path, quantised: Path, plain: Path, said: Mapping[str, Any], makers: Mapping[str, Maker], seed: int = 0
) -> list[str]:
    """Two checkpoints of the one at `checkpoint`: with tensors whose names end as `makers` says quantised by these and
    `said` as quantization_config, and with their numbers in float32. The names of these tensors.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    generator, held, numbers = np.random.default_rng(seed), {}, dict(tensors)
    names = []
    for name, tensor in tensors.items():
        maker = next((maker for ending, maker in makers.items() if name.endswith(ending)), None)
        if maker is None:
            held[name] = tensor
            continue
        parts, values = maker(name, tuple(tensor.shape), generator)
        held.update(parts)
        numbers[name] = torch.from_numpy(values)
        names.append(name)
    for folder, saved, extra in ((quantised, held, {"quantization_config": said}), (plain, numbers, {})):
        folder.mkdir(exist_ok=True)
        save_file(saved, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **extra}))
        for file in checkpoint.glob("*token*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "generation_config.json").write_bytes((checkpoint / "generation_config.json").read_bytes())
    return names
