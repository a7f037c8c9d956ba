"""--activations: which products it changes, what is said of it, and combinations that mean nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.models import EXPERTS, FAMILIES, build
from tests.test_parity import Reference, opened, worst_beside
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.errors import CompileError
from xllm.functions import compile_onnx
from xllm.inspection import explain
from xllm.pipeline import check_activations
from xllm.targets.cpu.rules import SUFFIX


@pytest.mark.parametrize(
    ("weights", "limit"),
    [("bfloat16", 2e-2), ("int8", 8e-2), ("int8.128", 8e-2), ("int8.row", 0.12), ("int4", 0.6), ("int4.128", 0.7)],
)
def test_every_product_of_that_type_is_rounded(weights: str, limit: float, tmp_path: Path) -> None:
    stored = weights.partition(".")[0]
    kind = "bfloat16" if stored == "bfloat16" else "int8"
    options = CompileOptions(weights=weights, activations=kind, kv="bfloat16")
    checkpoint, path = build(tmp_path, FAMILIES["qwen3"], dtype="bfloat16", options=options)
    artifact = Artifact.open(path)
    kernels = Counter(call.kernel for call in artifact.plan.calls if call.op == "xllm.linear")
    name = "linear_rounded_row" if weights == "int8.row" else "linear_rounded"
    assert list(kernels) == [f"{name}.{SUFFIX[stored]}"]
    assert {call.kernel for call in artifact.plan.calls if call.op == "xllm.attention"} == {"attention_rounded.bf16"}
    assert artifact.manifest["activations"] == kind
    assert f"activations: {kind} beside weights that it fits" in explain.text(explain.explain(artifact))
    assert worst_beside(path, Reference(checkpoint, at_once=True), options) <= limit


def test_exact_unless_asked(tmp_path: Path) -> None:
    options = CompileOptions(weights="bfloat16")
    path = build(tmp_path, FAMILIES["qwen3"], dtype="bfloat16", options=options)[1]
    artifact = Artifact.open(path)
    assert not any("_rounded" in call.kernel for call in artifact.plan.calls)
    assert "activations" not in artifact.manifest
    assert "activations" not in explain.text(explain.explain(artifact))


def test_weights_of_another_type_keep_exact_rows(tmp_path: Path) -> None:
    options = CompileOptions(weights="int8", head="bfloat16", activations="int8")
    plan = Artifact.open(build(tmp_path, FAMILIES["qwen3"], dtype="bfloat16", options=options)[1]).plan
    kernels = {call.kernel for call in plan.calls if call.op == "xllm.linear"}
    assert kernels == {"linear_rounded.i8", "linear.bf16"}


def test_experts_keep_exact_rows(tmp_path: Path) -> None:
    options = CompileOptions(weights="int8", activations="int8")
    plan = Artifact.open(build(tmp_path, EXPERTS["qwen3-moe"], dtype="bfloat16", options=options)[1]).plan
    assert {call.kernel for call in plan.calls if call.op in ("xllm.linear", "xllm.moe")} == {
        "linear_rounded.i8",
        "moe.i8",
    }


def test_it_changes_the_numbers_a_little(tmp_path: Path) -> None:
    seen = []
    for activations in (None, "bfloat16"):
        options = CompileOptions(weights="bfloat16", kv="float32", activations=activations)
        folder = tmp_path / str(activations)
        checkpoint, path = build(folder, FAMILIES["qwen3"], dtype="bfloat16", options=options)
        worst_beside(path, Reference(checkpoint, at_once=True), CompileOptions(kv="bfloat16"))
        seen.append(_logits(path))
    difference = np.linalg.norm(seen[0] - seen[1]) / np.linalg.norm(seen[0])
    assert 1e-5 < difference < 2e-2


def _logits(path: Path) -> np.ndarray:
    from xllm.runtime.executor import Batch, Row
    from xllm.runtime.request import Request, SamplingParams

    with opened(path) as (executor, spans):
        executor.attach(0, Request("0", (1, 2, 3, 4, 5), SamplingParams(temperature=0)), ())
        executor.launch(Batch(0, (Row(0, spans[0], 0, (1, 2, 3, 4, 5), True),))).result()
        return executor.seen[0, 4]


@pytest.mark.parametrize(
    ("activations", "storages", "advice"),
    [
        ("int8", ("bfloat16",), "--activations bfloat16 or --weights int8 or --weights int4 or no --activations"),
        ("bfloat16", ("int8.32", "int8.32"), "--activations int8 or --weights bfloat16 or no --activations"),
        ("bfloat16", ("float32",), "--weights bfloat16 or no --activations"),
        ("bfloat16", ("int4.32",), "--activations int8 or --weights bfloat16 or no --activations"),
        ("float32", ("float32",), "no --activations"),
    ],
)
def test_what_means_nothing_is_refused(activations: str, storages: tuple[str, ...], advice: str) -> None:
    with pytest.raises(CompileError, match="activations are rounded to") as refused:
        check_activations(activations, *storages)
    assert refused.value.code == "bad-option"
    assert advice in str(refused.value)


def test_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="int8 beside weights of int8 or int4 only"):
        options = CompileOptions(weights="bfloat16", activations="int8")
        build(tmp_path, FAMILIES["qwen3"], dtype="bfloat16", options=options)
    assert not (tmp_path / "tiny.xllm").exists()
    with pytest.raises(CompileError, match="one of bfloat16, int8"):
        CompileOptions(activations="int4")
    with pytest.raises(CompileError, match="bfloat16 beside weights of bfloat16 only"):
        compile_onnx(tmp_path / "none.onnx", tmp_path / "out", {}, activations="bfloat16")
