"""A node as a target sees it: plain data, sizes in the program's dims, views resolved to the value they look at."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.fx as fx

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.ir.effects import named_arguments
from xllm.ir.program import STATES, arguments, path_of
from xllm.plan import ELEMENT_BYTES
from xllm.targets.base import Extent, Operation, Tensor

_DTYPES = {
    torch.float32: "float32",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
    torch.bfloat16: "bfloat16",
}
aten = torch.ops.aten


class Reader:
    """Translates the nodes of one program. Every value has the name of the node (or node.i) that owns its memory."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._symbols = program.symbols()
        self._extents: dict[Any, Extent] = {}  # a step has few sizes and many values

    def owner(self, node: fx.Node) -> str:
        """Name of the value whose memory `node` is: itself, or what a view or a tuple element looks at."""
        base = unviewed(node)
        if base.target is operator.getitem:
            source, index = arguments(base)
            return f"{source.name}.{index}"
        return base.name

    def tensor(self, node: fx.Node) -> Tensor:
        """The value as an argument: the memory it lies in under the shape it is seen in."""
        value, base = node.meta["val"], unviewed(node)
        shape = tuple(self.size(size, node) for size in value.shape)
        if base.op == "get_attr":
            return Tensor(str(base.target), "weight", shape, "float32")
        if base.op == "placeholder":
            if self.program.is_function:  # its inputs lie in the arena like everything else
                return Tensor(base.name, "value", shape, _dtype(value, node))
            return Tensor(str(base.target), "state" if base.target in STATES else "input", shape, _dtype(value, node))
        return Tensor(self.owner(node), "value", shape, _dtype(value, node))

    def results(self, node: fx.Node) -> tuple[Tensor, ...]:
        value = node.meta["val"]
        if value is None:
            return ()
        if isinstance(value, torch.Tensor):
            return (self.tensor(node),)
        shapes = [tuple(self.size(size, node) for size in part.shape) for part in value]
        return tuple(
            Tensor(f"{node.name}.{index}", "value", shapes[index], _dtype(part, node))
            for index, part in enumerate(value)
        )

    def operation(self, node: fx.Node) -> Operation:
        args = {name: self._argument(value) for name, value in named_arguments(node).items()}
        return Operation(node.name, op_name(node), args, self.results(node), path_of(node))

    def size(self, size: Any, node: fx.Node) -> int | Extent:
        """A shape entry: an int, or a polynomial of the program's dims."""
        if isinstance(size, int):
            return size
        expression = sympy.sympify(size.node.expr if hasattr(size, "node") else size)
        if expression not in self._extents:
            self._extents[expression] = self._extent(expression, node)
        return self._extents[expression]

    def _extent(self, expression: Any, node: fx.Node) -> Extent:
        poly = expression.as_poly(*expression.free_symbols)
        if poly is None or not all(factor.is_integer for factor in poly.coeffs()):
            raise CompileError(
                f"size {expression} is no polynomial of the program's dims",
                code="unsupported-shape",
                node=node.name,
                where=path_of(node),
                try_="move the operation out of the model, or lift it to an operator of the dialect",
            )
        names = [self._symbols[str(symbol)] for symbol in poly.gens]
        terms = {
            "*".join(sorted(name for name, power in zip(names, powers, strict=True) for _ in range(power))): int(factor)
            for powers, factor in poly.terms()
        }
        return Extent(terms)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if isinstance(held, torch.SymInt):
                return self.size(held, value)
            return self.tensor(value)
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        return value


def op_name(node: fx.Node) -> str:
    """xllm.linear for dialect operators, aten.add.Tensor for the rest."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    if target.namespace == "xllm":
        return f"xllm.{target._opname}"
    return f"{target.namespace}.{target._opname}.{target._overloadname}"


def unviewed(node: fx.Node) -> fx.Node:
    """What a value is a view of; itself where it has its own memory."""
    while node.target is aten.reshape.default:
        node = arguments(node)[0]
    return node


def is_alias(node: fx.Node) -> bool:
    """Calls that make no bytes: views of memory in order and elements of a tuple."""
    return node.target in (aten.reshape.default, operator.getitem)


def bytes_of(tensor: Tensor) -> Extent:
    """Bytes of a value."""
    return tensor.rows_of(len(tensor.shape)).times(ELEMENT_BYTES[tensor.dtype])


def _dtype(value: torch.Tensor, node: fx.Node) -> str:
    if value.dtype not in _DTYPES:
        raise CompileError(
            f"values of {value.dtype} are not supported", code="unsupported-dtype", node=node.name, where=path_of(node)
        )
    return _DTYPES[value.dtype]
