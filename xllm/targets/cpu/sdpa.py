"""Attention of functions: values side by side in memory, whose batch and lengths may all be dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm.targets.base import Cost, Extent, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import Reach, Rule

_STRIDES = ("mask_batch", "mask_head", "mask_query", "mask_key")


def _sdpa(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    q, k, v, mask = (op.args[name] for name in ("q", "k", "v", "mask"))
    if not all(x.kind == "value" and x.dtype == "float32" for x in (q, k, v)):
        return Refusal("query, key and value are not computed in float32")
    if mask is not None and (mask.kind != "value" or mask.dtype not in ("float32", "bool")):
        return Refusal("its mask is no value of float32 or booleans")
    tokens_first = op.args["tokens_first"]
    heads, tokens = (2, 1) if tokens_first else (1, 2)
    whole = (q.shape[0], q.shape[heads], q.shape[tokens], k.shape[tokens])
    sizes = {
        "q_heads": whole[1], "kv_heads": k.shape[heads], "head_dim": q.shape[3], "value_dim": v.shape[3],
        "queries": whole[2], "keys": whole[3], "heads_first": int(not tokens_first), "causal": int(op.args["causal"]),
        **_mask_strides(mask, whole),
    }  # fmt: skip
    if not all(isinstance(sizes[name], int) for name in ("q_heads", "kv_heads", "head_dim", "value_dim", "mask_key")):
        return Refusal("its heads or their width depend on a dim")
    rows = q.rows
    scores = q.rows_of(3).times(k.shape[tokens])
    return Lowering(
        "sdpa_seen.f32" if mask is not None and mask.dtype == "bool" else "sdpa.f32",
        {"q": q, "k": k, "v": v, "mask": mask, "out": op.results[0]},
        {name: size for name, size in sizes.items() if isinstance(size, int)},
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        rows=rows,
        extents={name: size for name, size in sizes.items() if isinstance(size, Extent)},
        cost=Cost(
            scores.times(2).times(q.shape[3]).plus(scores.times(2).times(v.shape[3])),
            q.rows_of(4).plus(k.rows_of(4)).plus(v.rows_of(4)).plus(op.results[0].rows_of(4)).times(4),
        ),
    )


def _mask_strides(mask: Tensor | None, whole: Sequence[int | Extent]) -> dict[str, int | Extent]:
    """Elements from one batch, head, query and key to the next; 0 where one is for all of them."""
    if mask is None:
        return dict.fromkeys(_STRIDES, 0)
    shape = (*[1] * (4 - len(mask.shape)), *mask.shape)
    strides: dict[str, int | Extent] = {}
    step = Extent.of(1)
    for name, size, wanted in reversed(list(zip(_STRIDES, shape, whole, strict=True))):
        strides[name] = 0 if size == 1 and wanted != 1 else (step.const if step == Extent.of(step.const) else step)
        step = step.times(size)
    return strides


def _reach(mask_bytes: int) -> Reach:
    def touched(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
        queries, keys = 4 * sizes["q_heads"] * sizes["queries"], 4 * sizes["kv_heads"] * sizes["keys"]
        rows = {
            "q": queries * sizes["head_dim"], "k": keys * sizes["head_dim"], "v": keys * sizes["value_dim"],
            "out": queries * sizes["value_dim"],
        }  # fmt: skip
        counts = {"mask_head": "q_heads", "mask_query": "queries", "mask_key": "keys"}
        span = 1 + sum(sizes[stride] * max(sizes[count] - 1, 0) for stride, count in counts.items())
        step = sizes["mask_batch"]
        if step == 0:
            return rows, {"mask": mask_bytes * span}
        # More than a step only in a hostile plan, and then once per row.
        return {**rows, "mask": mask_bytes * (step + max(0, span - step))}, {}

    return touched


RULES: Mapping[str, Rule] = {"xllm.sdpa": _sdpa}
REACH: Mapping[str, Reach] = {"sdpa": _reach(4), "sdpa_seen": _reach(1)}
