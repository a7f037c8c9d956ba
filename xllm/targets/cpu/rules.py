"""What the rules of the CPU target share: how a kernel is chosen for an operation, and what it then touches.

A family of kernels is one file with two tables: RULES, operator to rule, and REACH, kernel to what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xllm.targets.base import TOKENS, Extent, KVLayout, Layout, Lowering, Operation, Refusal, Tensor

GROUP_TOKENS = 16
PANEL_ROWS = 16
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
SUFFIX = {"float32": "f32", "bfloat16": "bf16"}
PANELS = "panels16"
PLAIN = Layout("plain", "float32")

# The kernel for an operation, under a layout of the state and a dtype for product weights, or why there is none.
Rule = Callable[[Operation, KVLayout, str], Lowering | Refusal]
# Bytes a kernel touches of each argument, from its ints and the bytes of its element type: per row, and once. Indices,
# and tables they index, are not among them.
Reach = Callable[[Mapping[str, int], int], tuple[dict[str, int], dict[str, int]]]


def step_rows(op: Operation, x: Any) -> Extent | None:
    """How many rows of its last dimension `x` has, if the first result has as many."""
    if not isinstance(x, Tensor) or x.kind not in ("value", "input") or x.dtype != "float32" or not x.shape:
        return None
    rows = x.rows_of(-1)
    return rows if op.results[0].rows_of(-1) == rows and isinstance(x.shape[-1], int) else None


def last_dim(x: Tensor) -> int:
    """Size of the last dimension, which rules take to be a number."""
    return ints(x.shape[-1:])[0]


def ints(shape: tuple[int | Extent, ...]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else size.const for size in shape)


def kv_place(op: Operation, kv: KVLayout) -> dict[str, int]:
    """Where the layer of an operation keeps its keys and values: the ints every kernel on them takes."""
    return {"layer_offset": kv.layer_offsets[op.args["layer"]], "group_bytes": kv.group_bytes}


def fixed_place(op: Operation, kv: KVLayout) -> dict[str, int]:
    """Where a recurrent layer keeps what does not grow: `back` bytes before the first group, where spans are based."""
    return {"back": kv.fixed_bytes - kv.fixed_offsets[op.args["layer"]]}


def every_token(x: Tensor) -> bool:
    """Whether a value has one row for each token of the step."""
    return x.rows == TOKENS


def panel_bytes(n: int, k: int, element: int) -> int:
    """Bytes of an [n, k] weight in panels."""
    return -(-n // PANEL_ROWS) * PANEL_ROWS * k * element
