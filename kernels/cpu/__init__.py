"""The native CPU library: levels, the kernel table, weight packing, and the runner that walks bound plans.

Everything that can be checked is checked when a plan is added; `Runner.run` is one native call that releases the GIL.
Which kernels exist, and what their arguments are called, is asked of the library: there is one table, in C++.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ._library import CBatch, CCall, library
from .errors import KernelError
from .packing import pack_grid, pack_panels, packed_bytes, quantised, rows_bytes

if TYPE_CHECKING:
    from .sampling import Draw

_INPUTS = {"ids": 2, "positions": 3, "last": 4}
_ADDRESS_END = 1 << 64
CHECKED_BYTES = 1 << 20  # a block of a checksum
TOKENS, LOGIT_ROWS = (1, 0, 0), (0, 1, 0)


@dataclass(frozen=True)
class Arg:
    name: str
    optional: bool


@dataclass(frozen=True)
class KernelInfo:
    name: str
    args: tuple[Arg, ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a plan. An argument is an address, an input of the step by name, or None where that is allowed.

    rows: how many, as factors of T and S and a constant.
    """

    kernel: str
    args: Mapping[str, int | str | None]
    ints: Mapping[str, int] = field(default_factory=dict)
    floats: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[int, int, int] = TOKENS


class Batch:
    """One step: int32 `ids`[T], `positions`[T], `last`[S], `seq_start`[N+1]; uint64 `seq_kv`[N], addresses of KV spans.

    Rows of one sequence are consecutive positions; spans are aligned to 64 bytes. A negative id -1-r takes
    `prev_tokens[r]` (int32) when the step begins. The arrays are kept alive and must not change while a step runs.
    """

    __slots__ = ("_c", "_keep")

    def __init__(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        seq_start: np.ndarray,
        seq_kv: np.ndarray,
        prev_tokens: np.ndarray | None = None,
    ) -> None:
        rows, sequences = len(ids), len(seq_kv)
        self._keep = (ids, positions, last, seq_start, seq_kv, prev_tokens)
        self._c = CBatch(
            rows,
            len(last),
            sequences,
            _address("ids", ids, np.int32),
            _address("positions", positions, np.int32, rows),
            _address("last", last, np.int32),
            _address("seq_start", seq_start, np.int32, sequences + 1),
            _address("seq_kv", seq_kv, np.uint64),
            None if prev_tokens is None else _address("prev_tokens", prev_tokens, np.int32),
        )
        lowest = int(ids.min()) if rows else 0
        if lowest < 0 and (prev_tokens is None or -1 - lowest >= len(prev_tokens)):
            raise KernelError(f"batch: ids refer to row {-1 - lowest} of prev_tokens, which has no such row")


class Runner:
    """A pool of `threads` threads (the caller of `run` is one) and the plans added to it. One step runs at a time."""

    def __init__(self, threads: int, level: str | None = None) -> None:
        self.threads, self.level = threads, level or globals()["level"]()
        self._handle = library().xk_runner_new(threads, self.level.encode())
        if not self._handle:
            raise KernelError(_last_error())

    @property
    def pool(self) -> int:
        """Address of the native thread pool, for other native parts that share it."""
        return library().xk_runner_pool(self._open())

    def add_plan(self, calls: Sequence[Call]) -> int:
        """Binds the calls and returns the plan's number. Addresses must stay valid while the plan is run."""
        bound = (CCall * max(len(calls), 1))()
        for i, call in enumerate(calls):
            _bind(bound[i], call, f"call {i}, kernel {call.kernel}")
        plan = library().xk_plan_add(self._open(), len(calls), bound)
        if plan < 0:
            raise KernelError(_last_error())
        return plan

    def run(self, plan: int, batch: Batch, begin: int = 0, end: int | None = None, draw: Draw | None = None) -> None:
        """Runs calls begin..end-1 of the plan on one step, in order, and draws from the rows they leave."""
        self._run(plan, batch, begin, end, None, draw)

    def timed(self, plan: int, batch: Batch, begin: int, end: int, draw: Draw | None = None) -> np.ndarray:
        """As `run`; seconds of each call, float64 [end - begin]: from the end of the call before it to its own end."""
        seconds = np.zeros(end - begin)
        self._run(plan, batch, begin, end, seconds.ctypes.data, draw)
        return seconds

    def _run(
        self, plan: int, batch: Batch, begin: int, end: int | None, seconds: int | None, draw: Draw | None
    ) -> None:
        handle, stop = self._handle or self._open(), -1 if end is None else end
        drawing = None if draw is None else draw.address
        status = library().xk_run(handle, plan, ctypes.byref(batch._c), begin, stop, seconds, drawing)
        if status < 0:
            raise KernelError(_last_error())
        if draw is not None:
            draw.check(status)

    def read_bandwidth(self, size: int = 256 << 20, repeats: int = 5) -> float:
        """Bytes per second that all threads together read from memory (best of `repeats` over `size` bytes)."""
        return library().xk_measure_read(self._open(), size, repeats)

    def fma_peak(self, rounds: int = 200_000, repeats: int = 5) -> float:
        """Float32 operations per second of all threads together, a multiply-add counting as two (best of `repeats`)."""
        return library().xk_measure_fma(self._open(), rounds, repeats)

    def close(self) -> None:
        """Ends the threads. Later calls raise."""
        handle, self._handle = self._handle, None
        if handle:
            library().xk_runner_free(handle)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _open(self) -> int:
        if not self._handle:
            raise KernelError("the runner is closed")
        return self._handle


