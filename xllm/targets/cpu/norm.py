"""Normalisation of rows."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import Cost, Extent, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import PLAIN, Reach, Rule, last_dim, step_rows


def _rms_norm(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight = op.args["x"], op.args["weight"]
    rows = _normed_rows(op, x, weight)
    if isinstance(rows, Refusal):
        return rows
    width = last_dim(x)
    return Lowering(
        "rms_norm.f32",
        {"x": x, "weight": weight, "out": op.results[0]},
        {"width": width},
        {"eps": op.args["eps"]},
        rows,
        {weight.name: PLAIN},
        Cost(rows.times(4 * width), rows.times(8 * width)),
    )


def _add_rms_norm(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, weight = op.args["x"], op.args["weight"]
    rows = _normed_rows(op, x, weight)
    if isinstance(rows, Refusal):
        return rows
    (normed, total), width = op.results, last_dim(x)
    return Lowering(
        "add_rms_norm.f32",
        {"x": x, "residual": op.args["residual"], "weight": weight, "out": normed, "sum": total},
        {"width": width},
        {"eps": op.args["eps"]},
        rows,
        {weight.name: PLAIN},
        Cost(rows.times(5 * width), rows.times(16 * width)),
    )


def _layer_norm(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    """A weight per channel, or per head and channel."""
    x, weight, bias = op.args["x"], op.args["weight"], op.args["bias"]
    if (rows := step_rows(op, x)) is None:
        return Refusal("it does not normalise rows of float32")
    scales = [scale for scale in (weight, bias) if scale is not None]
    shape = scales[0].shape if scales else x.shape[-1:]
    heads = shape[0] if len(shape) > 1 else 1
    if any(scale.kind != "weight" or scale.shape != shape for scale in scales) or not isinstance(heads, int):
        return Refusal("its weight and bias are not numbers for each of a row's")
    width = last_dim(x)
    return Lowering(
        "layer_norm.f32",
        {"x": x, "weight": weight, "bias": bias, "out": op.results[0]},
        {"width": width, "heads": heads},
        {"eps": op.args["eps"]},
        rows,
        {scale.name: PLAIN for scale in scales},
        Cost(rows.times(7 * width), rows.times(8 * width)),
    )


def _mean(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, out = op.args["self"], op.results[0]
    dims = [dim % len(x.shape) for dim in op.args["dim"] or ()]
    if x.kind == "weight" or x.dtype != "float32" or dims != [len(x.shape) - 1] or not isinstance(x.shape[-1], int):
        return Refusal("it is not the mean of each row of float32")
    width, rows = last_dim(x), x.rows_of(-1)
    cost = Cost(rows.times(width), rows.times(4 * width))
    return Lowering("mean.f32", {"x": x, "out": out}, {"width": width}, rows=rows, cost=cost)


def _normed_rows(op: Operation, x: Tensor, weight: Tensor) -> Extent | Refusal:
    """The rows of a norm, if one weight scales each number of a row."""
    if (rows := step_rows(op, x)) is None:
        return Refusal("it does not normalise rows of float32")
    if weight.kind != "weight" or weight.shape != (last_dim(x),):
        return Refusal("its weight is not one number for each of a row's")
    return rows


def _norm_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    row = 4 * sizes["width"]
    return dict.fromkeys(("x", "residual", "out", "sum"), row), {"weight": row}


def _layer_norm_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    row = 4 * sizes["width"]
    return {"x": row, "out": row}, dict.fromkeys(("weight", "bias"), row * sizes["heads"])


def _mean_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"x": 4 * sizes["width"], "out": 4}, {}


RULES: Mapping[str, Rule] = {
    "xllm.rms_norm": _rms_norm,
    "xllm.add_rms_norm": _add_rms_norm,
    "xllm.layer_norm": _layer_norm,
    "aten.mean.dim": _mean,
}
REACH: Mapping[str, Reach] = {
    "rms_norm": _norm_reach,
    "add_rms_norm": _norm_reach,
    "layer_norm": _layer_norm_reach,
    "mean": _mean_reach,
}
