"""Quantised tensors of checkpoints as numbers, (code - zero) * scale, a block of rows at a time.

Whatever way a file packs them, they are here codes [..., rows, columns] and, for each block of rows and columns, one
scale and perhaps one zero. Three dimensions are a stack of matrices, whose "rows" to read are the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRANSPOSED = ("gptq", "gptq_v2", "awq")  # inputs first, as the kernels these layouts were made for want them
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word is, from its lowest bits on


@dataclass(frozen=True)
class Scheme:
    """How a tensor is stored whose numbers are [..., rows, columns]. Words are int32, their lowest bits come first.

    packing: where codes and zeros are, with G blocks along columns:
      gptq     codes: words [columns, rows] packed along columns; scales [G, rows]; zeros: words [G, rows] packed along
               rows, in files one less than they are
      gptq_v2  the same with zeros as they are
      awq      codes: words [columns, rows], zeros: words [G, rows], both packed along rows in an order of their own;
               scales [G, rows]
      packed   codes: words [..., rows, columns] packed along columns, zeros: words [..., rows, G] packed along rows,
               both offset to be unsigned; scales [..., rows, G]
      int8     codes int8 [..., rows, columns], zeros int8 and scales [..., rows / block, G]
      float8   codes float8 e4m3 as uint8 [..., rows, columns], scales [..., rows / block, G]
    bits: of a code. block: how many rows and columns share a scale; the last block of either may be smaller.
    """

    packing: str
    bits: int
    shape: tuple[int, ...]
    block: tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """The arrays of one tensor as the file has them, bfloat16 as uint16. order: int32 [columns], the block of each
    column, where these are not in sequence.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    order: np.ndarray | None = None


def values(scheme: Scheme, parts: Parts, start: int, stop: int) -> np.ndarray:
    """Rows start to stop as float32 [stop - start, ..., columns]. An integer times a scale of 16 bits is exact."""
    parts, first, last = _cut(scheme, parts, start, stop)
    if scheme.packing == "float8":
        made = E4M3[parts.codes[..., first:last, :]]
    else:
        made = _centred(scheme, parts, first, last).astype(np.float32)
    return _by_group(np.multiply, scheme, parts, made, _scales(scheme, parts, first, last))


