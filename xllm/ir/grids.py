"""Weights that a checkpoint keeps as integers, as these integers: what stores integers again need not round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xllm.ir import quantised
from xllm.ir.weight_rules import Concat, Dequantise, Slice, Stack, WeightRule, stored_parts

Grid = tuple[np.ndarray, np.ndarray, int]  # int8 [..., rows, columns], float32 scales [..., rows, columns / n], n


def grid(rule: WeightRule, read: Mapping[str, np.ndarray], start: int, stop: int) -> Grid | None:
    """`evaluate(rule, …)[start:stop]` of a resolved rule as integers, the scales of each row's groups of columns, and
    the columns of a group; exact. `read` gives what is stored.

    Rows may be joined, stacked or cut out. None where any of them is no grid (`quantised.grid`), and where those that
    are joined have groups of different sizes.
    """
    match rule:
        case Dequantise(scheme=scheme):
            return quantised.grid(scheme, stored_parts(rule, read), start, stop)
        case Stack(parts):
            made = [grid(part, read, 0, (_shape(part) or (0,))[0]) for part in parts[start:stop]]
            return _joined([one and (one[0][None], one[1][None], one[2]) for one in made])
        case Concat(parts, 0):
            found, at = [], 0
            for part in parts:
                size = (_shape(part) or (0,))[0]
                if not size:
                    return None
                if at < stop and start < at + size:
                    found.append(grid(part, read, max(start - at, 0), min(stop - at, size)))
                at += size
            return _joined(found)
        case Slice(of, 0, begin, _, 1):
            shape = _shape(rule)
            return None if shape is None else grid(of, read, begin + start, begin + min(stop, shape[0]))
        case Slice(of, 1, begin, end, 1) if len(_shape(of) or ()) == 3:  # rows of every matrix of a stack
            made = grid(of, read, start, stop)
            return made and (made[0][:, begin:end], made[1][:, begin:end], made[2])
    return None


def _joined(grids: list[Grid | None]) -> Grid | None:
    if any(one is None or one[2] != (grids[0] or one)[2] for one in grids):
        return None
    held = [one for one in grids if one is not None]
    return (np.concatenate([one[0] for one in held]), np.concatenate([one[1] for one in held]), held[0][2])


def _shape(rule: WeightRule) -> tuple[int, ...] | None:
    """The shape of what quantised tensors make; None of all that others have a part in."""
    match rule:
        case Dequantise(scheme=scheme):
            return scheme.shape
        case Stack(parts):
            shape = _shape(parts[0])
            return shape and (len(parts), *shape)
        case Concat(parts, 0):
            shapes = [_shape(part) for part in parts]
            return None if None in shapes else (sum(shape[0] for shape in shapes if shape), *(shapes[0] or ())[1:])
        case Slice(of, axis, begin, end, step) if shape := _shape(of):
            return (*shape[:axis], len(range(shape[axis])[begin:end:step]), *shape[axis + 1 :])
    return None
