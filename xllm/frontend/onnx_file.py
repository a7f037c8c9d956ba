"""An ONNX file as untrusted input: what is in it is checked before anything of it is used, and tensors are mapped.

Refused by name: nested graphs and functions of the model's own, operators of other domains, opsets outside 18 to 23,
values that are read before they are made, tensors whose bytes are not there or lie outside the model's folder.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir

from xllm.errors import CompileError

OPSETS = range(18, 24)
MAX_NODES, MAX_RANK, MAX_FILE_BYTES = 1 << 20, 8, (1 << 31) - 1
MAX_ELEMENTS = 1 << 40
DOMAINS = ("", "ai.onnx")
_TENSOR = onnx.TensorProto
# bfloat16 has no numpy type: its bits are kept as uint16.
_DTYPES: Mapping[int, type] = {
    _TENSOR.FLOAT: np.float32, _TENSOR.FLOAT16: np.float16, _TENSOR.BFLOAT16: np.uint16, _TENSOR.DOUBLE: np.float64,
    _TENSOR.INT64: np.int64, _TENSOR.INT32: np.int32, _TENSOR.INT8: np.int8, _TENSOR.UINT8: np.uint8,
    _TENSOR.BOOL: np.bool_,
}  # fmt: skip
_FLOATS = (_TENSOR.FLOAT, _TENSOR.FLOAT16, _TENSOR.BFLOAT16, _TENSOR.DOUBLE)


def refuse(why: str, *, code: str = "bad-onnx", where: str = "", try_: str = "") -> CompileError:
    """The error of a file that is not taken."""
    return CompileError(why, code=code, pass_name="onnx", where=where, try_=try_)


@dataclass(frozen=True)
class Entry:
    """One initializer: its dtype as ONNX counts them, shape, and bytes without a copy."""

    dtype: int
    shape: tuple[int, ...]
    data: memoryview


class OnnxCheckpoint(Mapping[str, np.ndarray]):
    """Initializers by name, as stored: views of the mapped file, bfloat16 as uint16 bits, float64 as float32."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        array = np.frombuffer(entry.data, _DTYPES[entry.dtype], math.prod(entry.shape)).reshape(entry.shape)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def is_float(self, name: str) -> bool:
        return self._entries[name].dtype in _FLOATS


@dataclass(frozen=True)
class OnnxFile:
    """A checked model: the graph as onnx_ir reads it, the opset, and its initializers."""

    graph: onnx_ir.Graph
    opset: int
    tensors: OnnxCheckpoint


def read(path: str | os.PathLike[str]) -> OnnxFile:
    """Reads and checks a model. Raises CompileError naming what is wrong with it."""
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise refuse("the file is larger than 2 GiB", try_="a model with its weights saved as external data")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except Exception as error:  # whatever the protobuf library in use raises on bytes that are none
        raise refuse(f"it is no ONNX model: {str(error) or type(error).__name__}", where=path.name) from error
    opset = _opset(model)
    if model.functions:
        name = model.functions[0].name
        raise refuse(f"the model brings a function of its own, {name!r}", code="onnx-function", try_="an inlined model")
    if model.graph.sparse_initializer:
        raise refuse("sparse initializers are not supported")
    entries = _Files(path.parent).entries(model.graph.initializer)
    _check_graph(model.graph, entries)
    # Initializers are ours already: to onnx_ir they are inputs.
    held = {value.name for value in model.graph.input}
    model.graph.input.extend(onnx.ValueInfoProto(name=name) for name in entries if name not in held)
    del model.graph.initializer[:]
    try:
        graph = onnx_ir.serde.deserialize_model(model).graph
    except Exception as error:  # onnx_ir has no one type for what it does not take
        raise refuse(f"it is no sound ONNX model: {error}", where=path.name) from error
    return OnnxFile(graph, opset, OnnxCheckpoint(entries))


def _opset(model: onnx.ModelProto) -> int:
    versions = {item.version for item in model.opset_import if item.domain in DOMAINS}
    if len(versions) != 1 or next(iter(versions)) not in OPSETS:
        said = ", ".join(map(str, sorted(versions))) or "none"
        raise refuse(
            f"its opset is {said}, read are {OPSETS[0]} to {OPSETS[-1]}", code="onnx-opset",
            try_="an export with opset_version=18 or newer",
        )  # fmt: skip
    return next(iter(versions))


def _check_graph(graph: onnx.GraphProto, entries: Mapping[str, Entry]) -> None:
    """Every value is made once, before it is read, by an operator of the standard without a graph inside."""
    if len(graph.node) > MAX_NODES:
        raise refuse(f"it has {len(graph.node)} nodes, at most {MAX_NODES} are read")
    made = set(entries)
    for value in graph.input:
        if (value.name in made and value.name not in entries) or not value.name:
            raise refuse(f"there are two inputs named {value.name!r}")
        made.add(value.name)
    for node in graph.node:
        where = node.name or node.op_type
        if node.domain not in DOMAINS:
            raise refuse(f"{node.op_type} is of domain {node.domain!r}", code="onnx-domain", where=where)
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise refuse(
                    f"{node.op_type} holds a nested graph", code="nested-graph", where=where,
                    try_="a model without If, Loop and Scan",
                )  # fmt: skip
            if attribute.HasField("t"):
                _data_of(attribute.t)
            if attribute.tensors or attribute.ref_attr_name or attribute.HasField("sparse_tensor"):
                raise refuse(f"attribute {attribute.name!r} of {node.op_type} is of no supported kind", where=where)
        if missing := [name for name in node.input if name and name not in made]:
            raise refuse(f"{node.op_type} reads {missing[0]!r} before it is made", code="onnx-order", where=where)
        for name in filter(None, node.output):
            if name in made:
                raise refuse(f"{name!r} is made a second time", code="onnx-order", where=where)
            made.add(name)
    if missing := [value.name for value in graph.output if value.name not in made]:
        raise refuse(f"the result {missing[0]!r} is never made", code="onnx-order")
    results = [value.name for value in graph.output]
    if not results or len(set(results)) < len(results):
        raise refuse(f"its results are {results[:4]}: at least one is needed, each once", code="onnx-results")


