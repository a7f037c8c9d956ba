"""What a target is to the compiler: capabilities, a choice of kernel for every operation, layouts for weights and
state.

No torch here: operations reach a target as plain data, so that the same file serves the compiler and the light runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Extent:
    """A size linear in the step's dimensions: t * T + s * S + const."""

    t: int = 0
    s: int = 0
    const: int = 0

    def at(self, T: int, S: int) -> int:
        return self.t * T + self.s * S + self.const

    def times(self, factor: int) -> Extent:
        return Extent(self.t * factor, self.s * factor, self.const * factor)


@dataclass(frozen=True)
class Tensor:
    """A value of the program: kind "value", "weight", "input" or "state"; `shape` holds ints or Extents."""

    name: str
    kind: str
    shape: tuple[int | Extent, ...]
    dtype: str

    @property
    def width(self) -> int:
        """Elements per row: the product of all dimensions but the first."""
        width = 1
        for size in self.shape[1:]:
            width *= size if isinstance(size, int) else size.const
        return width

    @property
    def rows(self) -> str | None:
        """The dimension the first axis runs over: "T", "S", or None when it is neither."""
        first = self.shape[0] if self.shape else 1
        if isinstance(first, Extent):
            return {(1, 0, 0): "T", (0, 1, 0): "S"}.get((first.t, first.s, first.const))
        return None


@dataclass(frozen=True)
class Operation:
    """One call of the program: `op` is "xllm.linear" or "aten.add.Tensor"; `args` by schema name."""

    node: str
    op: str
    args: Mapping[str, Any]
    results: tuple[Tensor, ...]
    path: str = ""


@dataclass(frozen=True)
class Cost:
    """Work of one call, linear in T and S: multiply-adds counted twice, and bytes that must move."""

    flops: Extent = Extent()
    bytes: Extent = Extent()


@dataclass(frozen=True)
class Lowering:
    """A kernel bound to an operation. `layouts` says how the kernel wants each weight stored."""

    kernel: str
    args: Mapping[str, Tensor | None]
    ints: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, float] = field(default_factory=dict)
    rows: str = "T"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    cost: Cost = Cost()


@dataclass(frozen=True)
class Layout:
    """Storage of a weight: `form` is "plain" (row-major) or a packed form of the target; dtype of its elements."""

    form: str
    dtype: str


@dataclass(frozen=True)
class Refusal:
    """Why a target has no kernel for an operation."""

    why: str


@dataclass(frozen=True)
class KVLayout:
    """Where a sequence's keys and values lie in its contiguous span: groups of tokens, layers inside a group.

    Group g of `group_tokens` tokens starts at g * group_bytes; layer l inside it at layer_offsets[l].
    """

    dtype: str
    group_tokens: int
    group_bytes: int
    layer_offsets: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        return self.group_bytes // self.group_tokens


class Target(Protocol):
    """Capabilities and choices. `fuses` names the optional fusions whose kernels exist, `streams` the queues of work;
    `pads` says whether a bucket is a fixed shape (captured graphs) or only a size (kernels that take sizes)."""

    @property
    def name(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def streams(self) -> tuple[str, ...]: ...
    @property
    def fuses(self) -> frozenset[str]: ...
    @property
    def pads(self) -> bool: ...

    def lower(self, operation: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal: ...

    def stream_of(self, operation: Operation) -> str: ...

    def kv_layout(self, layers: tuple[tuple[int, int, int], ...], dtype: str) -> KVLayout:
        """Layout of the state for layers of (kv_heads, key_dim, value_dim)."""
        ...

    def seconds(self, cost: Cost, T: int, S: int) -> float:
        """Predicted time of a call on this kind of machine."""
        ...
