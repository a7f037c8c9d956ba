"""`xllm compile model.onnx`: every flag is heeded or refused by name; modules of others, and who else is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from xllm import LLM, Session, cli
from xllm.artifact import WEIGHTS, Artifact, ArtifactError
from xllm.errors import CompileError
from xllm.extensions import ExtensionError
from xllm.functions import compile_onnx

PASS = """
from dataclasses import dataclass
from xllm.passes import Outcome, Pass

@dataclass(frozen=True)
class Nothing(Pass):
    kind, AFTER = "rewrite", "fuse-sdpa"

    def run(self, program, context):
        return Outcome(program, ("somewhere",))
"""
KERNEL = """
import numpy as np
from xllm.targets.base import Lowering

def rule(operation, kv, weights):
    [x] = operation.args.values()
    return Lowering("cosine", {"x": x, "out": operation.results[0]})

def cosine(x, out):
    if x.shape[0] == 3:
        raise RuntimeError("three rows")
    np.cos(x, out=out)

RULES, KERNELS = {"aten.cos.default": rule}, {"cosine": cosine}
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Cos", ["h"], ["y"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.25] * 16)
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    (tmp_path / "mine.py").write_text(PASS)
    (tmp_path / "cosine.py").write_text(KERNEL)
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("storage", "limit"),
    [("float32", 1e-6), ("bfloat16", 4e-3), ("int8", 8e-3), ("int8.row", 2e-2), ("int4.32", 0.12)],
)
def test_storage_of_weights(tmp_path: Path, storage: str, limit: float) -> None:
    rng = np.random.default_rng()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 96])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])
    held = rng.standard_normal((96, 64), np.float32)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [96, 64], held.tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    report = compile_onnx(tmp_path / "m.onnx", tmp_path / "m.xllm", {"n": 8}, weights=storage)
    assert not report.fallbacks
    with Session(tmp_path / "m.xllm") as session:
        rows = rng.standard_normal((7, 96), np.float32)
        want = rows @ held
        error = np.linalg.norm(session.run({"x": rows})["y"] - want) / np.linalg.norm(want)
    assert limit / 30 < error < limit or (storage == "float32" and error < limit)


def test_an_unknown_storage_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"int3.*one of float32"):
        compile_onnx(model, tmp_path / "m.xllm", {"n": 4}, weights="int3")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--task", "embed"], "--task is for language models"),
        (["--traffic", "nofile"], "--traffic is for language models"),
        (["--reuse", "X"], "--reuse is for language models"),
        (["--max-batch-tokens", "8"], "--max-batch-tokens is for language models"),
        (["--bisect-passes"], "--bisect-passes is for language models"),
        (["--pass-module", "nowhere"], "there is no module nowhere"),
        (["--kernel-module", "nowhere"], "there is no module nowhere"),
        (["--disable-pass", "fuse-moe"], "fuse-moe does not run here"),
        (["--share-weights", "out.xllm"], "choose one beside it"),
        (["--dim", "n=5"], "--dim names n more than once"),
        (["--group", "64"], "--group 64 is for integer weights"),
        (["--group", "64", "--weights", "bfloat16"], "--group 64 is for integer weights"),
    ],
)
def test_what_is_not_for_functions_is_refused_by_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    monkeypatch.chdir(model.parent)
    assert cli.main(["compile", str(model), "-o", "out.xllm", "--dim", "n=4", *flags]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not Path("out.xllm").exists()


def test_modules_of_others_and_shared_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model.parent
    modules = ["--pass-module", str(folder / "mine.py"), "--kernel-module", str(folder / "cosine.py")]
    for name in ("one", "two"):
        flags = ["--dim", "n=4", "--share-weights", str(folder / "shared"), *modules]
        assert cli.main(["compile", str(model), "-o", str(folder / name), *flags]) == 0
    out = capsys.readouterr().out
    assert "nothing                  1 hits" in out and "kernel_modules=['cosine']" in out and "in torch" not in out
    assert len({(folder / name / WEIGHTS).stat().st_ino for name in ("one", "two")}) == 1
    manifest = Artifact.open(folder / "one").manifest
    assert "mine:nothing" in manifest["pipeline"].split() and set(manifest["extensions"]) == {"passes", "kernels"}
    assert {"xllm", "torch", "onnx"} == set(manifest["toolchain"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with Session(folder / "one", threads=1, kernel_modules=[str(folder / "cosine.py")]) as session:
        assert np.allclose(session.run({"x": x})["y"], np.cos(x @ np.full((4, 4), 0.25, np.float32)), atol=1e-6)
        with pytest.raises(ExtensionError, match=r"cosine:cosine failed at cos\w*: RuntimeError: three rows"):
            session.run({"x": np.ones((3, 4), np.float32)})
    with pytest.raises(ArtifactError, match=r"kernel_modules=\['cosine'\]"):
        Session(folder / "one", threads=1)


def test_it_is_a_session_that_runs_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.parent / "out.xllm"
    with pytest.raises(CompileError, match="XLLM_DEBUG=4 or less"):
        compile_onnx(model, path, {"n": 4}, debug=5)
    compile_onnx(model, path, {"n": 4})
    with pytest.raises(ArtifactError, match="is a function of arrays"):
        LLM(path)
    for command in (["serve", str(path), "--port", "0"], ["generate", str(path), "-p", "x"]):
        assert cli.main(command) == 2
        assert "xllm.Session" in capsys.readouterr().err
