"""An ONNX model as a function program: read and checked (`onnx_file`), then every node told in aten and xllm operators
(`onnx_ops` and its neighbours) on symbolic sizes (`onnx_build`). The table of operators is the whole of what is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch

from xllm.errors import CompileError
from xllm.frontend import onnx_arithmetic, onnx_attention, onnx_products, onnx_shapes
from xllm.frontend.onnx_build import Builder, Value
from xllm.frontend.onnx_file import MAX_RANK, OnnxCheckpoint, OnnxFile, read, refuse
from xllm.ir.build import prune
from xllm.ir.program import Program

Rule = Callable[[Builder, list[Value | None], Mapping[str, Any], int], list[Value]]
OPERATORS: Mapping[str, Rule] = {
    **onnx_shapes.RULES, **onnx_arithmetic.RULES, **onnx_products.RULES, **onnx_attention.RULES,
}  # fmt: skip
_DTYPES = {onnx.TensorProto.FLOAT: torch.float32, onnx.TensorProto.INT64: torch.int64,
           onnx.TensorProto.INT32: torch.int32, onnx.TensorProto.BOOL: torch.bool}  # fmt: skip
_VIEWS = [getattr(torch.ops.aten, name).default for name in ("reshape", "permute", "expand", "clone")]
_VIEWS += [torch.ops.aten.slice.Tensor]
MAX_DIM = 1 << 24


def import_onnx(path: str | os.PathLike[str], dims: Mapping[str, int]) -> tuple[Program, OnnxCheckpoint]:
    """The program of a model file and its initializers. `dims`: the largest size of each dim the inputs name.

    Raises CompileError naming the node and the operator, or what of the file is not taken.
    """
    file = read(path)
    if wrong := next((name for name, size in dims.items() if not 1 <= size <= MAX_DIM), None):
        raise refuse(f"dim {wrong!r} is {dims[wrong]}", code="bad-option", try_=f"a size from 1 to {MAX_DIM}")
    builder = Builder(Path(path).stem, file.tensors, dims)
    values = _inputs(builder, file)
    _check_named(builder.program, dims)
    for name in file.tensors:
        values[name] = _initializer(file.tensors, name)
    for node in file.graph:
        _translate(builder, node, values, file.opset)
    _outputs(builder, file.graph, values)
    _check_free(builder)
    prune(builder.program)
    return builder.program, file.tensors


def _inputs(builder: Builder, file: OnnxFile) -> dict[str, Value]:
    values = {}
    sizes = [size for value in file.graph.inputs if value.shape is not None for size in value.shape]
    builder.dims_are(size.value for size in sizes if not isinstance(size, int) and isinstance(size.value, str))
    for value in file.graph.inputs:
        name = value.name or ""
        if name in file.tensors:  # an initializer that could be overridden: it is not
            continue
        if not isinstance(value.type, onnx_ir.TensorType) or value.shape is None or len(value.shape) > MAX_RANK:
            raise refuse(f"input {name!r} is no tensor of known rank")
        kind = _DTYPES.get(int(value.type.dtype))  # pyright: ignore[reportArgumentType]
        if kind is None:
            raise refuse(f"input {name!r} is of {value.type.dtype.name}", try_="a float32 model")
        shape = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) and not 1 <= size <= MAX_DIM:
                raise refuse(f"input {name!r} claims a size of {size}")
            said = size if isinstance(size, int) else size.value
            shape.append(said if isinstance(said, int) else builder.dim(said or f"{name}_{axis}"))
        values[name] = builder.input(name, kind, tuple(shape))
    return values


def _initializer(tensors: OnnxCheckpoint, name: str) -> Value:
    if tensors.is_float(name):
        return Value(torch.float32, tensors.shape(name), stored=name)
    array = tensors[name]
    kinds = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
    if array.dtype.name not in kinds:
        raise refuse(f"initializer {name!r} is of {array.dtype.name}: quantised models are not taken")
    return Value(kinds[array.dtype.name], tensors.shape(name), known=array)


def _translate(builder: Builder, node: onnx_ir.Node, values: dict[str, Value], opset: int) -> None:
    where = node.name or node.op_type
    rule = OPERATORS.get(node.op_type)
    if rule is None:
        raise refuse(f"the operator {node.op_type} is not supported", code="onnx-operator", where=where)
    builder.at(_path(node))
    inputs = [values[value.name] if value is not None and value.name else None for value in node.inputs]
    attributes = {name: _attribute(attribute) for name, attribute in node.attributes.items()}
    try:
        results = rule(builder, inputs, attributes, opset)
    except CompileError as error:
        error.where = error.where or f"{where} ({node.op_type})"
        raise
    except Exception as error:  # whatever torch raises on arguments that do not fit, and a rule on missing ones
        raise refuse(
            f"{node.op_type} does not fit its inputs: {builder.named(str(error).partition(chr(10))[0])}",
            code="onnx-node", where=where,
        ) from error  # fmt: skip
    beyond = next((place for place, value in enumerate(node.outputs) if value.name and place >= len(results)), None)
    if beyond is not None:
        named = onnx.defs.get_schema(node.op_type, opset, "").outputs[beyond].name
        raise refuse(f"its result {named} is not supported", code="onnx-operator", where=f"{where} ({node.op_type})")
    for value, made in zip(node.outputs, results, strict=False):
        if len(made.shape) > MAX_RANK:
            raise refuse(f"{node.op_type} makes {len(made.shape)} dimensions", where=where)
        if value.name:
            values[value.name] = made


def _path(node: onnx_ir.Node) -> str:
    """The module a node comes from, as torch's exporter says it; else the node's own name without its last part."""
    said = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if said.startswith("[") and "'" in said:
        scopes = [part for part in said.strip("[]").replace("'", "").split(", ") if part]
        return scopes[-2] if len(scopes) > 1 else ""
    return (node.name or "").strip("/").rpartition("/")[0].replace("/", ".")


def _attribute(attribute: Any) -> Any:
    value = attribute.value
    if attribute.type == onnx_ir.AttributeType.TENSOR:
        return value.numpy()
    return list(value) if isinstance(value, tuple) else value


def _outputs(builder: Builder, graph: onnx_ir.Graph, values: Mapping[str, Value]) -> None:
    """Results are values of calls: what is an input, a weight or known is copied."""
    builder.at("")
    nodes, names = [], []
    for output in graph.outputs:
        made = builder.node(_checked(output, values[output.name or ""]))
        root = made
        while root.op == "call_function" and root.target in _VIEWS:
            root = root.all_input_nodes[0]
        if root.op == "get_attr":
            raise refuse(
                f"result {output.name!r} is the same for all inputs", code="onnx-results", try_="a model without it"
            )
        if made.op != "call_function" or made in nodes:
            made = builder.call(torch.ops.aten.clone.default, made)
        nodes.append(made)
        names.append(output.name or "")
    node = builder.program.graph.output(tuple(nodes))
    node.meta = {"val": tuple(made.meta["val"] for made in nodes), "custom": {"path": "", "layer": None}}
    builder.program.outputs = tuple(names)


def _checked(output: onnx_ir.Value, made: Value) -> Value:
    """A result, if it is what the file says of its type and of the sizes that are numbers."""
    kind = output.type.dtype if output.type is not None else None
    said = _DTYPES.get(int(kind)) if kind is not None else made.dtype  # pyright: ignore[reportArgumentType]
    if said is not made.dtype:
        computed = str(made.dtype).removeprefix("torch.")
        raise refuse(f"result {output.name!r} is said to be of {kind}, computed is {computed}", code="onnx-results")
    claimed = list(output.shape) if output.shape is not None else list(made.shape)
    fits = len(claimed) == len(made.shape) and all(
        one == two
        for one, two in zip(claimed, made.shape, strict=True)
        if isinstance(one, int) and isinstance(two, int)
    )
    if not fits:
        raise refuse(
            f"result {output.name!r} is said to be {claimed}, computed is {list(made.shape)}", code="onnx-results"
        )
    return made


def _check_named(program: Program, dims: Mapping[str, int]) -> None:
    """Every dim of the inputs has a largest size, and nothing else has one."""
    known = {dim.name for dim in program.dims}
    if unknown := sorted(set(dims) - known):
        raise refuse(f"there is no dim {unknown[0]!r}", code="bad-option", try_=f"one of {', '.join(sorted(known))}")
    if missing := sorted(known - set(dims)):
        raise refuse(
            f"how large {missing[0]!r} may be is not said", code="missing-dim",
            try_=" ".join(f"--dim {name}=N" for name in missing),
        )  # fmt: skip


def _check_free(builder: Builder) -> None:
    """Reading the model has fixed no dim, and has made no choice that depends on one."""
    shown = {str(size.node.expr) for size in builder.symbols.values()}
    fixed = [name for name, size in builder.symbols.items() if str(size.node.expr) not in builder.program.dim_symbols]
    if fixed or len(shown) < len(builder.symbols):
        raise refuse(f"the model works at one size of {', '.join(fixed)} only", code="onnx-shape")
    if builder.env.guards:
        held = builder.named(str(builder.env.guards[0].expr))
        raise refuse(
            f"the model is built for sizes where {held}", code="onnx-shape",
            try_="dims of one name where sizes are equal, and a largest size (--dim) that its tables allow",
        )  # fmt: skip
