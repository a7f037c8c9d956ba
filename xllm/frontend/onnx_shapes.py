"""ONNX operators that move numbers about, and what they do to shapes, which are known while the model is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch

from xllm.frontend.onnx_build import MAX_KNOWN, Builder, Value
from xllm.frontend.onnx_file import refuse
from xllm.ir.program import arguments

aten = torch.ops.aten
xllm = torch.ops.xllm
_CASTS = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.DOUBLE: torch.float32,
          onnx.TensorProto.INT64: torch.int64, onnx.TensorProto.INT32: torch.int32,
          onnx.TensorProto.BOOL: torch.bool}  # fmt: skip
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}
_OPEN = 1 << 62  # ends of slices beyond this mean: all
Inputs = list[Value | None]
Attributes = Mapping[str, Any]


def given(value: Value | None) -> Value:
    if value is None:
        raise refuse("an input is missing")
    return value


def known(b: Builder, value: Value | None, what: str) -> np.ndarray:
    """An input that must be known while the model is read."""
    found = b.known(given(value))
    if found is None:
        raise refuse(f"its {what} depends on the inputs of the model", code="onnx-dynamic")
    return found


def permute(b: Builder, value: Value, order: Sequence[int]) -> Value:
    """Axes in another order; two in a row are one, and one that changes nothing is none."""
    order, source = list(order), value
    if source.node is not None and source.node.target is aten.permute.default:
        inner, first = arguments(source.node)
        order = [first[axis] for axis in order]
        source = Value(value.dtype, tuple(inner.meta["val"].shape), inner)
    if order == sorted(order):
        return source
    return b.emit(aten.permute.default, source, order)


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise refuse(f"axis {axis} of {rank} dimensions")
    return axis % rank


def _folds(value: np.ndarray | None) -> bool:
    return value is not None and value.size <= MAX_KNOWN


def _shape(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    shape = given(inputs[0]).shape
    return [b.fact(np.array([*shape, None], dtype=object)[:-1][attributes.get("start", 0) : attributes.get("end")])]


def _size(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    total: Any = 1
    for size in given(inputs[0]).shape:
        total = total * size
    return [b.fact(np.array(total, dtype=object))]


def _constant(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    ((name, value),) = attributes.items()
    if name not in ("value", "value_int", "value_ints", "value_float", "value_floats"):
        raise refuse(f"a constant given as {name}")
    kind = np.float32 if "float" in name else np.int64
    array = value if name == "value" else np.array(value, kind)
    array = array.astype(np.float32) if array.dtype.kind == "f" else array
    kinds = {np.dtype(held): dtype for dtype, held in _NUMPY.items()}
    if array.dtype not in kinds:
        raise refuse(f"a constant of {array.dtype}")
    return [Value(kinds[array.dtype], array.shape, known=array)]


def _identity(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    return [given(inputs[0])]


def _dropout(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    """The input, and a mask that keeps all of it."""
    x, _, training = [*inputs, None, None][:3]
    if training is not None and known(b, training, "training_mode").any():
        raise refuse("training_mode is on", try_="a model exported for inference")
    return [given(x), _filled(b, Value(torch.bool, (), known=np.array(True)), given(x).shape)]


def _cast(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, to = given(inputs[0]), _CASTS.get(attributes["to"])
    if to is None:
        raise refuse(f"a cast to {onnx.TensorProto.DataType.Name(attributes['to'])}")
    if to == x.dtype:
        return [x]
    # What ONNX counts in float64 is counted in float32 here, which holds fewer integers.
    narrow = attributes["to"] == onnx.TensorProto.DOUBLE and not x.dtype.is_floating_point and x.dtype != torch.bool
    if (array := b.known(x)) is not None and (array.dtype != object or to in (torch.int64, torch.int32)):
        made = array if array.dtype == object else array.astype(_NUMPY[to])
        if not narrow or (made.astype(np.int64) == array).all():
            return [Value(to, x.shape, known=made)]
    if narrow and (array is None or array.dtype != object):
        raise refuse("a cast of integers to DOUBLE, which is computed in float32", try_="a cast to FLOAT")
    return [b.emit(aten.to.dtype, x, to)]


def _reshape(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    wanted = list(known(b, inputs[1], "shape").flat)
    keep = not attributes.get("allowzero", 0)
    sizes = [
        x.shape[i] if keep and isinstance(size, int | np.integer) and size == 0 else _plain(size)
        for i, size in enumerate(wanted)
    ]
    return [_viewed(b, x, _solved(x.shape, sizes))]


def _solved(shape: Sequence[Any], sizes: list[Any]) -> list[Any]:
    """The sizes, with -1 worked out."""
    if -1 not in [size for size in sizes if isinstance(size, int)]:
        return sizes
    total, rest, at = (
        _product(shape),
        1,
        next(i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1),
    )
    rest = _product(size for i, size in enumerate(sizes) if i != at)
    return [*sizes[:at], total // rest, *sizes[at + 1 :]]


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _plain(size: Any) -> Any:
    return int(size) if isinstance(size, np.integer) else size


def _viewed(b: Builder, x: Value, shape: Sequence[Any]) -> Value:
    """The same numbers in order under another shape."""
    array = b.known(x)
    if array is not None and all(isinstance(size, int) for size in shape):
        return Value(x.dtype, tuple(shape), known=array.reshape([int(size) for size in shape]))
    return b.reshape(x, shape)


def _flatten(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    axis = attributes.get("axis", 1)
    axis = len(x.shape) if axis == len(x.shape) else axis_of(axis, len(x.shape) or 1)
    return [_viewed(b, x, [_product(x.shape[:axis]), _product(x.shape[axis:])])]


def _unsqueeze(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, axes = given(inputs[0]), [int(axis) for axis in known(b, inputs[1], "axes").flat]
    rank = len(x.shape) + len(axes)
    new, rest = {axis_of(axis, rank) for axis in axes}, iter(x.shape)
    return [_viewed(b, x, [1 if axis in new else next(rest) for axis in range(rank)])]


def _squeeze(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    if len(inputs) > 1 and inputs[1] is not None:
        gone = {axis_of(int(axis), len(x.shape)) for axis in known(b, inputs[1], "axes").flat}
        if any(not isinstance(x.shape[axis], int) or x.shape[axis] != 1 for axis in gone):
            raise refuse("it takes away a dimension that is not one")
        if not gone and not all(isinstance(size, int) and size != 1 for size in x.shape):
            raise refuse("its axes are empty, which some take for none and some for all")
    elif any(not isinstance(size, int) for size in x.shape):
        raise refuse("which dimensions it takes away depends on sizes", try_="axes that say which")
    else:
        gone = {axis for axis, size in enumerate(x.shape) if size == 1}
    return [_viewed(b, x, [size for axis, size in enumerate(x.shape) if axis not in gone])]


def _transpose(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    order = attributes.get("perm") or list(reversed(range(len(x.shape))))
    if sorted(order) != list(range(len(x.shape))):
        raise refuse(f"the order {order} of {len(x.shape)} axes")
    if (array := b.known(x)) is not None and x.node is None and _folds(array):
        return [Value(x.dtype, tuple(array.transpose(order).shape), known=array.transpose(order))]
    return [permute(b, x, order)]


def _concat(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    parts = [given(part) for part in inputs]
    arrays = [b.known(part) for part in parts]
    if all(_folds(array) for array in arrays):
        joined = np.concatenate([array for array in arrays if array is not None], attributes["axis"])
        return [Value(parts[0].dtype, joined.shape, known=joined)]
    return [
        parts[0]
        if len(parts) == 1
        else b.emit(aten.cat.default, parts, axis_of(attributes["axis"], len(parts[0].shape)))
    ]


def _slice(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    starts, ends = (list(known(b, value, "range").flat) for value in inputs[1:3])
    axes, steps = (
        list(known(b, value, "range").flat) if value is not None else None for value in [*inputs[3:5], None, None][:2]
    )
    array = b.known(x) if x.node is None else None
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axis_of(int(axes[place]) if axes else place, len(x.shape))
        step = int(steps[place]) if steps else 1
        if step < 1:
            raise refuse(f"a slice with step {step}")
        size = x.shape[axis]
        first, last = _bound(start, size), _bound(end, size)
        if b.at_one(first) < 0 or (b.at_one(last) < 0 and isinstance(end, int | np.integer)):
            raise refuse("it slices from before the front where dims are 1", code="onnx-shape")
        if isinstance(first, int) and first == 0 and str(last) == str(size) and step == 1:
            continue
        if array is not None and all(isinstance(bound, int) for bound in (first, last)):
            array = array[(slice(None),) * axis + (slice(first, last, step),)]
            x = Value(x.dtype, array.shape, known=array)
        else:
            array, x = None, b.emit(aten.slice.Tensor, x, axis, first, last, *([step] if step != 1 else []))
    return [x]


def _bound(bound: Any, size: Any) -> Any:
    """One end of a slice of `size` elements, counted from the front."""
    bound = _plain(bound)
    if isinstance(bound, int):
        if bound >= 0 and isinstance(size, int):
            return min(bound, size)
        if bound >= 0:
            return size if bound >= _OPEN or bound > 1 << 30 else bound
        return max(size + bound, 0) if isinstance(size, int) else (0 if bound < -(1 << 30) else size + bound)
    return bound


def _split(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x = given(inputs[0])
    axis = axis_of(attributes.get("axis", 0), len(x.shape))
    size = x.shape[axis]
    if len(inputs) > 1 and inputs[1] is not None:
        parts = [_plain(part) for part in known(b, inputs[1], "sizes").flat]
    elif isinstance(size, int) and attributes.get("num_outputs"):
        count = attributes["num_outputs"]
        each = -(-size // count)
        parts = [min(each, size - each * place) for place in range(count)]
    else:
        raise refuse("the sizes of its parts are not known")
    found, start = [], 0
    for part in parts:
        found += [b.emit(aten.slice.Tensor, x, axis, start, start + part)]
        start = start + part
    return found


def _gather(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, index = given(inputs[0]), given(inputs[1])
    axis = axis_of(attributes.get("axis", 0), len(x.shape))
    place, array = b.known(index), b.known(x) if x.node is None else None
    if place is not None and array is not None and place.dtype != object and (x.dtype != torch.float32 or not x.stored):
        picked = np.take(array, place.astype(np.int64), axis)
        picked = np.array(picked, dtype=array.dtype)
        return [Value(x.dtype, picked.shape, known=picked)]
    if place is not None and place.ndim == 0 and isinstance(_plain(place.item()), int):
        at, size = int(place.item()), x.shape[axis]
        first = at if at >= 0 else size + at
        part = b.emit(aten.slice.Tensor, x, axis, first, first + 1)
        return [b.reshape(part, [held for i, held in enumerate(x.shape) if i != axis])]
    if axis == 0 and len(x.shape) == 2 and x.stored and x.dtype == torch.float32:
        return [b.emit(xllm.embedding.default, _from_front(b, index, x.shape[0]), x)]
    return [b.emit(aten.index.Tensor, x, [*[None] * axis, index])]


def _gather_elements(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, index = given(inputs[0]), given(inputs[1])
    axis, array = axis_of(attributes.get("axis", 0), len(x.shape)), b.known(x) if x.node is None else None
    if array is not None and array.size and (array == array.flat[0]).all():  # a table of one value gives it everywhere
        return [_filled(b, Value(x.dtype, (), known=array.reshape(-1)[0:1].reshape(())), index.shape)]
    return [b.emit(aten.gather.default, x, axis, _from_front(b, index, x.shape[axis]))]


def _from_front(b: Builder, index: Value, size: Any) -> Value:
    """Places counted from the front, as operators of ours and of torch have them; ONNX counts from behind below 0."""
    place, source = b.known(index), index.node
    while source is not None and source.target in (aten.reshape.default, aten.expand.default):
        source = arguments(source)[0]
    if source is not None and source.target is aten.arange.start and arguments(source)[0] == 0:
        return index
    if place is not None and place.dtype != object and (place >= 0).all():
        return index
    held = b.fact(np.array(size, object), index.dtype) if not isinstance(size, int) else size
    moved = b.emit(aten.add.Tensor, index, held)
    return b.emit(aten.where.self, b.emit(aten.lt.Scalar, index, 0), moved, index)


def _gather_nd(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, index = given(inputs[0]), given(inputs[1])
    if attributes.get("batch_dims", 0) or not isinstance(index.shape[-1], int):
        raise refuse("it gathers within batches")
    last = len(index.shape) - 1
    parts = [b.emit(aten.slice.Tensor, index, last, at, at + 1) for at in range(index.shape[-1])]
    return [b.emit(aten.index.Tensor, x, [b.reshape(part, index.shape[:-1]) for part in parts])]


def _filled(b: Builder, scalar: Value, shape: Sequence[Any]) -> Value:
    if all(isinstance(size, int) for size in shape) and int(np.prod([1, *shape])) <= MAX_KNOWN:
        array = np.full(shape, known(b, scalar, "value"))
        return Value(scalar.dtype, array.shape, known=array)
    return b.emit(
        aten.expand.default, b.reshape(Value(scalar.dtype, (), b.node(scalar)), [1] * len(shape)), list(shape)
    )


def _expand(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, wanted = given(inputs[0]), [_plain(size) for size in known(b, inputs[1], "shape").flat]
    rank = max(len(wanted), len(x.shape))
    have, wanted = [1] * (rank - len(x.shape)) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    shape = [size if isinstance(want, int) and want == 1 else want for size, want in zip(have, wanted, strict=True)]
    if list(map(str, shape)) == list(map(str, x.shape)):
        return [x]
    return [b.emit(aten.expand.default, b.reshape(x, have), shape)]


def _tile(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, counts = given(inputs[0]), [_plain(count) for count in known(b, inputs[1], "repeats").flat]
    if all((isinstance(size, int) and size == 1) or (isinstance(count, int) and count == 1)
           for size, count in zip(x.shape, counts, strict=True)):  # fmt: skip
        shape = [size * count for size, count in zip(x.shape, counts, strict=True)]
        return [b.emit(aten.expand.default, x, shape)]
    return [b.emit(aten.repeat.default, x, counts)]


def _range(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    start, limit, delta = (_plain(known(b, value, "bound").item()) for value in inputs)
    dtype = given(inputs[0]).dtype
    if all(isinstance(bound, int) for bound in (start, limit, delta)) and 0 <= (limit - start) / delta <= MAX_KNOWN:
        return [
            Value(dtype, (len(range(start, limit, delta)),), known=np.arange(start, limit, delta).astype(_NUMPY[dtype]))
        ]
    if not (isinstance(delta, int) and delta == 1) or dtype not in (torch.int64, torch.int32):
        raise refuse("a range whose step is not one")
    return [b.emit(aten.arange.start, start, limit, dtype=dtype, device=torch.device("meta"))]


def _constant_of_shape(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    value = attributes.get("value", np.zeros(1, np.float32))
    scalar = _constant(b, [], {"value": np.asarray(value).reshape(())}, opset)[0]
    return [_filled(b, scalar, [_plain(size) for size in known(b, inputs[0], "shape").flat])]


def _trilu(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    k = int(known(b, inputs[1], "diagonal").item()) if len(inputs) > 1 and inputs[1] is not None else 0
    return [b.emit(aten.triu.default if attributes.get("upper", 1) else aten.tril.default, given(inputs[0]), k)]


RULES: Mapping[str, Callable[[Builder, Inputs, Attributes, int], list[Value]]] = {
    "Shape": _shape, "Size": _size, "Constant": _constant, "Identity": _identity, "Dropout": _dropout, "Cast": _cast,
    "Reshape": _reshape, "Flatten": _flatten, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Transpose": _transpose,
    "Concat": _concat, "Slice": _slice, "Split": _split, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd, "Expand": _expand, "Tile": _tile, "Range": _range, "ConstantOfShape": _constant_of_shape,
    "Trilu": _trilu,
}  # fmt: skip
