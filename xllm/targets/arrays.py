"""Numpy arrays over the arena and of a step, for kernels that are not native."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

KINDS = {"float32": np.float32, "int32": np.int32, "int64": np.int64, "bool": np.bool_}


class StepArrays(Protocol):
    """What a call needs of a step: ids [T], positions [T], last [S]."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def last(self) -> np.ndarray: ...


def array_at(arena: np.ndarray, offset: int, shape: Sequence[int], dtype: str) -> np.ndarray:
    """The buffer at `offset` bytes of the arena (uint8), as a view that writes through."""
    kind = np.dtype(KINDS[dtype])
    return arena[offset : offset + int(np.prod(shape)) * kind.itemsize].view(kind).reshape(shape)