@cache
def levels() -> tuple[str, ...]:
    """Instruction set levels that are compiled in and run on this CPU, best last."""
    return tuple(library().xk_levels().decode().split())


def level() -> str:
    """The best level of this CPU: "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx" or
    "aarch64"."""
    if not levels():
        raise KernelError("this CPU is older than x86-64-v2 (SSE4.2, popcnt), the least that the kernels are built for")
    return levels()[-1]


@cache
def kernels() -> dict[str, KernelInfo]:
    """Every kernel by name, with the names of its arguments, ints and floats in binding order."""
    table = {}
    for line in library().xk_describe().decode().splitlines():
        name, args, ints, floats = line.split("|")
        parsed = tuple(Arg(a.rstrip("?"), a.endswith("?")) for a in args.split())
        table[name] = KernelInfo(name, parsed, tuple(ints.split()), tuple(floats.split()))
    return table


def checksum(data: np.ndarray, threads: int) -> np.ndarray:
    """uint32 [ceil(bytes / 2^20), 64]: the checksum of each block of 1 MiB of uint8 `data`, as fast as memory is read.

    Finds accidents: one changed word always changes it, several by all but one in 2^32 in each lane they touch. It is
    no protection against somebody who wants equal sums.
    """
    out = np.empty((-(-len(data) // CHECKED_BYTES), 64), np.uint32)
    if library().xk_checksum(data.ctypes.data, len(data), threads, out.ctypes.data):
        raise KernelError(_last_error())
    return out


def _bind(bound: CCall, call: Call, where: str) -> None:
    info = kernels().get(call.kernel)
    if info is None:
        raise KernelError(f"{where}: no such kernel; there are {', '.join(sorted(kernels()))}")
    _same_names(where, "argument", call.args, [a.name for a in info.args], [a.name for a in info.args if a.optional])
    _same_names(where, "int", call.ints, info.ints)
    _same_names(where, "float", call.floats, info.floats)
    bound.kernel, bound.rows[:] = call.kernel.encode(), call.rows
    for i, arg in enumerate(info.args):
        value = call.args.get(arg.name)
        if isinstance(value, str):
            if value not in _INPUTS:
                raise KernelError(
                    f"{where}: argument {arg.name}: no input is called {value!r}; there are {', '.join(_INPUTS)}"
                )
            bound.args[i].kind = _INPUTS[value]
        elif value is not None:
            if not 0 <= int(value) < _ADDRESS_END:
                raise KernelError(f"{where}: argument {arg.name}: {value} is no address")
            bound.args[i].kind, bound.args[i].address = 1, int(value)
    for i, name in enumerate(info.ints):
        value = int(call.ints[name])
        if not -(1 << 63) <= value < 1 << 63:
            raise KernelError(f"{where}: int {name} is {value}, which 64 bits do not hold")
        bound.ints[i] = value
    for i, name in enumerate(info.floats):
        bound.floats[i] = float(call.floats[name])


def _same_names(
    where: str, kind: str, given: Mapping[str, object], known: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if unknown := [name for name in given if name not in known]:
        raise KernelError(f"{where}: unknown {kind} {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    if missing := [name for name in known if name not in given and name not in optional]:
        raise KernelError(f"{where}: {kind} {', '.join(missing)} is missing")


def _address(name: str, array: np.ndarray, dtype: type, size: int | None = None) -> int:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise KernelError(
            f"batch: {name} must be a contiguous {np.dtype(dtype).name} vector, not {array.dtype}{list(array.shape)}"
        )
    if size is not None and len(array) != size:
        raise KernelError(f"batch: {name} has {len(array)} entries, not {size}")
    return array.ctypes.data


def _last_error() -> str:
    return library().xk_error().decode()


__all__ = [
    "CHECKED_BYTES",
    "LOGIT_ROWS",
    "TOKENS",
    "Arg",
    "Batch",
    "Call",
    "KernelError",
    "KernelInfo",
    "Runner",
    "kernels",
    "level",
    "levels",
    "pack_grid",
    "pack_panels",
    "packed_bytes",
    "quantised",
    "rows_bytes",
]
