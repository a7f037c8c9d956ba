"""Writes down what the plans decided: the Plan the runtime executes. Chooses nothing itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.ir.dialect.encode import WHOLE_SEQUENCE
from xllm.passes.choose_kernels import Choice
from xllm.passes.operations import Reader, bytes_of
from xllm.passes.schedule_streams import Schedule
from xllm.plan import Bucket, Buffer, Call, Plan, Port, StoredWeight
from xllm.targets.base import Extent, Layout, Tensor

_SIGILS = {"value": "%", "weight": "@", "input": "$"}


def emit_plan(program: Program) -> Plan:
    """Needs the plans of every PLAN pass. Weights have their layout here, their place in a file with the artifact."""
    choices: dict[str, Choice] = program.plans["kernels"]
    schedule: Schedule = program.plans["streams"]
    place = {name: index for index, name in enumerate(schedule.order)}
    stored = _stored_weights(program, choices)
    calls = tuple(
        _call(
            choices[name], schedule.stream[name], tuple(place[other] for other in schedule.waits.get(name, ())), stored
        )
        for name in schedule.order
    )
    buffers = {
        result.name: Buffer(bytes_of(result), result.dtype, result.shape)
        for choice in choices.values()
        for result in (*choice.operation.results, *choice.lowering.scratch)
    }
    buckets = tuple(Bucket(arena.sizes, arena.bytes, dict(arena.offsets)) for arena in program.plans["memory"])
    used = tuple(dict.fromkeys(schedule.stream[name] for name in schedule.order)) or ("compute",)
    reader = Reader(program)
    if not program.is_function:
        logits = reader.owner(program.output().all_input_nodes[0])
        return Plan(calls, buffers, buckets, stored, program.plans["kv"], logits, used)
    inputs = {str(node.target): _port(reader.tensor(node)) for node in program.inputs()}
    given = [reader.tensor(node) for node in program.inputs()]
    buffers |= {tensor.name: Buffer(bytes_of(tensor), tensor.dtype, tensor.shape) for tensor in given}
    results: Any = program.output().args[0]
    outputs = {name: _port(reader.tensor(node)) for name, node in zip(program.outputs, results, strict=True)}
    return Plan(calls, buffers, buckets, stored, program.plans["kv"], "", used, inputs, outputs)


def _port(tensor: Tensor) -> Port:
    return Port(tensor.name, tensor.shape)


def emit_task(program: Program) -> dict[str, Any]:
    """What a step gives, for the manifest: the task, the width of its rows, whether a sequence must lie in one step."""
    if program.task.kind == "generate":
        return {"kind": "generate"}
    called = {getattr(node.target, "_opname", "") for node in program.calls()}
    width = int(program.output().all_input_nodes[0].meta["val"].shape[1])
    whole = not called.isdisjoint(WHOLE_SEQUENCE)
    return {**asdict(program.task), "labels": list(program.task.labels), "width": width, "whole_sequences": whole}


def reach(program: Program, task: Mapping[str, Any], asked: int | None = None) -> int:
    """Tokens a sequence may have: those its state and tables have room for, and a step where one must hold it all.
    Raises CompileError where the tables end before the `asked` positions.
    """
    held = int(program.input("kv").meta["val"].shape[2])
    if asked is not None and held < asked:
        raise CompileError(
            f"max_len {asked} is beyond the {held} positions that the model learned",
            code="bad-option",
            try_=f"--max-len {held} or less",
        )
    return min(held, next(dim.max for dim in program.dims if dim.name == "T")) if task.get("whole_sequences") else held


def _stored_weights(program: Program, choices: dict[str, Choice]) -> dict[str, StoredWeight]:
    """One entry per weight and layout: a weight that two kernels want differently is stored twice, under two names."""
    layouts: dict[str, list[Layout]] = {}
    for choice in choices.values():
        for name, layout in choice.lowering.layouts.items():
            held = layouts.setdefault(name, [])
            if layout not in held:
                held.append(layout)
    return {
        stored_name(name, layout, held): StoredWeight(name, program.weights[name].shape, layout)
        for name, held in sorted(layouts.items())
        for layout in held
    }


def stored_name(name: str, layout: Layout, held: list[Layout]) -> str:
    return name if layout == held[0] else f"{name}#{layout.form}.{layout.dtype}"


def _call(choice: Choice, stream: str, after: tuple[int, ...], stored: dict[str, StoredWeight]) -> Call:
    op, low = choice.operation, choice.lowering

    def reference(tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        if tensor.kind == "weight":
            wanted = low.layouts[tensor.name]
            found = (key for key, held in stored.items() if held.name == tensor.name and held.layout == wanted)
            return "@" + next(found)
        return _SIGILS[tensor.kind] + tensor.name

    def operand(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"ref": reference(value), "shape": [_size(size) for size in value.shape], "dtype": value.dtype}
        if isinstance(value, Extent):
            return {"size": _size(value)}
        if isinstance(value, list):
            return {"list": [operand(item) for item in value]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}  # JSON has no word for it
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, torch.device):
            return {"value": "cpu"}  # captured on `meta`, which means wherever the program runs
        return {"torch": str(value).removeprefix("torch.")}

    results = tuple("%" + result.name for result in (*op.results, *low.scratch))
    common = {"node": op.node, "op": op.op, "stream": stream, "after": after, "cost": low.cost, "results": results}
    if choice.provider == "torch":
        operands = tuple((name, operand(value)) for name, value in op.args.items())
        return Call(kernel="torch", operands=operands, rows=Extent(), **common)
    if ":" in low.kernel:  # of a module: arrays, so shapes and dtypes go along
        operands = tuple((name, operand(tensor)) for name, tensor in low.args.items())
        sizes = {"ints": dict(low.ints), "floats": dict(low.floats)}
        return Call(kernel=low.kernel, operands=operands, rows=Extent(), **sizes, **common)
    args = {name: reference(tensor) for name, tensor in low.args.items()}
    numbers = {"ints": dict(low.ints), "extents": dict(low.extents), "floats": dict(low.floats)}
    return Call(kernel=low.kernel, args=args, rows=low.rows, **numbers, **common)


def _size(size: int | Extent) -> Any:
    return size if isinstance(size, int) else dict(size.terms)
