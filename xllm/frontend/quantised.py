"""Quantised tensors of a checkpoint, found by their names and bound into the rules of a program.

A module's plain weight stays what the rules ask for; where the checkpoint keeps its codes and scales instead, the rule
becomes one that makes it of them. Shapes and types decide what a tensor is, and must be one of the formats that the
configuration names: headers are untrusted, and nothing is allocated by them before they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from xllm.errors import CompileError
from xllm.frontend.formats import PLAIN, Format, refused
from xllm.frontend.weights import Checkpoint
from xllm.ir.program import Program, Weight
from xllm.ir.quantised import TRANSPOSED, Scheme
from xllm.ir.weight_rules import Dequantise, Reshape, Source, WeightRule, replaced, resolve

_FLOATS = ("float32", "float16", "bfloat16")
_SCALES = ("_scale", "_scale_inv")  # both multiply: the second is the inverse of what divided


class Quantised:
    """The quantised tensors of a checkpoint, by the name of the plain tensor that each stands for.

    read: tensors that were read to bind others, or that mean nothing beside them, and are in no rule.
    """

    def __init__(self, checkpoint: Checkpoint, formats: Sequence[Format]) -> None:
        self._checkpoint = checkpoint
        self._formats = formats
        self._codes = dict(_codes(checkpoint)) if formats else {}
        self.dtypes = {"bfloat16"} if self._codes else set()  # what plain numbers are kept as, unless another is asked
        self._made: dict[str, tuple[Format, Dequantise]] = {}
        self.read: set[str] = set()

    def bound(self, program: Program) -> Program:
        """The program with rules for this checkpoint, and notes on what it dequantises. Raises CompileError naming a
        tensor that is not what the configuration says, before its data are read.
        """
        if not self._formats:
            return program
        names = {*self._checkpoint, *self._codes}
        bound = program.copy()
        for name, weight in program.weights.items():
            bound.weights[name] = Weight(weight.shape, replaced(resolve(weight.rule, names), self._bound))
        counts = Counter(held.text for held, _ in self._made.values())
        bound.notes += tuple(f"{count} weights dequantised from {text}" for text, count in sorted(counts.items()))
        return bound

    def _bound(self, source: Source) -> WeightRule:
        for name in source.names:
            if name in self._codes:
                if name not in self._made:
                    self._made[name] = self._made_of(name, self._codes[name])
                return self._made[name][1]
            if name in self._checkpoint:
                if any(f"{name}{suffix}" in self._checkpoint for suffix in _SCALES):
                    raise refused(f"and {name!r} has scales, but is not stored as quantised", where=name)
                return source
        return source

    def _made_of(self, name: str, codes: str) -> tuple[Format, Dequantise]:
        """The first format of the configuration that the tensors have, and the rule that makes numbers of them."""
        scales, zeros, order, shape = self._beside(name, codes)
        for held in sorted(self._formats, key=lambda held: held.symmetric):
            scheme = self._scheme(held, codes, scales, zeros, shape)
            if scheme is None or (held.ordered and order is None):
                continue
            unread = {shape, zeros if held.symmetric else None}
            if order is not None and not self._reorders(order, scheme):
                unread.add(order)
                order = None
            self.read.update(part for part in unread if part is not None)
            _, scale_shape, zero_shape = _shapes(scheme)
            return replace(held, ordered=order is not None), Dequantise(
                codes=Source((codes,)),
                scales=self._shaped(scales, scale_shape),
                zeros=None if zeros is None or held.symmetric else self._shaped(zeros, zero_shape),
                order=None if order is None else Source((order,)),
                scheme=scheme,
            )
        parts = ", ".join(
            f"{part} {self._checkpoint.dtype(part)} {list(self._checkpoint.shape(part))}"
            for part in (codes, scales, zeros, order)
            if part is not None
        )
        said = " or ".join(dict.fromkeys(held.text for held in self._formats))
        raise CompileError(
            f"the tensors of {name!r} are not {said}, as the configuration says: {parts}",
            code="quantised-checkpoint",
            pass_name="weights",
            where=name,
            try_=f"the config.json that belongs to these weights, or {PLAIN}",
        )

    def _beside(self, name: str, codes: str) -> tuple[str, str | None, str | None, str | None]:
        """Scales, zeros, order of columns and shape that lie beside codes. Raises CompileError without scales."""
        if codes.endswith(".qweight"):
            stem = codes.removesuffix("qweight")
            scales, rest = [f"{stem}scales"], (f"{stem}qzeros", f"{stem}g_idx", "")
        else:
            scales = [name + suffix for suffix in _SCALES]
            rest = (f"{name}_zero_point", f"{name}_g_idx", f"{name}_shape")
        found = next((part for part in scales if part in self._checkpoint), None)
        if found is None:
            raise CompileError(
                f"the checkpoint has {codes!r} without {' or '.join(map(repr, scales))}",
                code="missing-tensor",
                pass_name="weights",
                where=codes,
                try_="a complete download",
            )
        zeros, order, shape = (part if part in self._checkpoint else None for part in rest)
        return found, zeros, order, shape

    def _scheme(self, held: Format, codes: str, scales: str, zeros: str | None, said: str | None) -> Scheme | None:
        """The scheme, if headers have the types and shapes of this format; None otherwise."""
        kind, found = self._checkpoint.dtype, self._checkpoint.shape
        stored = {"int8": "I8", "float8": "F8_E4M3"}.get(held.packing, "I32")
        floats = (*_FLOATS, "F8_E8M0") if held.packing == "float8" else _FLOATS
        made = self._shape_of(held, found(codes), said)
        if kind(codes) != stored or kind(scales) not in floats or made is None:
            return None
        # A block larger than the matrix is all of it: nobody makes room for what a file says beyond that.
        block = min(held.rows or made[-2], made[-2]), min(held.columns or made[-1], made[-1])
        scheme = Scheme(held.packing, held.bits, made, block)
        code_shape, scale_shape, zero_shape = _shapes(scheme)
        if found(codes) != code_shape or _without_ones(found(scales)) != _without_ones(scale_shape):
            return None
        if held.symmetric:
            return scheme
        stored = "I8" if held.packing == "int8" else "I32"
        fits = zeros is not None and kind(zeros) == stored and _without_ones(found(zeros)) == _without_ones(zero_shape)
        return scheme if fits else None

    def _shape_of(self, held: Format, codes: tuple[int, ...], said: str | None) -> tuple[int, ...] | None:
        """The shape of the numbers, from that of their codes, or where these may be padded from a tensor that says it:
        a matrix, or matrices where these are not kept transposed.
        """
        made, per = codes, 32 // held.bits
        if held.packing in TRANSPOSED:
            if len(codes) != 2:
                return None
            made = (codes[1] * per, codes[0]) if held.packing == "awq" else (codes[1], codes[0] * per)
        elif held.packing == "packed":
            if said is None or self._checkpoint.dtype(said) not in ("I64", "I32"):
                return None
            if self._checkpoint.shape(said) not in ((2,), (3,)):
                return None
            made = tuple(int(size) for size in self._checkpoint.raw(said))
        return made if len(made) in (2, 3) and min(made) > 0 else None

    def _shaped(self, name: str, shape: tuple[int, ...]) -> WeightRule:
        """Scales or zeros as the scheme has them: those of whole rows or tensors come with fewer dimensions."""
        source = Source((name,))
        return source if self._checkpoint.shape(name) == shape else Reshape(source, shape)

    def _reorders(self, order: str, scheme: Scheme) -> bool:
        """Whether columns are in other groups than their places say. Raises CompileError where one is in none."""
        columns = scheme.shape[-1]
        groups = -(-columns // scheme.block[1])
        if self._checkpoint.dtype(order) != "I32" or self._checkpoint.shape(order) != (columns,):
            raise refused(f"and {order!r} is not int32 [{columns}], a group for each column", where=order)
        found = self._checkpoint.raw(order)
        if found.min() < 0 or found.max() >= groups:
            raise refused(f"and {order!r} names groups that are none of the {groups}", where=order)
        return bool((found != np.arange(columns) // scheme.block[1]).any())


def _shapes(scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What shapes codes, scales and zeros of a scheme have, see `Scheme`."""
    *lead, rows, columns = scheme.shape
    down, groups, per = -(-rows // scheme.block[0]), -(-columns // scheme.block[1]), 32 // scheme.bits
    match scheme.packing:
        case "gptq" | "gptq_v2":
            return (columns // per, rows), (groups, rows), (groups, -(-rows // per))
        case "awq":
            return (columns, rows // per), (groups, rows), (groups, rows // per)
        case "packed":
            return (*lead, rows, -(-columns // per)), (*lead, down, groups), (*lead, -(-rows // per), groups)
    return scheme.shape, (*lead, down, groups), (*lead, down, groups)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _codes(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Plain name and name of the codes of every tensor that is kept as such."""
    for name in checkpoint:
        kind = checkpoint.dtype(name)
        if name.endswith(".qweight"):
            yield name.removesuffix("qweight") + "weight", name
        elif name.endswith("_packed"):
            yield name.removesuffix("_packed"), name
        elif kind == "F8_E4M3" or (kind == "I8" and f"{name}_scale" in checkpoint):
            yield name, name
