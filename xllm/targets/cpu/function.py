"""Runs a function artifact on the CPU: each set of sizes that comes is checked and bound once, and kept for the next.

The arena is planned for the largest sizes; a call at smaller ones uses the same places. What native kernels would reach
is checked at the very sizes they then run at. No torch, unless the plan names operators that have no native kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from xllm.artifact import Artifact, ArtifactError
from xllm.kernels import cpu
from xllm.plan import Plan, Port
from xllm.targets.arrays import KINDS, array_at
from xllm.targets.base import Extent
from xllm.targets.cpu.arena import allocate
from xllm.targets.cpu.bounds import check_function
from xllm.targets.cpu.executor import usable_level
from xllm.targets.modules import ModuleCall, kernels_of

MAX_BOUND = 64  # sets of sizes kept bound
Piece = Callable[[], None]


class InputError(ValueError):
    """Inputs that the function does not take: the message names the input and what it should be."""


class CpuFunction:
    """One function artifact, ready to run. Raises ArtifactError when this machine cannot run it."""

    def __init__(
        self,
        artifact: Artifact,
        threads: int,
        *,
        verify: bool = True,
        kernel_modules: Sequence[str] = (),
    ) -> None:
        self._plan = plan = artifact.plan
        self._modules = kernels_of(artifact, kernel_modules)
        self._level, self._threads = usable_level(dict(artifact.manifest["target"])), threads
        (self._bucket,) = plan.buckets
        self.weights = artifact.map_weights(verify, start_threads=threads)
        try:
            check_function(plan, self._bucket.sizes)
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}; compile again") from error
        self._arena, self._address = allocate(plan.arena_bytes)
        self._runner = cpu.Runner(threads, self._level)
        self._bound: dict[tuple[int, ...], tuple[Piece, ...]] = {}
        self._lock = threading.Lock()
        nothing = np.zeros(0, np.int32)
        self._step = cpu.Batch(nothing, nothing, nothing, np.zeros(1, np.int32), np.zeros(0, np.uint64))

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Results by name, arrays of their own. Raises InputError for inputs the function does not take."""
        sizes = sizes_of(self._plan, inputs)
        with self._lock:
            pieces = self._pieces(sizes)
            for name, port in self._plan.inputs.items():
                np.copyto(self._view(port, sizes), inputs[name])
            for piece in pieces:
                piece()
            return {name: self._view(port, sizes).copy() for name, port in self._plan.outputs.items()}

    def close(self) -> None:
        """Ends the threads; a closed function cannot run."""
        with self._lock:
            self._bound.clear()
            self._runner.close()

    def _view(self, port: Port, sizes: Mapping[str, int]) -> np.ndarray:
        dtype = self._plan.buffers[port.buffer].dtype
        return array_at(self._arena, self._bucket.offsets[port.buffer], _shape(port, sizes), dtype)

    def _pieces(self, sizes: dict[str, int]) -> tuple[Piece, ...]:
        key = tuple(sizes.values())
        if key not in self._bound:
            if len(self._bound) == MAX_BOUND:  # the runner keeps what is added to it: a new one forgets
                self._bound.clear()
                self._runner.close()
                self._runner = cpu.Runner(self._threads, self._level)
            self._bound[key] = self._bind(sizes)
        return self._bound[key]

    def _bind(self, sizes: dict[str, int]) -> tuple[Piece, ...]:
        """The calls at these sizes, with addresses in place of names, cut where an operator runs in torch."""
        for name, buffer in self._plan.buffers.items():
            if not 0 <= buffer.bytes.at(sizes) <= buffer.bytes.at(self._bucket.sizes):
                raise InputError(f"at {sizes} the value {name} is larger than planned, or smaller than nothing")
        try:
            check_function(self._plan, sizes)
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}; compile again") from error
        pieces: list[Piece] = []
        native: list[cpu.Call] = []
        for call in self._plan.calls:
            if call.kernel == "torch":
                self._flush(native, pieces)
                pieces.append(self._fallback(call, sizes))
                continue
            if ":" in call.kernel:
                self._flush(native, pieces)
                run = self._modules[call.kernel]
                bound = ModuleCall(call, self._plan, self._bucket, self._arena, self.weights, run)
                pieces.append(partial(bound.run_at, sizes))
                continue
            args = {name: self._place(reference) for name, reference in call.args.items()}
            rows = (0, 0, call.rows.at(sizes))
            native.append(cpu.Call(call.kernel, args, call.ints_at(sizes), call.floats, rows))
        self._flush(native, pieces)
        return tuple(pieces)

    def _flush(self, native: list[cpu.Call], pieces: list[Piece]) -> None:
        if native:
            try:
                number = self._runner.add_plan(native)
            except cpu.KernelError as error:
                raise ArtifactError("artifact-malformed", f"plan.json: {error}; compile again") from error
            pieces.append(lambda: self._runner.run(number, self._step))
            native.clear()

    def _place(self, reference: str) -> int | None:
        kind, name = reference[:1], reference[1:]
        if kind == "%":
            return self._address + self._bucket.offsets[name]
        return self.weights.address + self._plan.weights[name].offset if kind == "@" else None

    def _fallback(self, call: object, sizes: dict[str, int]) -> Piece:
        from xllm.targets.fallback import TorchCall

        bound = TorchCall(call, self._plan, self._bucket, self._arena, self.weights)  # pyright: ignore
        return lambda: bound.run_at(sizes)


def sizes_of(plan: Plan, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The size of every dim, as the inputs show it. Raises InputError for a name, type or shape that does not fit."""
    if unknown := sorted(set(inputs) ^ set(plan.inputs)):
        raise InputError(
            f"the function takes {', '.join(plan.inputs) or 'nothing'}; unknown or missing: {unknown[0]!r}"
        )
    limits = plan.buckets[0].sizes
    sizes: dict[str, int] = {}
    for name, port in plan.inputs.items():
        array, dtype = inputs[name], plan.buffers[port.buffer].dtype
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(KINDS[dtype]):
            raise InputError(f"input {name!r} is {getattr(array, 'dtype', type(array).__name__)}, not {dtype}")
        if array.ndim != len(port.shape):
            raise InputError(f"input {name!r} has {array.ndim} dimensions, not {len(port.shape)}")
        for held, wanted in zip(array.shape, port.shape, strict=True):
            if isinstance(wanted, Extent) and (dim := _plain(wanted)):
                if sizes.setdefault(dim, held) != held:
                    raise InputError(f"input {name!r}: {dim} is {held} here and {sizes[dim]} elsewhere")
                if held > limits[dim]:
                    raise InputError(f"{dim} is {held}, compiled for at most {limits[dim]}")
    if missing := sorted(set(limits) - set(sizes)):
        raise InputError(f"no input shows the size of {missing[0]}")
    for name, port in plan.inputs.items():
        if (wanted := _shape(port, sizes)) != inputs[name].shape:
            raise InputError(f"input {name!r} is {inputs[name].shape}, not {wanted}")
    return {dim: sizes[dim] for dim in limits}


def _plain(extent: Extent) -> str:
    """The dim an extent is, empty for a sum or a product."""
    ((dim, factor), *more) = extent.terms.items() if extent.terms else [("", 0)]
    return dim if factor == 1 and not more and "*" not in dim else ""


def _shape(port: Port, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size.at(sizes) if isinstance(size, Extent) else size for size in port.shape)
