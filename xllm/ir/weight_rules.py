"""How a weight is made from a checkpoint: rules over its tensors, evaluated on mapped files while weights are packed.

A rule names tensors, never holds them; one item of a stack is evaluated without the others in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xllm.ir import quantised
from xllm.ir.quantised import Scheme, widen


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint; `names` are its keys in order of preference (tied weights have several)."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor computed at compile time, found in `Program.constants`."""

    name: str


@dataclass(frozen=True)
class Concat:
    """Parts joined along one axis."""

    parts: tuple[WeightRule, ...]
    axis: int = 0


@dataclass(frozen=True)
class Shift:
    """`of + by`, elementwise: norms that scale by `1 + weight`."""

    of: WeightRule
    by: float


@dataclass(frozen=True)
class Sum:
    """Parts added, broadcast against each other: a table of positions and the row that every token gets beside it."""

    parts: tuple[WeightRule, ...]


@dataclass(frozen=True)
class Stack:
    """Parts of one shape, side by side along a new first axis: the experts of a layer."""

    parts: tuple[WeightRule, ...]


@dataclass(frozen=True)
class Slice:
    """Indices start, start + step, … below stop of one axis."""

    of: WeightRule
    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Reshape:
    """The same numbers in row-major order under another shape."""

    of: WeightRule
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permute:
    """Axis i of the result is axis `axes[i]` of `of`."""

    of: WeightRule
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Either:
    """The first of several spellings of one weight whose tensors the checkpoint has, all of them: experts are kept
    stacked or one by one.
    """

    options: tuple[WeightRule, ...]


@dataclass(frozen=True)
class Dequantise:
    """(codes - zeros) * scales in float32, of tensors stored as `scheme` says; see `quantised.py`."""

    codes: WeightRule
    scales: WeightRule
    zeros: WeightRule | None
    order: WeightRule | None
    scheme: Scheme

    @property
    def parts(self) -> tuple[WeightRule, ...]:
        return tuple(part for part in (self.codes, self.scales, self.zeros, self.order) if part is not None)


WeightRule = Source | Constant | Concat | Stack | Sum | Shift | Slice | Reshape | Permute | Either | Dequantise


def move_layer(rule: WeightRule, stacks: Sequence[str], to: int) -> WeightRule:
    """The same rule, reading layer `to` of the stack of these names instead of the layer it was captured from."""
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, stacks))})\.\d+\.")

    def moved(name: str) -> str:
        return pattern.sub(lambda m: f"{m.group(1)}{m.group(2)}.{to}.", name, count=1)

    return renamed(rule, lambda names: tuple(map(moved, names)))


def renamed(rule: WeightRule, names_of: Callable[[tuple[str, ...]], tuple[str, ...]]) -> WeightRule:
    """The same rule over other tensors: the names of every source go through `names_of`."""
    return replaced(rule, lambda source: Source(names_of(source.names)))


def replaced(rule: WeightRule, made: Callable[[Source], WeightRule]) -> WeightRule:
    """The same rule with what `made` makes of every source in its place."""
    match rule:
        case Source():
            return made(rule)
        case Concat(parts) | Stack(parts) | Sum(parts):
            return replace(rule, parts=tuple(replaced(part, made) for part in parts))
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            return replace(rule, of=replaced(of, made))
        case Either(options):
            return Either(tuple(replaced(option, made) for option in options))
        case Dequantise():
            held = {name: getattr(rule, name) for name in ("codes", "scales", "zeros", "order")}
            return replace(rule, **{name: replaced(part, made) for name, part in held.items() if part is not None})
    return rule


def rule_leaves(rule: WeightRule) -> Iterator[Source | Constant]:
    """Every checkpoint tensor and every constant a rule reads, in order."""
    match rule:
        case Source() | Constant():
            yield rule
        case Concat(parts) | Stack(parts) | Sum(parts) | Either(parts):
            for part in parts:
                yield from rule_leaves(part)
        case Dequantise():
            for part in rule.parts:
                yield from rule_leaves(part)
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            yield from rule_leaves(of)


def rule_sources(rule: WeightRule) -> Iterator[Source]:
    """Every checkpoint tensor a rule reads, in order."""
    return (leaf for leaf in rule_leaves(rule) if isinstance(leaf, Source))


def resolve(rule: WeightRule, names: Container[str]) -> WeightRule:
    """The rule without `Either`, for a checkpoint that has these names; where no option is whole, the last."""
    match rule:
        case Either(options):
            chosen = [resolve(option, names) for option in options]
            return next((option for option in chosen if not missing(option, names)), chosen[-1])
        case Concat(parts) | Stack(parts) | Sum(parts):
            return replace(rule, parts=tuple(resolve(part, names) for part in parts))
        case Shift(of) | Slice(of) | Reshape(of) | Permute(of):
            return replace(rule, of=resolve(of, names))
    return rule


def missing(rule: WeightRule, names: Container[str]) -> list[str]:
    """The tensors a resolved rule reads and `names` lacks, by their preferred name."""
    return [source.names[0] for source in rule_sources(rule) if not any(name in names for name in source.names)]


