"""Weights in the panels that kernels read, made once at compile time.

How an element is stored is spelled as one word: float32, bfloat16, or int8 and int4 with the number of inputs that
share a scale: int8.32, int4.128, and int8.row where all inputs of an output do (see simd/quantised.h).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._library import library
from .errors import KernelError

PANEL_ROWS, SCALE_BYTES, GROUPS = 16, 32, (32, 64, 128)
_PLAIN_BYTES = {"float32": 4, "bfloat16": 2}
_BITS = {"int8": 8, "int4": 4}


class Quantised(NamedTuple):
    """bits of a step; group: inputs that share a scale, 0 for all."""

    bits: int
    group: int

    def padded(self, k: int) -> int:
        """Inputs as they are stored: whole groups, or a multiple of 32 where all share a scale."""
        unit = self.group or GROUPS[0]
        return -(-k // unit) * unit

    def panel_bytes(self, k: int) -> int:
        """Of 16 outputs with k inputs."""
        padded = self.padded(k)
        return padded // (self.group or padded) * SCALE_BYTES + padded * 2 * self.bits

    def row_bytes(self, k: int, rounded: bool = False) -> int:
        """Of a row of k activations as products take it: int16 and a scale, or int8 and two factors for every 32
        (at most). rounded: int8 beside int8 weights too; levels without products of bytes keep these in two bytes."""
        padded = self.padded(k)
        factors = padded // 32 * 8 if rounded or self.bits == 4 else 4
        return -(-(padded * self.bits // 4 + factors) // 64) * 64


def quantised(storage: str) -> Quantised | None:
    """What a word of the int types says; None for float32 and bfloat16. Raises KernelError for any other."""
    if storage in _PLAIN_BYTES:
        return None
    name, _, group = storage.partition(".")
    if name in _BITS and group == "row":
        return Quantised(_BITS[name], 0)
    if name in _BITS and group in map(str, GROUPS):
        return Quantised(_BITS[name], int(group))
    words = [*_PLAIN_BYTES, *(f"{name}.{group}" for name in _BITS for group in (*GROUPS, "row"))]
    raise KernelError(f"weights are stored as one of {', '.join(words)}, not {storage!r}")


def rows_bytes(k: int, storage: str, rounded: bool = False) -> int:
    """Of a row of k activations as a product with such weights takes it. bfloat16 on a matrix unit: three parts in
    bfloat16; rounded, where the machine multiplies bfloat16: one; other levels leave that alone. float32: nothing."""
    if kind := quantised(storage):
        return kind.row_bytes(k, rounded)
    return -(-k // 32) * 64 * (1 if rounded else 3) if storage == "bfloat16" else 0


def packed_bytes(n: int, k: int, storage: str) -> int:
    """Size of an [n, k] weight in panels. Raises KernelError where a size or the word is none."""
    if n < 1 or k < 1:
        raise KernelError(f"a weight of [{n}, {k}] has no panels")
    kind = quantised(storage)
    panel = kind.panel_bytes(k) if kind else k * PANEL_ROWS * _PLAIN_BYTES[storage]
    return -(-n // PANEL_ROWS) * panel


def pack_panels(weight: np.ndarray, storage: str, out: np.ndarray | None = None) -> np.ndarray:
    """Packs [n, k] float32, or bfloat16 as uint16, into panels of 16 rows.

    Returns uint8[packed_bytes(n, k, storage)], which is `out` where given. Rounds to nearest even where it narrows;
    padding is zero. Columns must be contiguous, rows may be strided. Raises KernelError where a scale is beyond
    float16.
    """
    if weight.ndim != 2 or weight.dtype not in (np.float32, np.uint16):
        raise KernelError(f"weight must be [n, k] float32 or uint16 (bfloat16), not {weight.dtype}{list(weight.shape)}")
    n, k = weight.shape
    if k > 1 and weight.strides[1] != weight.itemsize:
        raise KernelError("the columns of weight must be contiguous")
    kind, out = quantised(storage), _room(n, k, storage, out)
    source = int(weight.dtype == np.uint16)
    if kind is None:
        narrow = int(storage == "bfloat16")
        library().xk_pack_panels(weight.ctypes.data, weight.strides[0], source, n, k, narrow, out.ctypes.data)
    elif library().xk_pack_quantised(
        weight.ctypes.data, weight.strides[0], source, n, k, *kind, None, None, out.ctypes.data
    ):
        raise KernelError(f"a weight is not finite, or too large for the float16 scales of {storage}")
    return out


def pack_grid(steps: np.ndarray, scales: np.ndarray, storage: str, out: np.ndarray | None = None) -> np.ndarray | None:
    """The same of a weight that is quantised already: int8 `steps` [n, k] times float32 `scales` [n, groups], taken as
    they are. None where float16 does not hold every scale exactly.
    """
    kind = quantised(storage)
    if kind is None or steps.dtype != np.int8 or scales.dtype != np.float32 or steps.ndim != 2:
        raise KernelError(f"steps must be int8 [n, k] and scales float32, for an int type, not {storage}")
    n, k = steps.shape
    groups = -(-k // kind.group) if kind.group else 1
    if scales.shape != (n, groups):
        raise KernelError(f"scales must be [{n}, {groups}] for {storage}, not {list(scales.shape)}")
    out = _room(n, k, storage, out)
    steps, scales = np.ascontiguousarray(steps), np.ascontiguousarray(scales)
    inexact = library().xk_pack_quantised(
        None, 0, 0, n, k, *kind, steps.ctypes.data, scales.ctypes.data, out.ctypes.data
    )
    return None if inexact else out


def _room(n: int, k: int, storage: str, out: np.ndarray | None) -> np.ndarray:
    size = packed_bytes(n, k, storage)
    if out is None:
        return np.empty(size, np.uint8)
    flags = out.flags
    if out.dtype != np.uint8 or out.shape != (size,) or not flags.c_contiguous or not flags.writeable:
        raise KernelError(f"out must be a contiguous writeable uint8[{size}]")
    return out
