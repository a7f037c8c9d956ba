"""Weight rules: what they read, how they move between layers, what they evaluate to."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.ir import Concat, Constant, Shift, Source
from xllm.ir.weight_rules import evaluate, move_layer, rule_text, widen


def test_rules_move_between_layers() -> None:
    rule = Concat((Source(("model.layers.0.q.weight", "layers.0.q")), Shift(Source(("model.layers.0.n",)), 1.0)))
    moved = move_layer(rule, ("model.layers",), 12)
    assert rule_text(moved) == "concat(model.layers.12.q.weight, model.layers.12.n + 1.0)"
    assert move_layer(Constant("model.layers.0.table"), ("model.layers",), 3) == Constant("model.layers.0.table")
    untouched = Source(("encoder.model.layers_0.q",))
    assert move_layer(untouched, ("model.layers",), 3) == untouched


def test_rules_evaluate() -> None:
    read = {"a": np.array([[1.0]], np.float32), "b": np.array([[0x4000]], np.uint16)}
    rule = Concat((Source(("missing", "a")), Source(("b",)), Constant("c")))
    made = evaluate(Shift(rule, 1.0), read, {"c": np.array([[3.0]], np.float32)})
    assert made.tolist() == [[2.0], [3.0], [4.0]]
    with pytest.raises(KeyError, match="missing or gone"):
        evaluate(Source(("missing", "gone")), read, {})


def test_widening_bfloat16_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = widen(bits)
    assert (wide.view(np.uint32) >> 16 == bits).all()
    assert (wide.view(np.uint32) & 0xFFFF == 0).all()
