"""Figures are what they are called, and a result file says nothing about who ran it where."""

import getpass
import json
import math
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.inprocess import Demand, Rates, demand
from bench.report import Ceiling, Spread, percentile, save
from bench.server import _kind
from bench.serving import Rung
from xllm.plan import Call, Plan, StoredWeight
from xllm.targets.base import LOGIT_ROWS, KVLayout, Layout


@given(st.lists(st.floats(-1e9, 1e9), min_size=1), st.floats(0, 1))
def test_percentile_is_numpys(values, share):
    assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100), rel=1e-9, abs=1e-6)


def test_percentile_of_nothing():
    assert math.isnan(percentile([], 0.5))


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert Spread.of([3.0, 1.0, 2.0]).text(10, 1) == "20.0 (10.0-30.0)"
    assert Spread.of([1.5]).text() == "1.50"
    assert Spread.of([]).count == 0


def test_a_share_is_of_the_highest_ceiling():
    ceiling = Ceiling.best([Ceiling(2, 8.0, 100.0), Ceiling(2, 10.0, 90.0)])
    assert ceiling == Ceiling(2, 10.0, 100.0)
    rung = Rung.of([Rates(2.0, 0.5), Rates(2.0, 0.5)], ceiling, Demand(50.0, 4.0), prompt_tokens=6)
    assert (rung.prefill_share, rung.decode_share) == (0.25, 0.8)
    assert (rung.prefill_tokens_per_second, rung.decode_tokens_per_second) == (3.0, 2.0)


def test_demand_is_counted_from_the_calls():
    weights = {
        name: StoredWeight(name, (4, 8), Layout("plain", "float32"), bytes=100)
        for name in ("w", "head", "norm", "gate")
    }
    calls = (
        Call("a", "xllm.linear", "linear.f32", {"weight": "@w"}, {"n": 4, "k": 8}),
        Call("b", "xllm.rms_norm", "rms_norm.f32", {"weight": "@norm"}, {"width": 8}),
        Call("c", "xllm.attention", "attention.f32", {}, {"q_heads": 2, "key_dim": 8, "value_dim": 8}),
        Call("d", "xllm.linear", "linear_rounded.bf16", {"weight": "@head"}, {"n": 4, "k": 8}, rows=LOGIT_ROWS),
        Call("e", "xllm.gated_linear", "gated_linear.f32", {"weight": "@gate"}, {"n": 2, "k": 8, "act": 0}),
    )
    plan = Plan(calls, {}, (), weights, KVLayout("float32", 16, 160, (0,)), "logits")
    needed = demand(plan, prompt_tokens=3, output_tokens=4)
    assert needed.prefill_flops == 2 * 3 * 32 + 2 * 1 * 32 + 4 * 6 * 16 + 2 * 3 * 32
    assert needed.step_bytes == 300 + 10 * 5  # the context halfway: 3 + 4 / 2 tokens of 10 bytes


def test_saved_results_hold_facts_of_the_hardware_only(tmp_path):
    save(tmp_path / "deep" / "x.json", "x", {"n": 1}, {"spread": Spread.of([1.23456789]), "none": math.nan})
    text = (tmp_path / "deep" / "x.json").read_text()
    body = json.loads(text)
    assert list(body) == ["benchmark", "settings", "results", "machine", "versions"]
    assert body["results"] == {"spread": {"median": 1.2346, "low": 1.2346, "high": 1.2346, "count": 1}, "none": None}
    assert body["machine"]["cores"] >= 1 and body["versions"]["python"]
    for private in (f'"{socket.gethostname()}"', f'"{getpass.getuser()}"', str(tmp_path), "/home", "/root"):
        assert private not in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ([], "anonymous"), (["[heap]"], "anonymous"), (["/dev/zero (deleted)"], "anonymous"),
        (["/memfd:xllm-kv (deleted)"], "kv"), (["/a/weights/model.safetensors"], "weights"),
        (["/lib/libc.so.6"], "code"),
    ],
)  # fmt: skip
def test_mappings_are_told_apart(name, kind):
    assert _kind(name) == kind
