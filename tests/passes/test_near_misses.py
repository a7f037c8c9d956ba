"""Each pass leaves alone what its docstring says it leaves alone, says why, and the program still computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.fx as fx

from tests.ir.small import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, Builder, aten, attend, attention, heads, small, xllm
from tests.passes.zoo import CONTEXT
from xllm.ir import Concat, Program
from xllm.passes import Context, Pass, run_pipeline
from xllm.passes.fuse_add_rms_norm import FuseAddRmsNorm
from xllm.passes.fuse_gate_up import FuseGateUp
from xllm.passes.fuse_qk_norm_rope import FuseQkNormRope
from xllm.passes.fuse_qkv import FuseQkv
from xllm.passes.fuse_rms_norm import FuseRmsNorm
from xllm.passes.fuse_rope import FuseRope
from xllm.passes.numerics import check_same, random_sources
from xllm.passes.rewrite import is_call

Body = Callable[[Builder, fx.Node], fx.Node]
WIDE = 24  # of the feed-forward block


def _alpha(alpha: float) -> dict[str, Any]:
    return {"alpha": alpha} if alpha != 1 else {}


def run(step: Pass, body: Body, layers: int = 1, context: Context = CONTEXT) -> tuple[Program, tuple[int, list[str]]]:
    """The program after the pass (checked against the one before), how often it hit, and why it missed."""
    program = small(body, layers)
    after, (record,) = run_pipeline(program, [step], context)
    check_same(program, after, record.name, random_sources(program))
    return after, (record.hits, [why for _, why in record.misses])


# --- fuse-rms-norm ----------------------------------------------------------------------------------------------------


def norm(
    b: Builder, x: fx.Node, *, square: str = "pow", axis: int = -1, weight: int = HIDDEN, shift: float = 0.0,
    use_mean: bool = False, alpha: float = 1.0, other: fx.Node | None = None, power: float | None = None,
) -> fx.Node:  # fmt: skip
    squared = {"pow": lambda: (aten.pow.Tensor_Scalar, x, 2), "mul": lambda: (aten.mul.Tensor, x, x),
               "cube": lambda: (aten.pow.Tensor_Scalar, x, 3)}[square]()  # fmt: skip
    squared = b.call(*squared)
    mean = b.call(aten.mean.dim, b.call(aten.abs.default, squared) if square == "cube" else squared, [axis], True)
    total = b.call(aten.add.Tensor, mean, 1e-5, **_alpha(alpha))
    root = b.call(aten.rsqrt.default, total) if power is None else b.call(aten.pow.Tensor_Scalar, total, power)
    scale = b.weight("norm.weight", weight) if weight else None
    if scale is not None and shift:
        scale = b.call(aten.add.Tensor, scale, shift)
    normed = b.call(aten.mul.Tensor, other if other is not None else x, root)
    normed = b.call(aten.mul.Tensor, normed, scale) if scale is not None else normed
    return b.call(aten.mul.Tensor, normed, mean) if use_mean else normed


@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("power", [None, -0.5])
def test_rms_norm_fires(square: str, shift: float, power: float | None) -> None:
    after, (hits, misses) = run(FuseRmsNorm(), lambda b, x: norm(b, x, square=square, shift=shift, power=power))
    assert (hits, misses) == (1, [])
    assert ("model.layers.0.norm.weight+1.0" in after.weights) == bool(shift)


def test_another_power_is_no_norm() -> None:
    _, found = run(FuseRmsNorm(), lambda b, x: norm(b, x, power=-0.25))
    assert found == (0, [])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda b, x: norm(b, x, weight=0), "expected aten.mul.Tensor, found"),
        (lambda b, x: norm(b, x, weight=1), "its weight is [1], not one number per channel"),
        (lambda b, x: norm(b, x, use_mean=True), "has 2 users, so it cannot be fused away"),
        (lambda b, x: norm(b, x, square="cube"), "expected aten.pow.Tensor_Scalar, found %abs"),
        (lambda b, x: norm(b, x, alpha=3.0), "is given alpha, which changes what aten.add.Tensor means"),
        (lambda b, x: norm(b, x, other=b.call(aten.neg.default, x)), "x is %"),
        (lambda b, x: heads_norm(b, x, -2), "expected -1, found -2"),
    ],
    ids=[
        "no weight",
        "one weight for all",
        "mean used again",
        "other power",
        "scaled eps",
        "other value",
        "other axis",
    ],
)
def test_rms_norm_misses(body: Body, why: str) -> None:
    _, (hits, misses) = run(FuseRmsNorm(), body)
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def heads_norm(b: Builder, x: fx.Node, axis: int) -> fx.Node:
    split = b.call(aten.reshape.default, x, [-1, HEAD_DIM, HEAD_DIM])
    return b.call(aten.reshape.default, norm(b, split, axis=axis, weight=HEAD_DIM), [-1, HIDDEN])


# --- fuse-add-rms-norm ------------------------------------------------------------------------------------------------


def add_norm(b: Builder, x: fx.Node, other: object, **options: Any) -> fx.Node:
    total = b.call(aten.add.Tensor, x, other, **options)
    return b.call(xllm.rms_norm.default, total, b.weight("norm.weight", HIDDEN), 1e-6)


def test_add_rms_norm_keeps_the_sum_for_others() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        total = b.call(aten.add.Tensor, x, b.linear(x, "proj", HIDDEN))
        early = b.call(aten.neg.default, total)
        normed = b.call(xllm.rms_norm.default, total, b.weight("norm.weight", HIDDEN), 1e-6)
        return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, early, normed), total)

    after, outcome = run(FuseAddRmsNorm(), body)
    assert outcome == (1, [])
    (fused,) = (node for node in after.calls() if node.target is xllm.add_rms_norm.default)
    assert is_call(fused.args[0], xllm.linear.default)  # the branch first, then the residual


def test_add_rms_norm_across_a_layer_border_stays_in_the_layer_of_the_norm() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        normed = b.call(xllm.rms_norm.default, x, b.weight("norm.weight", HIDDEN), 1e-6)
        total = b.call(aten.add.Tensor, x, b.linear(normed, "proj", HIDDEN))
        b.call(aten.neg.default, normed)  # stands behind the sum, in its layer
        return total

    _, (hits, _) = run(FuseAddRmsNorm(), body, layers=3)
    assert hits == 2


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda b, x: add_norm(b, x, 1.0), "adds a number, not a residual"),
        (lambda b, x: add_norm(b, x, b.weight("shift", HIDDEN)), "the sum broadcasts"),
        (lambda b, x: add_norm(b, x, b.linear(x, "p", HIDDEN), alpha=0.5), "the sum scales"),
    ],
    ids=["number", "broadcast", "scaled"],
)
def test_add_rms_norm_misses(body: Body, why: str) -> None:
    _, (hits, misses) = run(FuseAddRmsNorm(), body)
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


# --- fuse-qkv ---------------------------------------------------------------------------------------------------------


def projected(b: Builder, inputs: dict[str, fx.Node], biased: str = "", scaled: str = "") -> list[fx.Node]:
    found = []
    for name, x in inputs.items():
        count = HEADS if name == "q" else KV_HEADS
        y = b.linear(x, f"{name}_proj", count * HEAD_DIM, bias=name in biased)
        if name in scaled:
            _, weight, _ = y.args
            doubled = b.call(aten.mul.Tensor, weight, 2.0)
            y = b.call(xllm.linear.default, x, doubled, None)
        found.append(heads(b, y, count))
    return found


def qkv(b: Builder, x: fx.Node, biased: str = "", scaled: str = "", other: str = "") -> fx.Node:
    inputs = {name: b.call(aten.neg.default, x) if name in other else x for name in "qkv"}
    return attention(b, *projected(b, inputs, biased, scaled))


@pytest.mark.parametrize("biased", ["", "qkv"])
def test_qkv_fires(biased: str) -> None:
    after, outcome = run(FuseQkv(), lambda b, x: qkv(b, x, biased), layers=2)
    assert outcome == (2, [])
    for leaf in ["weight"] + ["bias"] * bool(biased):
        rule = after.weights[f"model.layers.1.qkv_proj.{leaf}"].rule
        assert isinstance(rule, Concat) and len(rule.parts) == 3
    assert not [name for name in after.weights if "q_proj" in name]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda b, x: qkv(b, x, other="v"), "read different inputs"),
        (lambda b, x: qkv(b, x, biased="q"), "only some of the projections have a bias"),
        (lambda b, x: qkv(b, x, scaled="k"), "have computed weights"),
        (lambda b, x: shared_value(b, x), "do not come from three projections"),
    ],
    ids=["different inputs", "one bias", "computed weight", "values are the keys"],
)
def test_qkv_misses(body: Body, why: str) -> None:
    _, (hits, misses) = run(FuseQkv(), body)
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def shared_value(b: Builder, x: fx.Node) -> fx.Node:
    q, k, _ = projected(b, {name: x for name in "qkv"})
    return attention(b, q, k, k)


def test_qkv_serves_other_users_of_a_part() -> None:
    def body(b: Builder, x: fx.Node) -> fx.Node:
        q, k, v = projected(b, {name: x for name in "qkv"})
        again = b.call(aten.reshape.default, q, [-1, HIDDEN])
        return b.call(aten.add.Tensor, attention(b, q, k, v), again)

    assert run(FuseQkv(), body)[1] == (1, [])


def test_parameters_outside_modules_keep_their_layer() -> None:
    """A fused weight whose name lost its layer would be shared by all layers when the program is stamped."""

    def body(b: Builder, x: fx.Node) -> fx.Node:
        parts = []
        for name, count in (("wq", HEADS), ("wk", KV_HEADS), ("wv", KV_HEADS)):
            weight = b.weight(name, count * HEAD_DIM, HIDDEN)
            parts.append(heads(b, b.call(xllm.linear.default, x, weight, None), count))
        return attention(b, *parts)

    after, _ = run(FuseQkv(), body, layers=2)
    fused = sorted(name for name, weight in after.weights.items() if isinstance(weight.rule, Concat))
    assert fused == ["model.layers.0.qkv_proj.wq", "model.layers.1.qkv_proj.wq"]


# --- fuse-gate-up -----------------------------------------------------------------------------------------------------


def gated(b: Builder, x: fx.Node, *, act: str = "silu", bias: str = "", other: bool = False, twice: str = "",
          approximate: str = "", twisted: bool = False) -> fx.Node:  # fmt: skip
    gate = b.linear(x, "gate_proj", WIDE, "gate" in bias)
    up = b.linear(b.call(aten.neg.default, x) if other else x, "up_proj", WIDE, "up" in bias)
    target = {"silu": aten.silu.default, "gelu": aten.gelu.default, "sigmoid": aten.sigmoid.default}[act]
    acted = b.call(target, gate, **({"approximate": approximate} if approximate else {}))
    product = b.call(aten.mul.Tensor, *((up, acted) if twisted else (acted, up)))
    extra = {"gate": gate, "act": acted, "up": up}.get(twice)
    if extra is not None:
        product = b.call(aten.add.Tensor, product, extra)
    return b.linear(product, "down_proj", HIDDEN)


@pytest.mark.parametrize(
    ("options", "spelled"),
    [
        ({}, "silu"),
        ({"twisted": True}, "silu"),
        ({"bias": "gate up"}, "silu"),
        ({"act": "gelu"}, "gelu"),
        ({"act": "gelu", "approximate": "tanh"}, "gelu_tanh"),
        ({"act": "gelu", "approximate": "none"}, "gelu"),
    ],
)
def test_gate_up_fires(options: dict[str, Any], spelled: str) -> None:
    after, outcome = run(FuseGateUp(), lambda b, x: gated(b, x, **options))
    assert outcome == (1, [])
    (fused,) = (node for node in after.calls() if node.target is xllm.gated_act.default)
    assert fused.args[1] == spelled


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"other": True}, "x is %"),
        ({"bias": "gate"}, "only some of gate and up have a bias"),
        ({"bias": "up"}, "only some of gate and up have a bias"),
        ({"twice": "gate"}, "has 2 users"),
        ({"twice": "act"}, "has 2 users"),
        ({"twice": "up"}, "has 2 users"),
    ],
)
def test_gate_up_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseGateUp(), lambda b, x: gated(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def test_gate_up_does_not_know_other_gates() -> None:
    assert run(FuseGateUp(), lambda b, x: gated(b, x, act="sigmoid"))[1] == (0, [])


# --- fuse-rope --------------------------------------------------------------------------------------------------------


def tables(b: Builder, width: int) -> list[fx.Node]:
    """cos and sin [1, T, width]: any rows will do."""
    rows = (b.call(xllm.rows.default, b.weight(f"table.{name}", 32, width), b.positions) for name in ("cos", "sin"))
    return [b.call(aten.unsqueeze.default, row, 0) for row in rows]


def rotate(b: Builder, x: fx.Node, *, low: int = 0, half: int = HEAD_DIM // 2, high: int | None = None,
           twice: bool = False, alpha: float = 1.0, swap: bool = False) -> fx.Node:  # fmt: skip
    """x [T, HIDDEN] rotated by heads, as transformers spells it once the batch dimension is gone."""
    cos, sin = tables(b, HEAD_DIM)
    t = b.call(aten.transpose.int, heads(b, x, HEADS), 0, 1)
    high = half if high is None else high
    first = b.call(aten.slice.Tensor, t, -1, low, low + half)
    second = b.call(aten.neg.default, b.call(aten.slice.Tensor, t, -1, high, high + HEAD_DIM - half))
    partner = b.call(aten.cat.default, [first, second] if swap else [second, first], -1)
    terms = b.call(aten.mul.Tensor, t, cos), b.call(aten.mul.Tensor, partner, sin)
    turned = b.call(aten.add.Tensor, *terms, **_alpha(alpha))
    if twice:
        turned = b.call(aten.add.Tensor, turned, partner)
    return b.call(aten.reshape.default, b.call(aten.transpose.int, turned, 0, 1), [-1, HIDDEN])


def test_rope_fires_and_its_transposes_cancel() -> None:
    after, outcome = run(FuseRope(), rotate)
    assert outcome == (1, [])
    assert not [node for node in after.calls() if node.target is aten.transpose.int]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"half": 1}, "not those of a plain rotation"),
        ({"high": 1}, "half is 1 in one place and 2 in another"),
        ({"low": 1}, "expected 0, found 1"),
        ({"swap": True}, "expected aten.neg.default, found"),
        ({"twice": True}, "has 2 users"),
        ({"alpha": 2.0}, "is given alpha"),
    ],
)
def test_rope_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseRope(), lambda b, x: rotate(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def test_rope_leaves_another_negation_alone() -> None:
    _, (hits, misses) = run(FuseRope(), lambda b, x: b.call(aten.neg.default, x))
    assert (hits, len(misses)) == (0, 1)


# --- fuse-qk-norm-rope ------------------------------------------------------------------------------------------------


def fused_attention(
    b: Builder, x: fx.Node, *, normed: str = "qk", turned: str = "qk", eps: float = 1e-6, order: str = "qkv",
    whole: bool = False, apart: bool = False, scaled: bool = False, step: int = 1,
) -> fx.Node:  # fmt: skip
    counts = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    source = b.linear(x, "qkv_proj", (HEADS + 2 * KV_HEADS) * HEAD_DIM * step)
    cos, sin = (b.call(xllm.rows.default, b.weight(f"table.{n}", 32, HEAD_DIM), b.positions) for n in ("cos", "sin"))
    parts, start = {}, 0
    for name in order:
        base = b.call(aten.neg.default, source) if apart and name == "v" else source
        stop = start + counts[name] * HEAD_DIM * step
        part = b.call(aten.slice.Tensor, base, -1, start, stop, *([step] if step != 1 else []))
        start = stop
        if whole and name in normed:
            part = b.call(xllm.rms_norm.default, part, b.weight(f"{name}_norm.weight", counts[name] * HEAD_DIM), eps)
        part = heads(b, part, counts[name])
        if not whole and name in normed:
            weight = b.weight(f"{name}_norm.weight", HEAD_DIM)
            weight = b.call(aten.neg.default, weight) if scaled else weight
            part = b.call(xllm.rms_norm.default, part, weight, eps if name == "q" else 1e-6)
        if name in turned:
            part = b.call(xllm.rope.default, part, cos, sin, HEAD_DIM, False)
        parts[name] = part
    return attention(b, parts["q"], parts["k"], parts["v"])


@pytest.mark.parametrize("normed", ["", "qk"])
@pytest.mark.parametrize("turned", ["", "qk"])
def test_qk_norm_rope_fires(normed: str, turned: str) -> None:
    after, outcome = run(FuseQkNormRope(), lambda b, x: fused_attention(b, x, normed=normed, turned=turned), layers=2)
    assert outcome == (2, [])
    assert not [node for node in after.calls() if node.target is xllm.kv_write.default]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"whole": True}, "spans all heads, not one"),
        ({"normed": "q"}, "only one of q and k is normalised"),
        ({"eps": 1e-3}, "or with another eps"),
        ({"turned": "k"}, "rotated by different tables"),
        ({"turned": "qkv"}, "v is normalised or rotated"),
        ({"order": "qvk"}, "do not lie in this order"),
        ({"apart": True}, "parts of different values"),
        ({"scaled": True}, "the weight of a norm is computed"),
        ({"step": 2}, "is not cut along the width"),
    ],
)
def test_qk_norm_rope_misses(options: dict[str, Any], why: str) -> None:
    _, (hits, misses) = run(FuseQkNormRope(), lambda b, x: fused_attention(b, x, **options))
    assert hits == 0 and len(misses) == 1 and why in misses[0], misses


def test_qk_norm_rope_needs_one_projection() -> None:
    _, (hits, misses) = run(FuseQkNormRope(), attend)
    assert hits == 0 and "is not a part of one fused projection" in misses[0]
