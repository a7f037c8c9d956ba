"""The memory that the values of a step lie in: had from the system, and given back while nothing runs."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from xllm.artifact import ArtifactError

HUGE_PAGE_BYTES = 2 << 20


def allocate(size: int) -> tuple[np.ndarray, int]:
    """Anonymous memory of at least `size` bytes at a page border, huge pages where the system grants them. Raises
    ArtifactError when there is no such memory."""
    length = max(-(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    try:
        block = mmap.mmap(-1, length)
    except (OverflowError, OSError) as error:
        raise ArtifactError("memory-too-small", f"an arena of {size} bytes cannot be had: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice only
            block.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(block, np.uint8)
    return array, array.ctypes.data


def give_back(block: np.ndarray) -> None:
    """Returns the memory of what `allocate` gave to the system; it reads as zeros then, and may be written again."""
    view = block.base
    if isinstance(view, memoryview) and isinstance(view.obj, mmap.mmap) and hasattr(mmap, "MADV_REMOVE"):
        view.obj.madvise(mmap.MADV_REMOVE)
