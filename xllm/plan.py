"""The plan: what the runtime executes, as plain data. Written by the compiler, read without torch.

Calls are the same for every bucket; a bucket adds sizes and offsets into the one arena all buckets share. References are
short strings: "%value" (arena), "@weight", "$input" (ids, positions, last), "" (absent).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from xllm.targets.base import Cost, Extent, KVSpec, Layout

SCHEMA = 1


@dataclass(frozen=True)
class Call:
    """One kernel call: named arguments as references, attributes, the dimension its rows run over, its stream.

    kernel "torch" marks an operator without a native kernel: `op` is run by the fallback provider on `operands` (JSON
    encoding of its arguments) and its results are copied to `results`.
    """

    node: str
    op: str
    kernel: str
    args: Mapping[str, str] = field(default_factory=dict)
    ints: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, float] = field(default_factory=dict)
    rows: str = "T"
    stream: str = ""
    after: tuple[int, ...] = ()
    operands: tuple[Any, ...] = ()
    results: tuple[str, ...] = ()
    cost: Cost = Cost()


@dataclass(frozen=True)
class Buffer:
    """A value in the arena: bytes linear in T and S, dtype and shape for providers that need them."""

    bytes: Extent
    dtype: str
    shape: tuple[int | Extent, ...]


@dataclass(frozen=True)
class Bucket:
    """Sizes a step may have (tokens <= T, logit rows <= S) and where each buffer then lies."""

    T: int
    S: int
    arena_bytes: int
    offsets: Mapping[str, int]


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it lies in the artifact: the program's name and shape, storage layout, file, byte range, digest."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    file: str = ""
    offset: int = 0
    bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class Plan:
    """One compiled step. `logits` names the buffer that holds [S, vocab] float32 after a run."""

    calls: tuple[Call, ...]
    buffers: Mapping[str, Buffer]
    buckets: tuple[Bucket, ...]
    weights: Mapping[str, StoredWeight]
    kv: KVSpec
    logits: str
    streams: tuple[str, ...] = ("compute",)

    @property
    def arena_bytes(self) -> int:
        """The one arena all buckets fit in: max over shapes, not the sum."""
        return max(bucket.arena_bytes for bucket in self.buckets)

    def bucket_for(self, tokens: int, rows: int) -> Bucket:
        """The smallest bucket a step of this size fits in. Raises ValueError with both sizes when none does."""
        for bucket in self.buckets:
            if tokens <= bucket.T and rows <= bucket.S:
                return bucket
        raise ValueError(f"a step of {tokens} tokens and {rows} logit rows fits no bucket; the largest is {self.buckets[-1].T}")

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **_encoded(asdict(self))}, indent=None, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises ValueError naming the field that is missing or wrong."""
        raw = json.loads(text)
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"plan schema {raw.get('schema')!r} is not {SCHEMA}")
        try:
            return Plan(
                calls=tuple(_call(item) for item in raw["calls"]),
                buffers={
                    name: Buffer(Extent(**item["bytes"]), item["dtype"], _shape(item["shape"]))
                    for name, item in raw["buffers"].items()
                },
                buckets=tuple(Bucket(**item) for item in raw["buckets"]),
                weights={
                    name: StoredWeight(**{**item, "shape": tuple(item["shape"]), "layout": Layout(**item["layout"])})
                    for name, item in raw["weights"].items()
                },
                kv=KVSpec(**{**raw["kv"], "layer_offsets": tuple(raw["kv"]["layer_offsets"])}),
                logits=raw["logits"],
                streams=tuple(raw["streams"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"plan is malformed: {error}") from error


def _call(item: dict[str, Any]) -> Call:
    cost = Cost(Extent(**item["cost"]["flops"]), Extent(**item["cost"]["bytes"]))
    tuples = {key: tuple(item[key]) for key in ("after", "operands", "results")}
    return Call(**{**item, **tuples, "cost": cost})


def _shape(items: list[Any]) -> tuple[int | Extent, ...]:
    return tuple(Extent(**item) if isinstance(item, dict) else item for item in items)


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value
