"""`xllm show --onnx`: a program or a plan as an ONNX file that viewers open. Operators are of domain "xllm" or "aten",
dims have their names, and weights are inputs: the file holds no byte of them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from xllm.artifact import Artifact
from xllm.plan import references
from xllm.targets.base import Extent

if TYPE_CHECKING:
    import torch.fx as fx

    from xllm.ir import Program
    from xllm.ir.show import Names

DOMAIN = "xllm"
TYPES = {
    "float32": TensorProto.FLOAT, "f32": TensorProto.FLOAT, "bool": TensorProto.BOOL,
    "bfloat16": TensorProto.BFLOAT16, "bf16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32, "i32": TensorProto.INT32, "int64": TensorProto.INT64, "i64": TensorProto.INT64,
}  # fmt: skip
STEP_INPUTS = {"ids": "T", "positions": "T", "slots": "T", "last": "S"}


def of_artifact(artifact: Artifact) -> onnx.ModelProto:
    """The plan: a node is a call, with its kernel and the numbers it is given."""
    plan, nodes = artifact.plan, []
    for call in plan.calls:
        written = set(call.results)
        if call.args:
            read = ["" if reference == "" else _plain(reference) for reference in call.args.values()
                    if reference not in written]  # fmt: skip
        else:
            read = [_plain(reference) for reference in references(call) if reference not in written]
        facts: dict[str, Any] = {"kernel": call.kernel, "stream": call.stream, **call.ints, **call.floats}
        facts |= {name: _size(extent) for name, extent in call.extents.items()}
        nodes.append(_node(call.node, call.op, read, [_plain(result) for result in call.results], facts))
    made = {name for node in nodes for name in node.output}
    told = {name: _told(name, held.dtype, held.shape) for name, held in plan.buffers.items()}
    weights = [_told(f"@{name}", held.layout.dtype, held.shape) for name, held in plan.weights.items()]
    if plan.is_function:
        inputs = [told[port.buffer] for port in plan.inputs.values()]
        results = [told[port.buffer] for port in plan.outputs.values()]
    else:
        used = {name for node in nodes for name in node.input}
        inputs = [_told(f"${name}", "int32", (dim,)) for name, dim in STEP_INPUTS.items() if f"${name}" in used]
        results = [told[plan.result]]
    outside = {value.name for value in (*inputs, *results)}
    inner = [value for name, value in told.items() if name in made - outside]
    return _model(artifact.name, nodes, [*inputs, *weights], results, inner)


def of_program(program: Program) -> onnx.ModelProto:
    """A captured or rewritten program; each of its layers may stand for several of the model."""
    from xllm.ir.effects import is_symbolic
    from xllm.ir.program import path_of
    from xllm.ir.show import Names

    names, nodes, inner = Names(program), [], []
    inputs = [_of_value(node, node.meta["val"], names) for node in program.graph.nodes if node.op == "placeholder"]
    weights = [
        _told(_name(node), "float32", node.meta["val"].shape)
        for node in program.graph.nodes if node.op == "get_attr"
    ]  # fmt: skip
    for node in program.calls():
        if is_symbolic(node) or node.target is operator.getitem:
            continue
        value = node.meta["val"]
        parts = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        outputs = [f"{_name(node)}.{index}" for index in range(len(parts))] if len(parts) > 1 else [_name(node)]
        read, facts = _arguments(node, names)
        nodes.append(_node(node.name, _operator(node), read, outputs, {"path": path_of(node), **facts}))
        for name, part in zip(outputs, parts, strict=False):
            inner.append(_told(name, *_typed(part, names)))
    results = []
    for node in program.output().all_input_nodes:
        results.append(_of_value(node, node.meta["val"], names))
    outside = {value.name for value in results}
    return _model(program.name, nodes, [*inputs, *weights], results, [one for one in inner if one.name not in outside])


def _model(name: str, nodes: list[Any], inputs: list[Any], results: list[Any], inner: Iterable[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, name or "xllm", inputs, results, value_info=list(inner))
    domains = [helper.make_opsetid(domain, 1) for domain in sorted({node.domain for node in nodes})]
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), *domains], ir_version=10, producer_name="xllm"
    )


def _node(name: str, op: str, read: list[str], written: list[str], facts: Mapping[str, Any]) -> onnx.NodeProto:
    domain, _, kind = op.partition(".")
    kept = {key: value for key, value in sorted(facts.items()) if value is not None and value not in ("", [])}
    return helper.make_node(kind or domain, read, written, name=name, domain=domain if kind else DOMAIN, **kept)


def _told(name: str, dtype: str, shape: Iterable[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TYPES[dtype], [_size(size) for size in shape])


def _size(size: Any) -> int | str:
    """A number, or a dim or what is made of dims, as text."""
    if isinstance(size, Extent):
        terms = [
            "*".join(filter(None, (str(factor) if factor != 1 or not dim else "", dim)))
            for dim, factor in size.terms.items()
        ]
        return " + ".join(terms) or 0
    return size if isinstance(size, int) else str(size)


def _plain(reference: str) -> str:
    return reference[1:] if reference[:1] == "%" else reference


# --- programs --------------------------------------------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    """The value a node is, or is a part of."""
    if node.target is operator.getitem:
        source, index = node.args[0], node.args[1]
        return f"{_name(source)}.{index}"  # pyright: ignore[reportArgumentType]
    return {"get_attr": f"@{node.target}", "placeholder": f"${node.target}"}.get(node.op, node.name)


def _of_value(node: fx.Node, value: Any, names: Names) -> onnx.ValueInfoProto:
    return _told(_name(node), *_typed(value, names))


def _typed(value: Any, names: Names) -> tuple[str, list[Any]]:
    dtype = names.type(value).partition("[")[0]
    return dtype, [size if isinstance(size, int) else names.expression(size) for size in value.shape]


def _operator(node: fx.Node) -> str:
    from xllm.ir.effects import operator_of

    found = operator_of(node)
    return f"{found.namespace}.{found._opname}" if found is not None else getattr(node.target, "__name__", "call")


def _arguments(node: fx.Node, names: Names) -> tuple[list[str], dict[str, Any]]:
    """Values it reads, and what else it is given by name."""
    from xllm.ir.effects import is_symbolic, named_arguments

    read, facts = [], {}
    for name, given in named_arguments(node).items():
        items = list(given) if isinstance(given, list | tuple) else [given]
        values = [item for item in items if hasattr(item, "op") and not is_symbolic(item)]
        read += [_name(item) for item in values]
        if values:
            continue
        numbers = all(isinstance(item, int) for item in items) or all(isinstance(item, float) for item in items)
        if isinstance(given, list | tuple):
            facts[name] = items if numbers else json.dumps([names.argument(item, None) for item in items])
        elif given is not None:
            facts[name] = given if isinstance(given, int | float | str) else names.argument(given, None)
    return read, facts
