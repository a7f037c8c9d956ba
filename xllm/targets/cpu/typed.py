"""Casts, ranges, constants, picks and running sums of functions, on any type of number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xllm.targets.base import Extent, KVLayout, Lowering, Operation, Refusal, Tensor
from xllm.targets.cpu.rules import Reach, Rule
from xllm.targets.cpu.strided import elements_of, lowered, plain
from xllm.targets.cpu.views import ELEMENT, ELEMENT_SIZE, Walk, extent, product


def _cast(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, out = op.args["self"], op.results[0]
    if not plain(x) or out.dtype == x.dtype:
        return Refusal("it does not cast values in order")
    return _in_order(f"cast_{ELEMENT[out.dtype]}.{ELEMENT[x.dtype]}", x, out)


def _not(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["self"]
    return _in_order("not.u8", x, op.results[0]) if x.dtype == "bool" else Refusal("it does not negate truths")


def _in_order(kernel: str, x: Tensor, out: Tensor) -> Lowering:
    return lowered(Walk(elements_of(out), {"width": 1}), kernel, {"x": x, "out": out}, 8)


def _range(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    out = op.results[0]
    if out.dtype not in ("int64", "int32") or op.args.get("step", 1) != 1:
        return Refusal("it does not count in whole numbers")
    found = Walk(elements_of(out), {}).also("start", extent(op.args.get("start", 0)))
    return lowered(found, f"range.{ELEMENT[out.dtype]}", {"out": out}, 8)


def _full(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    number, out = op.args.get("fill_value", op.args.get("s")), op.results[0]
    found, kernel = Walk(elements_of(out), {}), f"fill.{ELEMENT[out.dtype]}"
    if isinstance(number, Extent) and out.dtype != "float32":
        return lowered(found.also("number", number), kernel, {"out": out}, 8)
    if not isinstance(number, int | float) or not math.isfinite(number):
        return Refusal("it does not fill with a finite number")
    if out.dtype == "float32":
        return lowered(found, kernel, {"out": out}, 8, {"number": float(number)})
    return lowered(found.also("number", Extent.of(int(number))), kernel, {"out": out}, 8)


def _take(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    """Picks along one axis."""
    x, out = op.args["self"], op.results[0]
    axes = [axis for axis, index in enumerate(op.args["indices"]) if index is not None]
    index = op.args["indices"][axes[0]] if len(axes) == 1 else None
    if not plain(x) or not plain(index) or index.dtype != "int64" or index.kind == "weight":
        return Refusal("it does not pick along one axis by int64 values")
    found = _along(x, axes[0]).also("picks", elements_of(index))
    return lowered(found, f"take.{ELEMENT[x.dtype]}", {"x": x, "index": index, "out": out}, 8)


def _cumsum(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x, out = op.args["self"], op.results[0]
    if not plain(x) or x.dtype != out.dtype or x.dtype == "bool":
        return Refusal("it does not sum numbers of one type")
    return lowered(_along(x, op.args["dim"] % len(x.shape)), f"cumsum.{ELEMENT[x.dtype]}", {"x": x, "out": out}, 8)


def _along(x: Tensor, axis: int) -> Walk:
    """An axis: what is in front of it are rows, what is behind it is their width."""
    width = product(x.shape[axis + 1 :])
    return Walk(x.rows_of(axis), {}).also("count", extent(x.shape[axis])).also("width", width)


# --- reach -----------------------------------------------------------------------------------------------------------


def _cast_reach(size: int) -> Reach:
    def touched(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
        return {"x": element * sizes["width"], "out": size * sizes["width"]}, {}

    return touched


def _made_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"out": element}, {}


def _take_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    width = element * sizes["width"]
    return {"x": sizes["count"] * width, "out": sizes["picks"] * width}, {"index": 8 * sizes["picks"]}


def _sum_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return dict.fromkeys(("x", "out"), element * sizes["count"] * sizes["width"]), {}


RULES: Mapping[str, Rule] = {
    "aten.to.dtype": _cast, "aten.logical_not.default": _not, "aten.bitwise_not.default": _not,
    "aten.arange.start": _range, "aten.full.default": _full, "aten.scalar_tensor.default": _full,
    "aten.index.Tensor": _take, "aten.cumsum.default": _cumsum,
}  # fmt: skip
REACH: Mapping[str, Reach] = {
    **{f"cast_{suffix}": _cast_reach(size) for suffix, size in ELEMENT_SIZE.items()},
    "not": _cast_reach(1), "range": _made_reach, "fill": _made_reach, "take": _take_reach, "cumsum": _sum_reach,
}  # fmt: skip
