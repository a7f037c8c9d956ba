"""Encoders: attention within the sequences of a step, and the row that stands for a sequence."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import LOGIT_ROWS, TOKENS, Cost, KVLayout, Lowering, Operation, Refusal, Tensor, within
from xllm.targets.cpu.rules import Reach, Rule, every_token, ints, last_dim, step_rows


def _attention(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    q, k, v = (op.args[name] for name in ("q", "k", "v"))
    if not all(every_token(x) and x.kind == "value" for x in (q, k, v)):
        return Refusal("query, key and value are not computed for every token of the step")
    (q_heads, head_dim), (kv_heads, value_dim) = ints(q.shape[1:]), ints(v.shape[1:])
    state = Tensor(f"{op.node}.state", "value", (TOKENS, q_heads, 2), "float32")
    return Lowering(
        "encode_attention.f32",
        {"q": q, "k": k, "v": v, "out": op.results[0], "scratch_state": state},
        {
            "q_heads": q_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "window": op.args["window"],
        },
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        cost=Cost(
            within("A", op.args["window"]).times(2 * q_heads * (head_dim + value_dim)),
            TOKENS.times(4 * (q.width + k.width + v.width)),
        ),
        scratch=(state,),
    )


def _sequence_row(kernel: str) -> Rule:
    def rule(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
        table, index = op.args["x"], op.args["last"]
        if index.name != "last" or index.kind != "input" or not every_token(table) or table.dtype != "float32":
            return Refusal("it does not take one row of [T, W] for each of last")
        return Lowering(
            kernel,
            {"index": index, "table": table, "out": op.results[0]},
            {"width": table.width},
            rows=LOGIT_ROWS,
            cost=Cost(TOKENS.times(table.width), TOKENS.times(4 * table.width)),
        )

    return rule


def _l2_normalize(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["x"]
    rows = step_rows(op, x)
    if rows is None:
        return Refusal("it does not normalise rows of float32 values of the step")
    width = last_dim(x)
    return Lowering(
        "l2_normalize.f32",
        {"x": x, "out": op.results[0]},
        {"width": width},
        {"eps": op.args["eps"]},
        rows=rows,
        cost=Cost(rows.times(3 * width), rows.times(8 * width)),
    )


def _attention_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, held = 4 * sizes["q_heads"], 4 * sizes["kv_heads"]
    rows = {"q": heads * sizes["head_dim"], "k": held * sizes["head_dim"], "v": held * sizes["value_dim"]}
    return {**rows, "out": heads * sizes["value_dim"], "scratch_state": 2 * heads}, {}


def _sequence_row_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"out": 4 * sizes["width"]}, {}


def _normalize_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return dict.fromkeys(("x", "out"), 4 * sizes["width"]), {}


RULES: Mapping[str, Rule] = {
    "xllm.encode_attention": _attention,
    "xllm.first_rows": _sequence_row("first_rows.f32"),
    "xllm.mean_rows": _sequence_row("mean_rows.f32"),
    "xllm.l2_normalize": _l2_normalize,
}
REACH: Mapping[str, Reach] = {
    "encode_attention": _attention_reach,
    "first_rows": _sequence_row_reach,
    "mean_rows": _sequence_row_reach,
    "l2_normalize": _normalize_reach,
}
