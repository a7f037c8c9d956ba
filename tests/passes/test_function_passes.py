"""What the rewrites of functions fire on, what they leave alone and why, in functions built by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.passes.zoo import CONTEXT
from xllm.frontend.onnx_build import Builder, Value
from xllm.ir import Program, Source
from xllm.ir.interpret import bind, run_function
from xllm.passes import Pass, run_pipeline
from xllm.passes.fold_indices import FoldIndices
from xllm.passes.fold_weights import FoldWeights
from xllm.passes.fuse_activation import FuseActivation
from xllm.passes.fuse_rope import FuseRope
from xllm.passes.fuse_sdpa import FuseSdpa
from xllm.passes.numerics import difference

aten = torch.ops.aten
xllm = torch.ops.xllm
META = torch.device("meta")
SIZES = {"b": 2, "s": 5, "p": 3}
Body = Callable[["Function"], Value]


class Function(Builder):
    """A function of inputs whose dims are b, s and p."""

    def __init__(self) -> None:
        super().__init__("small", {}, dict.fromkeys(SIZES, 16))  # pyright: ignore[reportArgumentType]
        self.given: dict[str, torch.Tensor] = {}
        self.stored: dict[str, np.ndarray] = {}

    def take(self, name: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> Value:
        real = [SIZES[size] if isinstance(size, str) else size for size in shape]
        torch.manual_seed(len(self.given))
        self.given[name] = torch.randn(real) if dtype.is_floating_point else torch.rand(real) < 0.6
        return self.input(name, dtype, tuple(self.dim(size) if isinstance(size, str) else size for size in shape))

    def hold(self, name: str, *shape: int) -> Value:
        self.stored[name] = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
        return Value(torch.float32, shape, self.weight(name, shape, Source((name,))))

    def count(self, stop: Any, *shape: Any, start: Any = 0) -> Value:
        made = self.emit(aten.arange.start, start, stop, dtype=torch.int64, device=META)
        return self.reshape(made, shape) if shape else made

    def number(self, value: float) -> Value:
        return Value(torch.float32, (), self.constant(np.array(value, np.float32)))

    def done(self, result: Value) -> Program:
        node = self.program.graph.output((self.node(result),))
        node.meta = {"val": (self.node(result).meta["val"],), "custom": {"path": "", "layer": None}}
        self.program.outputs = ("y",)
        return self.program


def run(step: Pass, body: Body) -> tuple[Program, int, list[str]]:
    """The program after the pass (checked against the one before), how often it hit, and why it missed."""
    b = Function()
    program = b.done(body(b))
    after, (record,) = run_pipeline(program, [step], CONTEXT)
    old, new = (run_function(one, b.given, bind(one, b.stored))["y"] for one in (program, after))
    assert old.dtype == new.dtype and difference(old.float(), new.float()) <= 1e-5
    return after, record.hits, [why for _, why in record.misses]


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.calls() if isinstance(node.meta["val"], torch.Tensor)]


# --- fold-weights -----------------------------------------------------------------------------------------------------


def cut_product(b: Function, bias: tuple[int, ...] = (6,), escapes: bool = False, own: bool = False) -> Value:
    x = b.take("x", "b", "s", 4)
    weight = b.emit(aten.permute.default, b.emit(aten.slice.Tensor, b.hold("w", 18, 4), 0, 6, 12), [1, 0])
    made = b.emit(aten.matmul.default, x, weight)
    if own:
        made = b.emit(xllm.linear.default, x, b.hold("v", 6, 4), b.hold("c", 6))
    total = b.emit(aten.add.Tensor, made, b.hold("bias", *bias))
    return b.emit(aten.mul.Tensor, total, made) if escapes else total


def test_cuts_and_biases_of_weights_fold() -> None:
    after, hits, misses = run(FoldWeights(), cut_product)
    assert (operators(after), misses) == (["xllm.linear.default"], []) and hits == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [({"escapes": True}, "read without the sum too"), ({"own": True}, "has a bias already"), ({"bias": (1, 6)}, "")],
    ids=["escapes", "two biases", "a bias of two dims"],
)
def test_sums_that_are_no_bias(options: dict[str, Any], why: str) -> None:
    after, _, misses = run(FoldWeights(), lambda b: cut_product(b, **options))
    assert "aten.add.Tensor" in operators(after)
    assert (why in misses[0]) if why else not misses


# --- fold-indices -----------------------------------------------------------------------------------------------------


def picked(b: Function) -> Value:
    """mask[rows, columns] as exporters spell it: indices side by side, then apart."""
    batch, seq, mask = b.dim("b"), b.dim("s"), b.take("mask", "b", "s", dtype=torch.bool)
    rows = b.emit(aten.expand.default, b.count(batch, batch, 1, 1, 1, 1), [batch, 1, 1, seq, 1])
    columns = b.emit(aten.expand.default, b.count(seq, 1, 1, 1, seq, 1), [batch, 1, 1, seq, 1])
    pairs = b.emit(aten.cat.default, [rows, columns], -1)
    parts = [b.emit(aten.slice.Tensor, pairs, -1, at, at + 1) for at in range(2)]
    return b.emit(aten.index.Tensor, mask, [b.reshape(part, [batch, 1, 1, seq]) for part in parts])


def test_picking_by_counts_is_the_value() -> None:
    after, hits, misses = run(FoldIndices(), picked)
    assert (operators(after), hits, misses) == (["aten.reshape.default"], 3, [])


def test_what_always_holds_is_no_condition() -> None:
    def body(b: Function, least: int = 0) -> Value:
        seq, mask = b.dim("s"), b.take("mask", "b", 1, 1, "s", dtype=torch.bool)
        sure = b.emit(aten.ge.Scalar, b.count(seq, 1, 1, seq, 1), least)
        return b.emit(aten.logical_and.default, sure, mask)

    after, hits, _ = run(FoldIndices(), body)
    assert (operators(after), hits) == (["aten.expand.default"], 1)
    after, hits, _ = run(FoldIndices(), lambda b: body(b, 1))
    assert "aten.logical_and.default" in operators(after) and hits == 0, "the first is hidden"


@pytest.mark.parametrize("order", ["late", "other order", "shared axis"])
def test_other_counts_are_picked_by(order: str) -> None:
    def body(b: Function) -> Value:
        seq, x = b.dim("s"), b.take("x", "s", "s")
        down, across = b.count(seq, seq, 1), b.count(seq, 1, seq)
        late = b.emit(aten.sub.Tensor, across, 1)
        near, far = {"late": (down, late), "other order": (across, down), "shared axis": (down, down)}[order]
        return b.emit(aten.index.Tensor, x, [near, far])

    after, hits, _ = run(FoldIndices(), body)
    assert "aten.index.Tensor" in operators(after) and hits == 0


# --- fuse-activation --------------------------------------------------------------------------------------------------


def gelu(b: Function, *, by: float = math.sqrt(2), half: float = 0.5, order: int = 0, escapes: bool = False) -> Value:
    x = b.take("x", "b", "s", 8)
    erf = b.emit(aten.erf.default, b.emit(aten.div.Tensor, x, by))
    one = b.emit(aten.add.Tensor, erf, 1.0)
    if order == 0:  # (x (1 + erf)) / 2
        made = b.emit(aten.mul.Tensor, b.emit(aten.mul.Tensor, x, one), half)
    elif order == 1:  # (x / 2) (1 + erf)
        made = b.emit(aten.mul.Tensor, b.emit(aten.mul.Tensor, x, half), one)
    else:  # x ((1 + erf) / 2)
        made = b.emit(aten.mul.Tensor, b.emit(aten.mul.Tensor, one, half), x)
    return b.emit(aten.add.Tensor, made, erf) if escapes else made


def test_activations_spelled_out() -> None:
    for order in range(3):
        after, hits, misses = run(FuseActivation(), lambda b, order=order: gelu(b, order=order))
        assert (operators(after), hits, misses) == (["aten.gelu.default"], 1, [])

    def silu(b: Function, escapes: bool = False) -> Value:
        x = b.take("x", "b", "s", 8)
        gate = b.emit(aten.sigmoid.default, x)
        made = b.emit(aten.mul.Tensor, gate, x)
        return b.emit(aten.add.Tensor, made, gate) if escapes else made

    assert operators(run(FuseActivation(), silu)[0]) == ["aten.silu.default"]
    assert run(FuseActivation(), lambda b: silu(b, True))[1:] == (
        0, ["it is not multiplied with what it is of, and nothing else"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "why"),
    [({"by": 1.5}, "not of what GELU"), ({"half": 0.25}, "one factor"), ({"escapes": True}, "one factor")],
    ids=str,
)
def test_other_activations_stay(options: dict[str, Any], why: str) -> None:
    _, hits, misses = run(FuseActivation(), lambda b: gelu(b, **options))
    assert hits == 0 and why in misses[0], misses


# --- fuse-rope in batches ---------------------------------------------------------------------------------------------


def rotated(
    b: Function, *, first: bool = True, whole: int = 8, each: bool = False, half: int = 4, wide: int = 8
) -> Value:
    """[b, 2, s, whole] or [b, s, 2, whole], of whose numbers 8 are turned."""
    x = b.take("x", *(("b", 2, "s") if first else ("b", "s", 2)), whole)
    table = ("b" if each else 1, 1, "s", wide) if first else ("b" if each else 1, "s", 1, wide)
    cos, sin = b.take("cos", *table), b.take("sin", *table)
    t = b.emit(aten.slice.Tensor, x, -1, 0, 8) if whole > 8 else x
    low, high = b.emit(aten.slice.Tensor, t, -1, 0, half), b.emit(aten.slice.Tensor, t, -1, half, 8)
    partner = b.emit(aten.cat.default, [b.emit(aten.neg.default, high), low], -1)
    made = b.emit(aten.add.Tensor, b.emit(aten.mul.Tensor, t, cos), b.emit(aten.mul.Tensor, partner, sin))
    return b.emit(aten.cat.default, [made, b.emit(aten.slice.Tensor, x, -1, 8, whole)], -1) if whole > 8 else made


@pytest.mark.parametrize("options", [{}, {"first": False}, {"each": True}, {"whole": 12}], ids=str)
def test_rotations_of_batches(options: Mapping[str, Any]) -> None:
    after, hits, misses = run(FuseRope(), lambda b: rotated(b, **options))
    left = operators(after)
    assert (hits, misses) == (1, []) and "xllm.rope.default" in left
    assert not {"aten.cat.default", "aten.mul.Tensor"} & set(left)


@pytest.mark.parametrize(("options", "why"), [({"half": 2}, "not those of a plain"), ({"wide": 1}, "do not rotate")])
def test_other_rotations_of_batches_stay(options: dict[str, Any], why: str) -> None:
    _, hits, misses = run(FuseRope(), lambda b: rotated(b, **options))
    assert hits == 0 and any(why in miss for miss in misses), misses


# --- causal masks -----------------------------------------------------------------------------------------------------


def attended(b: Function, hidden: float, *, padded: bool = False, late: int = 0, past: bool = True) -> Value:
    """Queries of s tokens behind p others."""
    seq, before = b.dim("s"), b.dim("p")
    keys = seq + before
    q = b.take("q", "b", 2, "s", 4)
    held, fresh = b.take("held", "b", 2, "p", 4), b.take("fresh", "b", 2, "s", 4)
    k = b.emit(aten.cat.default, [held, fresh], 2)
    first = before if past else 0
    offset = b.emit(aten.scalar_tensor.default, first + late, dtype=torch.int64, device=META)
    queries = b.emit(aten.add.Tensor, b.count(seq), offset)
    seen = b.emit(aten.le.Tensor, b.count(keys, 1, 1, 1, keys), b.reshape(queries, (1, 1, seq, 1)))
    if padded:
        pad = b.emit(aten.cat.default, [b.take("pad", "b", 1, 1, "p", dtype=torch.bool),
                                        b.take("more", "b", 1, 1, "s", dtype=torch.bool)], 3)  # fmt: skip
        seen = b.emit(aten.logical_and.default, seen, pad)
    mask = b.emit(aten.where.self, seen, b.number(0.0), b.number(hidden))
    return b.emit(xllm.sdpa.default, q, k, k, mask, 0.5, 0.0, False, False)


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    ("options", "causal", "mask"),
    [
        ({"hidden": -math.inf}, True, "None"), ({"hidden": LOWEST}, True, "None"),
        ({"hidden": -math.inf, "padded": True}, True, "aten.cat.default"),
        ({"hidden": LOWEST, "padded": True}, False, "aten.where.self"),  # where nothing is seen it is a mean of all
        ({"hidden": -1e9}, False, "aten.where.self"), ({"hidden": -math.inf, "late": 1}, False, "aten.le.Tensor"),
        ({"hidden": -math.inf, "past": False}, False, "aten.le.Tensor"),
    ],
    ids=str,
)  # fmt: skip
def test_causal_masks_made_of_counts(options: dict[str, Any], causal: bool, mask: str) -> None:
    after, _, _ = run(FuseSdpa(), lambda b: attended(b, **options))
    (sdpa,) = (node for node in after.calls() if node.target is xllm.sdpa.default)
    assert (sdpa.args[6], str(getattr(sdpa.args[3], "target", None))) == (causal, mask)