def grid(scheme: Scheme, parts: Parts, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Rows start to stop without rounding, as integers on the grid of their scales: code - zero as int8
    [stop - start, ..., columns], scales float32 [stop - start, ..., G] and how many columns share one. None where a row
    is no such grid: floats, columns out of sequence or not filling the last group, differences beyond int8.
    """
    columns = min(scheme.block[1], scheme.shape[-1])
    if scheme.packing == "float8" or parts.order is not None or scheme.shape[-1] % columns:
        return None
    parts, first, last = _cut(scheme, parts, start, stop)
    centred = _centred(scheme, parts, first, last)
    if centred.size and not -128 <= centred.min() <= centred.max() <= 127:
        return None
    return centred.astype(np.int8), _scales(scheme, parts, first, last), columns


def _cut(scheme: Scheme, parts: Parts, start: int, stop: int) -> tuple[Parts, int, int]:
    """What has to be read: of a stack, these matrices with all their rows; of a matrix, these rows."""
    if len(scheme.shape) == 2:
        return parts, start, stop
    zeros = None if parts.zeros is None else parts.zeros[start:stop]
    return Parts(parts.codes[start:stop], parts.scales[start:stop], zeros, parts.order), 0, scheme.shape[-2]


def _centred(scheme: Scheme, parts: Parts, first: int, last: int) -> np.ndarray:
    """code - zero of these rows, int16 [..., rows, columns]."""
    codes = _codes(scheme, parts.codes, first, last).astype(np.int16, order="C")
    if scheme.packing == "packed" and parts.zeros is None:
        codes -= 1 << (scheme.bits - 1)
    if parts.zeros is not None:
        _by_group(np.subtract, scheme, parts, codes, _zeros(scheme, parts.zeros, first, last).astype(np.int16))
    return codes


def _codes(scheme: Scheme, codes: np.ndarray, first: int, last: int) -> np.ndarray:
    match scheme.packing:
        case "gptq" | "gptq_v2":
            return _unpacked(codes[:, first:last].T, scheme.bits)
        case "awq":
            return _awq(codes, first, last)
        case "packed":
            return _unpacked(codes[..., first:last, :], scheme.bits)[..., : scheme.shape[-1]]
    return codes[..., first:last, :]


def _zeros(scheme: Scheme, zeros: np.ndarray, first: int, last: int) -> np.ndarray:
    """[..., rows, G], with the offset of the codes if these have one."""
    per = 32 // scheme.bits
    match scheme.packing:
        case "gptq" | "gptq_v2":
            words = zeros[:, first // per : -(-last // per)]
            if scheme.packing == "gptq":
                # Whole words, as they were written: a zero of 0 has borrowed from its neighbour.
                words = words.view(np.uint32) + np.uint32(sum(1 << shift for shift in range(0, 32, scheme.bits)))
            return _unpacked(words, scheme.bits)[:, first % per :][:, : last - first].T
        case "awq":
            return _awq(zeros, first, last)
        case "packed":
            words = zeros[..., first // per : -(-last // per), :].swapaxes(-1, -2)
            return _unpacked(words, scheme.bits)[..., first % per :][..., : last - first].swapaxes(-1, -2)
    return zeros[..., _blocks(scheme, first, last), :]


def _scales(scheme: Scheme, parts: Parts, first: int, last: int) -> np.ndarray:
    """float32 [..., rows, G]."""
    if scheme.packing in TRANSPOSED:
        scales = parts.scales[:, first:last].T
    else:
        scales = parts.scales[..., _blocks(scheme, first, last), :]
    if scales.dtype == np.uint8:
        return E8M0[scales]
    return widen(np.ascontiguousarray(scales))


def _blocks(scheme: Scheme, first: int, last: int) -> np.ndarray:
    return np.arange(first, last) // scheme.block[0]


def _by_group(operation: np.ufunc, scheme: Scheme, parts: Parts, array: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`array` [..., rows, columns], changed in place: every column with what its group has, of [..., rows, G]."""
    columns = scheme.block[1]
    if parts.order is not None:
        return operation(array, held[..., parts.order], out=array)
    if array.shape[-1] % columns:
        return operation(array, np.repeat(held, columns, axis=-1)[..., : array.shape[-1]], out=array)
    grouped = array.reshape(*held.shape, -1)  # a view: numpy repeats along the new axis without an array of it
    operation(grouped, held[..., None], out=grouped)
    return array


def _unpacked(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Words along the last axis as uint8 codes; one of 2, 4 or 8 bits never leaves its byte. order: the place of each
    field among those of its word.
    """
    count, per = 32 // bits, 8 // bits
    held = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((*words.shape, count), np.uint8)
    for field in range(count):
        np.right_shift(held[..., field // per], field % per * bits, out=codes[..., order[field] if order else field])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], -1)


def _awq(words: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows of a matrix whose rows lie along the second axis, eight in a word."""
    codes = _unpacked(words[:, first // 8 : -(-last // 8)], 4, _AWQ_ORDER)
    return codes[:, first % 8 :][:, : last - first].T


def widen(array: np.ndarray) -> np.ndarray:
    """float32 of a float32, float16 or bfloat16 (held as uint16) array; exact in every case."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _e4m3() -> np.ndarray:
    """What each of 256 codes is: sign, four bits of exponent, three of mantissa; no infinities, two that are NaN."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    positive = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


def _e8m0() -> np.ndarray:
    """Powers of two from 2^-127, and NaN."""
    return np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan).astype(np.float32)


E4M3, E8M0 = _e4m3(), _e8m0()
