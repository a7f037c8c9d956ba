"""The fallback provider: runs the torch body of an operator that has no native kernel, on arrays of the arena.

Importing this imports torch: a process that serves such a plan pays for it, and the compile report says so. Operators
are looked up by name in the aten and xllm namespaces, and only those that make new values from the values they are
given; nothing else in an artifact can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

import xllm.ir.dialect  # noqa: F401  # registers the xllm operators
from xllm.artifact import ArtifactError, MappedWeights
from xllm.ir.effects import runs_alone
from xllm.plan import Bucket, Call, Plan
from xllm.targets.arrays import StepArrays, array_at
from xllm.targets.base import Extent

# One thread: torch shares its sums by their number, and the same bits are promised for any.
torch.set_num_threads(1)
_NAMESPACES = ("aten", "xllm")


class TorchCall:
    """One planned call bound to a bucket. Raises ArtifactError for an operator that does not exist."""

    def __init__(self, call: Call, plan: Plan, bucket: Bucket, arena: np.ndarray, weights: MappedWeights) -> None:
        self._call, self._plan, self._bucket = call, plan, bucket
        self._arena, self._weights = arena, weights
        self._operator = find_operator(call.op)

    def run(self, step: StepArrays) -> None:
        self.run_at({"T": len(step.ids), "S": len(step.last)}, step)

    def run_at(self, sizes: Mapping[str, int], step: StepArrays | None = None) -> None:
        """The call when every dim has its size; a call of a step reads the step's arrays."""
        args = {name: self._value(operand, step, sizes) for name, operand in self._call.operands}
        schema = self._operator._schema.arguments
        given = [argument for argument in schema if argument.name in args]
        positional = [args[argument.name] for argument in given if not argument.kwarg_only]
        named = {argument.name: args[argument.name] for argument in given if argument.kwarg_only}
        with torch.no_grad():
            produced = self._operator(*positional, **named)
        for reference, value in zip(self._call.results, _as_tuple(produced), strict=True):
            name = reference[1:]
            held = self._plan.buffers[name]
            shape = [_at(size, sizes) for size in held.shape]
            np.copyto(array_at(self._arena, self._bucket.offsets[name], shape, held.dtype), value.numpy())

    def _value(self, operand: Mapping[str, Any], step: StepArrays | None, sizes: Mapping[str, int]) -> Any:
        if "ref" in operand:
            shape = [_at(size, sizes) for size in operand["shape"]]
            return torch.from_numpy(self._tensor(operand["ref"], shape, operand["dtype"], step))
        if "size" in operand:
            return _at(operand["size"], sizes)
        if "list" in operand:
            return [self._value(item, step, sizes) for item in operand["list"]]
        if "float" in operand:
            return float(operand["float"])
        if "torch" in operand:
            named = getattr(torch, operand["torch"], None)
            if not isinstance(named, torch.dtype | torch.layout | torch.memory_format):
                raise ArtifactError("unknown-operator", f"{operand['torch']!r} is no dtype, layout or memory format")
            return named
        return operand["value"]

    def _tensor(self, reference: str, shape: list[int], dtype: str, step: StepArrays | None) -> np.ndarray:
        kind, name = reference[:1], reference[1:]
        if kind == "$" and step is not None:
            return getattr(step, name).reshape(shape)
        if kind == "@":
            return self._weights.array(self._plan.weights[name]).reshape(shape).copy()
        return array_at(self._arena, self._bucket.offsets[name], shape, dtype)


def find_operator(name: str) -> Callable[..., Any] | Any:
    """aten.add.Tensor or xllm.linear as a torch operator. Raises ArtifactError for any other name, and for operators
    that change their arguments, open files or read beyond them.
    """
    namespace, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    if namespace in _NAMESPACES and operator.isidentifier() and (overload or "default").isidentifier():
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        found = getattr(packet, overload or "default", None)
        if isinstance(found, torch._ops.OpOverload) and runs_alone(found):
            return found
    raise ArtifactError("unknown-operator", f"the plan calls {name}, which is no operator here; compile again")


def _at(size: Any, sizes: Mapping[str, int]) -> int:
    if isinstance(size, Extent):
        return size.at(sizes)
    if isinstance(size, dict):
        return Extent(size).at(sizes)
    return size


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