def rule_text(rule: WeightRule) -> str:
    """The rule on one line, as `xllm show` prints it and digests cover it."""
    match rule:
        case Source(names):
            return names[0]
        case Constant(name):
            return f"constant {name}"
        case Concat(parts, axis):
            along = f", axis {axis}" if axis else ""
            return "concat(" + ", ".join(rule_text(part) for part in parts) + along + ")"
        case Stack(parts):
            return f"stack({_numbered([rule_text(part) for part in parts])})"
        case Sum(parts):
            return "sum(" + ", ".join(rule_text(part) for part in parts) + ")"
        case Either(options):
            return " or ".join(rule_text(option) for option in options)
        case Dequantise(codes, scheme=scheme):
            blocks = "x".join(map(str, scheme.block))
            return f"dequantise({rule_text(codes)}, {scheme.packing} of {scheme.bits} bits in blocks of {blocks})"
        case Shift(of, by):
            return f"{rule_text(of)} + {by!r}"
        case Slice(of, axis, start, stop, step):
            every = f":{step}" if step != 1 else ""
            return f"{rule_text(of)}[{':, ' * axis}{start}:{stop}{every}]"
        case Reshape(of, shape):
            return f"reshape({rule_text(of)}, {'x'.join(map(str, shape))})"
        case Permute(of, axes):
            return f"permute({rule_text(of)}, {' '.join(map(str, axes))})"


def _numbered(texts: Sequence[str]) -> str:
    """Texts that differ in one number, which counts from 0, as one: a.{0..127}.b."""
    for match in re.finditer(r"(?<![\w])0(?![\w])", texts[0]):
        head, tail = texts[0][: match.start()], texts[0][match.end() :]
        if len(texts) > 1 and list(texts) == [f"{head}{i}{tail}" for i in range(len(texts))]:
            return f"{head}{{0..{len(texts) - 1}}}{tail}"
    return ", ".join(texts)


def evaluate(rule: WeightRule, read: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weight as one array: float32, float16, or bfloat16 as uint16, whatever its sources are.

    `read` maps checkpoint names to arrays of these types. Raises KeyError naming a tensor that is missing.
    """
    match rule:
        case Source(names):
            for name in names:
                if name in read:
                    return read[name]
            raise KeyError(f"the checkpoint has no tensor named {' or '.join(names)}")
        case Constant(name):
            return constants[name]
        case Concat(parts) | Stack(parts):
            arrays = [evaluate(part, read, constants) for part in parts]
            if len({array.dtype for array in arrays}) > 1:
                arrays = [widen(array) for array in arrays]
            return np.concatenate(arrays, axis=rule.axis) if isinstance(rule, Concat) else np.stack(arrays)
        case Sum(parts):
            first, *others = (widen(evaluate(part, read, constants)) for part in parts)
            return sum(others, first)
        case Either():
            return evaluate(resolve(rule, read), read, constants)
        case Dequantise(scheme=scheme):
            return dequantised(rule, read, 0, scheme.shape[0])
        case Slice(Dequantise() as of, 0, start, stop, 1):
            return dequantised(of, read, *slice(start, stop).indices(of.scheme.shape[0])[:2])
        case Shift(of, by):
            return widen(evaluate(of, read, constants)) + np.float32(by)
        case Slice(of, axis, start, stop, step):
            return evaluate(of, read, constants)[(slice(None),) * axis + (slice(start, stop, step),)]
        case Reshape(of, shape):
            return evaluate(of, read, constants).reshape(shape)
        case Permute(of, axes):
            return evaluate(of, read, constants).transpose(axes)


def evaluate_item(
    rule: WeightRule, index: int, read: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]
) -> np.ndarray:
    """`evaluate(rule, …)[index]`, without the other items of a stack in memory. The rule is resolved."""
    match rule:
        case Stack(parts):
            return evaluate(parts[index], read, constants)
        case Slice(of, axis) if axis > 0:
            item = evaluate_item(of, index, read, constants)
            return item[(slice(None),) * (axis - 1) + (slice(rule.start, rule.stop, rule.step),)]
        case Concat(parts, axis) if axis > 0:
            items = [evaluate_item(part, index, read, constants) for part in parts]
            return np.concatenate(items, axis=axis - 1)
        case Permute(of, axes) if axes[0] == 0:
            return evaluate_item(of, index, read, constants).transpose([axis - 1 for axis in axes[1:]])
        case Dequantise():
            return dequantised(rule, read, index, index + 1)[0]
    return evaluate(rule, read, constants)[index]


def dequantised(rule: Dequantise, read: Mapping[str, np.ndarray], start: int, stop: int) -> np.ndarray:
    """Rows start to stop of the result as float32, without the others in memory. `read` gives what is stored."""
    return quantised.values(rule.scheme, stored_parts(rule, read), start, stop)


def stored_parts(rule: Dequantise, read: Mapping[str, np.ndarray]) -> quantised.Parts:
    """The arrays a quantised tensor is made of, as the file has them."""
    held = (rule.codes, rule.scales, rule.zeros, rule.order)
    return quantised.Parts(*(None if part is None else evaluate(part, read, {}) for part in held))  # pyright: ignore
