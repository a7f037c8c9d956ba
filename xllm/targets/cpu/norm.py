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


RULES: Mapping[str, Rule] = {"xllm.rms_norm": _rms_norm, "xllm.add_rms_norm": _add_rms_norm}
REACH: Mapping[str, Reach] = {"rms_norm": _norm_reach, "add_rms_norm": _norm_reach}
