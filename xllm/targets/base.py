"""What a target is to the compiler: capabilities, a choice of kernel for every operation, layouts for weights and
state.

No torch here: operations reach a target as plain data, so that the same file serves the compiler and the light runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Extent:
    """A size as a polynomial of the program's dims: {"T": 4, "": 64} is 4 T + 64, a product is spelled "batch*length".

    No term is zero, so that equal sizes are equal values.
    """

    terms: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(const: int = 0, **dims: int) -> Extent:
        """`Extent.of(64, T=4)` is 4 T + 64."""
        return Extent({name: factor for name, factor in {**dims, "": const}.items() if factor})

    def at(self, sizes: Mapping[str, int]) -> int:
        """The size when every dim has its size. Raises KeyError for a dim that has none."""
        total = 0
        for name, factor in self.terms.items():
            if name in sizes:  # most terms are of one dim or none, and a start asks thousands of times
                total += factor * sizes[name]
                continue
            for dim in filter(None, name.split("*")):
                factor *= sizes[dim]
            total += factor
        return total

    def times(self, factor: int | Extent) -> Extent:
        product: dict[str, int] = {}
        for name, one in self.terms.items():
            for other, two in (factor.terms if isinstance(factor, Extent) else {"": factor}).items():
                joined = "*".join(sorted(filter(None, (*name.split("*"), *other.split("*")))))
                product[joined] = product.get(joined, 0) + one * two
        return Extent({name: value for name, value in product.items() if value})

    def plus(self, other: int | Extent) -> Extent:
        total = dict(self.terms)
        for name, value in (other.terms if isinstance(other, Extent) else {"": other}).items():
            total[name] = total.get(name, 0) + value
        return Extent({name: value for name, value in total.items() if value})

    @property
    def const(self) -> int:
        """The part that depends on no dim."""
        return self.terms.get("", 0)


TOKENS, LOGIT_ROWS = Extent({"T": 1}), Extent({"S": 1})


class StepSizes(dict[str, int]):
    """The dims of one step as costs know them: "T" tokens, "S" rows that are wanted, and what attention meets.

    "K": tokens whose keys and values are read, those of each sequence once. "P": pairs of a token and one it sees,
    itself and those before it. "A": pairs within sequences, whichever comes first. With a number behind it, as "P512",
    within a window of so many tokens.
    """

    def __init__(self, sequences: Iterable[tuple[int, int]], wanted: int | None = None) -> None:
        """sequences: tokens of the step and tokens before them, of each. wanted: rows, by default one of each."""
        self._sequences = tuple(sequences)
        rows = len(self._sequences) if wanted is None else wanted
        super().__init__(T=sum(tokens for tokens, _ in self._sequences), S=rows)

    @staticmethod
    def usual(tokens: int, wanted: int) -> StepSizes:
        """A step of which no more is known: `wanted` sequences share its tokens, with USUAL_CONTEXT tokens in all."""
        count = max(1, min(wanted, tokens))
        shares = [tokens * (i + 1) // count - tokens * i // count for i in range(count)]
        return StepSizes([(share, max(0, USUAL_CONTEXT - share)) for share in shares], wanted)

    def __missing__(self, name: str) -> int:
        if not is_meeting(name):
            raise KeyError(name)
        meeting = {"K": keys_read, "P": pairs_seen, "A": _both_ways}[name[0]]
        window = int(name[1:] or 0) or 1 << 62
        self[name] = sum(meeting(tokens, past, window) for tokens, past in self._sequences)
        return self[name]


USUAL_CONTEXT = 256


def is_meeting(name: str) -> bool:
    """Whether a dim is one that StepSizes works out."""
    window = name[1:]
    return name[:1] in ("K", "P", "A") and (not window or (len(window) < 12 and window.isascii() and window.isdigit()))


def within(name: str, window: int) -> Extent:
    """A dim of StepSizes, "K", "P" or "A", within a window where there is one."""
    return Extent({f"{name}{window or ''}": 1})


def keys_read(tokens: int, past: int, window: int) -> int:
    """Tokens whose keys and values one sequence's step reads, each once."""
    return min(past + tokens, window + tokens - 1) if tokens else 0


def pairs_seen(tokens: int, past: int, window: int) -> int:
    """Pairs of a token of one sequence's step and one it sees, itself and those before it."""
    growing = max(0, min(tokens, window - past))  # tokens that the window does not cut
    return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * window


def _both_ways(tokens: int, past: int, window: int) -> int:
    """Of a sequence that lies in the step whole."""
    return 2 * pairs_seen(tokens, 0, window) - tokens


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
    def rows(self) -> Extent:
        """The first dimension; one row for a scalar."""
        return self.rows_of(1)

    def rows_of(self, leading: int) -> Extent:
        """The product of the first `leading` dimensions; negative counts from the back, as in slices."""
        total = Extent({"": 1})
        for size in self.shape[:leading]:
            total = total.times(size)
        return total


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
    """Work of one call: multiply-adds counted twice, and bytes that must move. Polynomials of the program's dims; of a
    step, of what StepSizes knows beside them too."""

    flops: Extent = Extent()
    bytes: Extent = Extent()


@dataclass(frozen=True)
class Lowering:
    """A kernel bound to an operation, run over `rows` rows. `layouts` says how the kernel wants each weight stored.

    scratch: memory of the call alone, planned in the arena like a result; their names are among `args`.
    extents: the ints of the kernel that depend on dims (functions only).
    """

    kernel: str
    args: Mapping[str, Tensor | None]
    ints: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, float] = field(default_factory=dict)
    rows: Extent = TOKENS
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    cost: Cost = Cost()
    scratch: tuple[Tensor, ...] = ()
    extents: Mapping[str, Extent] = field(default_factory=dict)


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
    """Where a sequence's state lies in its contiguous span: what does not grow, then groups of tokens, layers in each.

    The first `fixed_bytes` hold the float32 state of recurrent layers, layer l at fixed_offsets[l]. Group g of
    `group_tokens` tokens starts at fixed_bytes + g * group_bytes; the keys and values of layer l at layer_offsets[l]
    inside it. A layer that keeps nothing of a kind has the offset of the next.
    """

    dtype: str
    group_tokens: int
    group_bytes: int
    layer_offsets: tuple[int, ...]
    fixed_bytes: int = 0
    fixed_offsets: tuple[int, ...] = ()

    @property
    def token_bytes(self) -> int:
        return self.group_bytes // self.group_tokens


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps: per token `kv_heads` keys of `key_dim` and values of `value_dim`, and per sequence
    `fixed_floats` float32 that do not grow. latent: the values are the first `value_dim` numbers of the keys."""

    kv_heads: int
    key_dim: int
    value_dim: int
    latent: bool = False
    fixed_floats: int = 0


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

    def lower(
        self, operation: Operation, kv: KVLayout, weights_dtype: str, activations: str = ""
    ) -> Lowering | Refusal:
        """The kernel for an operation, or why there is none. activations: the type that rows are rounded to in products
        with weights that it fits; "" keeps them as exact as the weights allow."""
        ...

    def stream_of(self, operation: Operation) -> str: ...

    def kv_layout(self, layers: tuple[LayerState, ...], dtype: str) -> KVLayout: ...

    def seconds(self, cost: Cost, sizes: Mapping[str, int], kernel: str = "") -> float:
        """Predicted time of a call of `kernel` (of any, where none is named) on this kind of machine."""
        ...
