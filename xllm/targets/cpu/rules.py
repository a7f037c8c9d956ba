"""What the rules of the CPU target share: how a kernel is chosen for an operation, and what it then touches.

A family of kernels is one file with two tables: RULES, operator to rule, and REACH, kernel to what it reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from xllm.kernels.cpu import packed_bytes, quantised, rows_bytes
from xllm.targets.base import TOKENS, Extent, KVLayout, Layout, Lowering, Operation, Refusal, Tensor

GROUP_TOKENS = 16
PANEL_ROWS = 16
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0}  # whole ones: of int4 two share a byte
SUFFIX = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "int4": "i4"}
KV_SCALES_BYTES = 2 * GROUP_TOKENS * 4  # of int8 keys and values, float32: two for each token and KV head
PANELS = "panels16"
PLAIN = Layout("plain", "float32")
GATES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # activations of gates, as kernels number them

# The kernel for an operation, under a layout of the state and a storage of product weights, or why there is none. A
# storage is one word: float32, bfloat16, or int8 and int4 with the inputs that share a scale, as int8.32 or int4.row.
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


def kv_bytes(heads: int, width: int, element: int) -> int:
    """Bytes that a layer keeps of a group of tokens: per KV head `width` elements of each, and the scales of int8."""
    return heads * (width * GROUP_TOKENS * element + (KV_SCALES_BYTES if element == ELEMENT_BYTES["int8"] else 0))


def fixed_place(op: Operation, kv: KVLayout) -> dict[str, int]:
    """Where a recurrent layer keeps what does not grow: `back` bytes before the first group, where spans are based."""
    return {"back": kv.fixed_bytes - kv.fixed_offsets[op.args["layer"]]}


def every_token(x: Tensor) -> bool:
    """Whether a value has one row for each token of the step."""
    return x.rows == TOKENS


def kernel_of(name: str, storage: str) -> str:
    """The kernel of an operation for weights of this storage: linear.i8."""
    return f"{name}.{SUFFIX[storage.partition('.')[0]]}"


def group_of(storage: str) -> dict[str, int]:
    """The int that kernels for quantised weights take beside those of the others."""
    kind = quantised(storage)
    return {"group": kind.group} if kind else {}


def floating(storage: str) -> str:
    """The storage of weights whose kernels know no steps, where others have this one."""
    return "bfloat16" if quantised(storage) else storage


def panel_bytes(n: int, k: int, element: int, sizes: Mapping[str, int]) -> int:
    """Bytes of an [n, k] weight in panels, from the ints of a kernel and the bytes of its element type."""
    return packed_bytes(n, k, _storage(element, sizes))


def _storage(element: int, sizes: Mapping[str, int]) -> str:
    dtype = next(name for name, size in ELEMENT_BYTES.items() if size == element)
    return f"{dtype}.{sizes['group'] or 'row'}" if element < 2 else dtype


def stored_bytes(shape: tuple[int, ...], layout: Layout) -> int:
    """Bytes of a weight in its layout; panels pad the rows of each matrix."""
    if layout.form == "plain":
        return math.prod(shape) * ELEMENT_BYTES[layout.dtype]
    return math.prod(shape[:-2]) * packed_bytes(shape[-2], shape[-1], layout.dtype)


def rows_scratch(
    op: Operation, name: str, rows: Extent, k: int, storage: str, rounded: bool = False
) -> dict[str, Tensor]:
    """Where a kernel keeps the rows it multiplies as the weights need them (`rows_bytes`); by argument."""
    size = rows_bytes(k, storage, rounded)
    return {f"scratch_{name}": Tensor(f"{op.node}.{name}", "value", (rows, size // 4), "int32")} if size else {}


def scratch_reach(name: str, k: int, element: int, sizes: Mapping[str, int], rounded: bool = False) -> dict[str, int]:
    """Bytes of a row in that scratch, from the same."""
    return {f"scratch_{name}": rows_bytes(k, _storage(element, sizes), rounded)}
