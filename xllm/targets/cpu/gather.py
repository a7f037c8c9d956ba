"""Rows picked out of tables: embeddings, rotary tables, the rows whose logits are wanted."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import LOGIT_ROWS, TOKENS, Cost, KVLayout, Layout, Lowering, Operation, Refusal
from xllm.targets.cpu.rules import PANELS, PLAIN, Reach, Rule, group_of, ints, kernel_of, panel_bytes


def _embedding(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    ids, weight = op.args["ids"], op.args["weight"]
    computed = ids.kind == "value" and ids.dtype == "int64"
    if weight.kind != "weight" or not (computed or (ids.kind == "input" and ids.name == "ids")):
        return Refusal("it gathers by something other than the step's ids, or int64 values")
    vocab, width = ints(weight.shape)
    rows = ids.rows_of(len(ids.shape))
    return Lowering(
        kernel_of("lookup" if computed else "embedding", weights_dtype),
        {"ids": ids, "weight": weight, "out": op.results[0]},
        {"vocab": vocab, "width": width, **group_of(weights_dtype)},
        rows=rows,
        layouts={weight.name: Layout(PANELS, weights_dtype)},
        cost=Cost(bytes=rows.times(width * (4 + 64))),
    )


def _rows(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    table, index = op.args["table"], op.args["index"]
    if (
        index.kind != "input"
        or index.name not in ("last", "positions")
        or len(table.shape) != 2
        or table.dtype != "float32"
    ):
        return Refusal("it is not a gather of rows of [R, W] by positions or last")
    rows = LOGIT_ROWS if index.name == "last" else TOKENS
    return Lowering(
        "rows.f32",
        {"index": index, "table": table, "out": op.results[0]},
        {"width": table.width},
        rows=rows,
        layouts={table.name: PLAIN} if table.kind == "weight" else {},
        cost=Cost(bytes=rows.times(8 * table.width)),
    )


def _embedding_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"out": 4 * sizes["width"]}, {"weight": panel_bytes(sizes["vocab"], sizes["width"], element, sizes)}


def _lookup_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    rows, once = _embedding_reach(sizes, element)
    return {**rows, "ids": 8}, once


def _rows_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"out": 4 * sizes["width"]}, {}


RULES: Mapping[str, Rule] = {"xllm.embedding": _embedding, "xllm.rows": _rows}
REACH: Mapping[str, Reach] = {"embedding": _embedding_reach, "lookup": _lookup_reach, "rows": _rows_reach}
