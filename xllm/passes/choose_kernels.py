"""Chooses a provider for every operation: a kernel of the target, or the operator's torch body, with the reason.

Adds `plans["kernels"]`: node name -> Choice, and `plans["kv"]`: the layout of the state. Views and tuple elements cost
nothing and need no kernel. An operation on the state has no torch fallback (its state lives in the target's layout):
there a missing kernel is a CompileError.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import ClassVar, Literal

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.ir.effects import effects, is_symbolic, operator_of, runs_alone
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.operations import Reader, bytes_of, is_alias
from xllm.targets.base import (
    LOGIT_ROWS,
    Cost,
    Extent,
    KVLayout,
    LayerState,
    Layout,
    Lowering,
    Operation,
    Refusal,
    Tensor,
)


@dataclass(frozen=True)
class Choice:
    """provider: a kernel module, "cpu" (or another target), or "torch"; `refused` are those asked before, and why."""

    provider: str
    operation: Operation
    lowering: Lowering
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def why(self) -> str:
        """What the last provider asked before this one refused; empty when the first took it."""
        return self.refused[-1][1] if self.refused else ""


@dataclass(frozen=True)
class ChooseKernels(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "plan"

    def run(self, program: Program, context: Context) -> Outcome:
        reader, target = Reader(program), context.target
        kv = target.kv_layout(tuple(LayerState(*astuple(layer)) for layer in program.kv), context.kv_dtype)
        states = program.states()
        choices: dict[str, Choice] = {}
        misses = []
        for node in program.calls():
            if is_alias(node) or is_symbolic(node):
                continue
            operation = reader.operation(node)
            choice = self._asked(operation, kv, context, program.is_function)
            choices[node.name] = choice
            if choice.provider != "torch":
                continue
            touched = effects(node, states)
            if touched.reads or touched.writes:
                raise CompileError(
                    f"{operation.op} works on the state and {target.name} has no kernel for it: {choice.why}",
                    code="no-kernel",
                    pass_name=self.name(),
                    node=node.name,
                    where=operation.path,
                    try_="another --kv dtype or target",
                )
            found = operator_of(node)
            if found is None or not runs_alone(found):
                raise CompileError(
                    f"{operation.op} has no kernel ({choice.why}), and its torch body may not be called by an artifact",
                    code="no-kernel",
                    pass_name=self.name(),
                    node=node.name,
                    where=operation.path,
                    try_="a kernel module for it (--kernel-module)",
                )
            misses.append((node.name, f"{operation.op} runs its torch body: {choice.why}"))
        program.plans["kernels"] = choices
        program.plans["kv"] = kv
        hits = tuple(name for name, choice in choices.items() if choice.provider != "torch")
        return Outcome(program, hits, tuple(misses))

    @staticmethod
    def _asked(operation: Operation, kv: KVLayout, context: Context, function: bool) -> Choice:
        """Kernel modules in the order named, then the target, then torch. What a kernel leaves out of its cost is
        counted as the bytes in and out."""
        refused: list[tuple[str, str]] = []
        weights = (_is_head(operation) and context.head_dtype) or context.weights_dtype
        target = context.target
        for provider in (*context.providers, target):
            if provider is target:
                answer = target.lower(operation, kv, weights, context.activations)
            else:
                answer = provider.lower(operation, kv, weights)
            if isinstance(answer, Lowering) and not function and (answer.extents or not _linear(answer.rows)):
                answer = Refusal("its sizes or strides depend on more than one dim, as they may in functions only")
            if isinstance(answer, Lowering):
                if answer.cost == Cost():
                    answer = replace(answer, cost=fallback(operation).cost)
                return Choice(provider.name, operation, answer, tuple(refused))
            if answer is not None:
                refused.append((provider.name, answer.why))
        return Choice("torch", operation, fallback(operation), tuple(refused))


def _is_head(operation: Operation) -> bool:
    """Whether an operation embeds tokens, or multiplies only the rows whose logits are wanted."""
    looks_up = operation.op == "xllm.embedding" and operation.args["ids"].kind == "input"
    return looks_up or (
        operation.op in ("xllm.linear", "xllm.gated_linear") and operation.results[0].rows == LOGIT_ROWS
    )


def _linear(rows: Extent) -> bool:
    return not any("*" in name for name in rows.terms)


def fallback(operation: Operation) -> Lowering:
    """The torch provider: weights stored row-major in float32, cost counted as bytes in and out."""
    tensors = [value for value in _flat(list(operation.args.values())) if isinstance(value, Tensor)]
    layouts = {tensor.name: Layout("plain", "float32") for tensor in tensors if tensor.kind == "weight"}
    moved = Extent()
    for tensor in (*tensors, *operation.results):
        size = bytes_of(tensor)
        moved = moved.plus(size)
    return Lowering("torch", {}, layouts=layouts, cost=Cost(bytes=moved))


def _flat(values: list[object]) -> list[object]:
    return [item for value in values for item in (_flat(value) if isinstance(value, list) else [value])]
