"""`xllm show --onnx`: valid ONNX with named dims and our operators, of programs, steps and functions; no weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.passes.zoo import rewritten
from xllm.cli import main
from xllm.functions import compile_onnx
from xllm.inspection.onnx_graph import of_program


def checked(model: onnx.ModelProto) -> onnx.GraphProto:
    """Its graph, whose every value has a type and every input a maker."""
    onnx.checker.check_model(model)
    assert not model.graph.initializer and {one.domain for one in model.opset_import} <= {"", "xllm", "aten"}
    told = {value.name for group in (model.graph.input, model.graph.output, model.graph.value_info) for value in group}
    assert {name for node in model.graph.node for name in node.input if name} <= told
    return model.graph


@pytest.mark.parametrize("stage", [0, -1])
def test_a_program(stage: int) -> None:
    graph = checked(of_program(rewritten("qwen3")[0][stage]))
    (logits,) = graph.output
    assert logits.type.tensor_type.shape.dim[0].dim_param == "S"
    kinds = {(node.domain, node.op_type) for node in graph.node}
    assert (("xllm", "qk_norm_rope_write") in kinds) == (stage == -1)
    assert any(value.name.startswith("@") for value in graph.input)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A model file and its artifact: a product, and a cosine that torch computes."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Cos", ["h"], ["y"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [7.25] * 16)
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 18)])  # fmt: skip
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    compile_onnx(tmp_path / "m.onnx", tmp_path / "m.xllm", {"n": 4})
    return tmp_path / "m.onnx", tmp_path / "m.xllm"


def test_a_function_by_command(tmp_path: Path, files: tuple[Path, Path]) -> None:
    _, artifact = files
    shown = tmp_path / "shown.onnx"
    assert main(["show", str(artifact), "--onnx", "-o", str(shown)]) == 0
    graph = checked(onnx.load(shown))
    assert [node.op_type for node in graph.node] == ["linear", "cos.default"]
    facts = {one.name: helper.get_attribute_value(one) for one in graph.node[0].attribute}
    assert facts["kernel"] == b"linear.f32" and facts["k"] == 4
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert main(["show", str(artifact), "--onnx"]) == 2


def test_a_model_file_by_command(tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model, shown = str(files[0]), tmp_path / "shown.onnx"
    for stage in ([], ["--stage", "captured"]):
        assert main(["show", model, "--dim", "n=4", *stage, "--onnx", "-o", str(shown)]) == 0
        graph = checked(onnx.load(shown))
        assert [node.op_type for node in graph.node] == ["linear", "cos"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert main(["show", model, "--dim", "n=4", "--dot"]) == 0
    assert "linear" in capsys.readouterr().out
    for wrong, said in ((["--onnx", "-o", str(shown)], "--dim n=N"), ([], "--onnx")):
        assert main(["show", model, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_explain_and_diff_of_functions(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, artifact = files
    compile_onnx(model, tmp_path / "wide.xllm", {"n": 9}, weights="bfloat16")
    capsys.readouterr()
    assert main(["explain", str(artifact)]) == 0
    words = capsys.readouterr().out
    for said in ("m (ONNX) compiled for cpu", "linear.f32", "cos.default", "SIZES  n up to 4;", "weights 256 bytes"):
        assert said in words, words
    assert "KV" not in words
    assert main(["explain", str(artifact), "--json"]) == 0
    capsys.readouterr()
    assert main(["diff", str(artifact), str(artifact)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("equal: facts, passes, stage captured")
    assert main(["diff", str(artifact), str(tmp_path / "wide.xllm")]) == 1
    told = capsys.readouterr().out
    assert "limits.n" in told and "bfloat16 panels16" in told and "arena bytes" in told