def _shape_of(tensor: onnx.TensorProto) -> tuple[int, ...]:
    shape = tuple(tensor.dims)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise refuse(f"tensor {tensor.name!r} claims the shape {list(shape)[:MAX_RANK]}", code="onnx-tensor")
    if tensor.data_type not in _DTYPES:
        kind = _TENSOR.DataType.Name(tensor.data_type) if tensor.data_type in _TENSOR.DataType.values() else "unknown"
        raise refuse(f"tensor {tensor.name!r} holds {kind} values", code="onnx-tensor")
    return shape


def _data_of(tensor: onnx.TensorProto) -> memoryview:
    """The bytes of a tensor inside the model; repeated fields become bytes. Raises CompileError unless they fit."""
    shape = _shape_of(tensor)
    kind = np.dtype(_DTYPES[tensor.data_type])
    if tensor.HasField("raw_data"):
        data = memoryview(tensor.raw_data)
    elif tensor.data_type in (_TENSOR.FLOAT, _TENSOR.DOUBLE, _TENSOR.INT64):
        fields = {int(_TENSOR.FLOAT): tensor.float_data, int(_TENSOR.DOUBLE): tensor.double_data}
        field: Any = fields.get(int(tensor.data_type), tensor.int64_data)
        data = memoryview(np.array(field, kind).tobytes())
    else:
        data = memoryview(np.array(tensor.int32_data, np.int32).astype(_bits(tensor.data_type)).tobytes())
    if len(data) != math.prod(shape) * kind.itemsize or tensor.data_location == _TENSOR.EXTERNAL:
        raise refuse(
            f"tensor {tensor.name!r} of shape {list(shape)} needs {math.prod(shape) * kind.itemsize} bytes,"
            f" the file holds {len(data)}", code="onnx-tensor",
        )  # fmt: skip
    return data


def _bits(data_type: int) -> type:
    """How ONNX keeps a narrow value in its list of int32."""
    return np.uint16 if data_type in (_TENSOR.FLOAT16, _TENSOR.BFLOAT16) else _DTYPES[data_type]


class _Files:
    """Files beside the model that hold tensors: each is mapped once, and none lies outside the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._mapped = folder, dict[str, memoryview]()

    def entries(self, tensors: object) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for tensor in tensors:  # pyright: ignore[reportGeneralTypeIssues]  # a protobuf list
            if tensor.name in found or not tensor.name:
                raise refuse(f"there are two initializers named {tensor.name!r}", code="onnx-tensor")
            outside = tensor.data_location == _TENSOR.EXTERNAL
            data = self._outside(tensor) if outside else _data_of(tensor)
            found[tensor.name] = Entry(tensor.data_type, _shape_of(tensor), data)
        return found

    def _outside(self, tensor: onnx.TensorProto) -> memoryview:
        said = {item.key: item.value for item in tensor.external_data}
        size = math.prod(_shape_of(tensor)) * np.dtype(_DTYPES[tensor.data_type]).itemsize
        offset, length = (_number(tensor.name, key, said.get(key, default)) for key, default in (("offset", "0"), ("length", str(size))))  # fmt: skip # noqa: E501
        if length != size:
            raise refuse(f"tensor {tensor.name!r} needs {size} bytes, its length is {length}", code="onnx-tensor")
        data = self._file(tensor.name, said.get("location", ""))
        if offset + length > len(data):
            raise refuse(
                f"tensor {tensor.name!r} ends at {offset + length}, its file at {len(data)}", code="onnx-tensor"
            )
        return data[offset : offset + length]

    def _file(self, tensor: str, location: str) -> memoryview:
        if location in self._mapped:
            return self._mapped[location]
        if not isinstance(location, str):  # protobuf gives the bytes of what is no UTF-8
            raise self._elsewhere(tensor, repr(location))
        parts = Path(location).parts
        if not parts or Path(location).is_absolute() or ".." in parts or "\0" in location or "\\" in location:
            raise self._elsewhere(tensor, location)
        file = self._folder
        for part in parts:
            file = file / part
            if file.is_symlink():
                raise self._elsewhere(tensor, location)
        if not file.is_file():
            raise refuse(f"{location!r}, which holds tensor {tensor!r}, is missing", code="onnx-external")
        with file.open("rb") as handle:
            empty = os.fstat(handle.fileno()).st_size == 0
            data = memoryview(b"" if empty else mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        return self._mapped.setdefault(location, data)

    @staticmethod
    def _elsewhere(tensor: str, location: str) -> CompileError:
        return refuse(
            f"tensor {tensor!r} is said to lie in {location!r}, which is no file inside the model's folder",
            code="onnx-external",
        )


def _number(tensor: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise refuse(f"the {key} of tensor {tensor!r} is {text!r}", code="onnx-tensor")
    return int(text)
