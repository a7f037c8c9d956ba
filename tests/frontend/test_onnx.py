"""What torch exports, against onnxruntime, at several sizes of every dim; and files that are not to be trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.frontend.onnx_models import MODELS, exported, feeds
from xllm.errors import CompileError
from xllm.frontend.onnx_file import read
from xllm.functions import compile_onnx
from xllm.session import Session

SIZES = ((2, 5, 3), (1, 1, 2), (3, 11, 1), (1, 13, 0))  # batch, tokens, tokens before


@pytest.fixture(scope="module", params=MODELS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = exported(request.param)
    report = compile_onnx(model, folder / "out.xllm", dict.fromkeys(MODELS[request.param][1], 16))
    hits = {record.name: record.hits for record in report.records}
    one = "fuse-layer-norm" if request.param == "norms" else "fuse-sdpa"
    assert hits[one] >= 1, "attention, or a norm, is one operator"
    assert report.fallbacks == (), "nothing runs in torch"
    return request.param, model, folder / "out.xllm"


def test_gives_what_onnxruntime_gives(compiled: tuple[str, Path, Path]) -> None:
    name, model, artifact = compiled
    oracle = onnxruntime.InferenceSession(model)
    names = [output.name for output in oracle.get_outputs()]
    with Session(artifact, threads=1) as session:
        for sizes in SIZES:
            given = feeds(name, *sizes)
            want = {name: np.asarray(value) for name, value in zip(names, oracle.run(None, given), strict=True)}
            got = session.run(given)
            assert set(got) == set(want)
            for key, value in want.items():
                assert got[key].shape == value.shape
                assert np.linalg.norm(got[key] - value) <= 1e-5 * np.linalg.norm(value)


def test_gives_the_same_bits_for_any_threads(compiled: tuple[str, Path, Path]) -> None:
    name, _, artifact = compiled
    with Session(artifact, threads=1) as one, Session(artifact, threads=2) as two:
        for sizes in SIZES:
            given = feeds(name, *sizes)
            alone, shared = one.run(given), two.run(given)
            assert all(np.array_equal(alone[key].view(np.int32), shared[key].view(np.int32)) for key in alone)


def test_refuses_inputs_that_do_not_fit(compiled: tuple[str, Path, Path]) -> None:
    name, _, artifact = compiled
    with Session(artifact, threads=1) as session:
        key, value = next(iter(feeds(name, 2, 5).items()))
        rest = feeds(name, 2, 5)
        for wrong in (value.astype(np.float64), value[0], np.repeat(value, 20, 0), [1]):
            with pytest.raises(
                ValueError, match="batch" if isinstance(wrong, np.ndarray) and len(wrong) == 40 else key
            ):
                session.run({**rest, key: wrong})  # pyright: ignore[reportArgumentType]  # on purpose
        with pytest.raises(ValueError, match="unknown or missing"):
            session.run({**rest, "other": value})


# --- files that are not to be trusted --------------------------------------------------------------------------------


def small(node: onnx.NodeProto, opset: int = 18, tensors: tuple[onnx.TensorProto, ...] = ()) -> onnx.ModelProto:
    """One node from x [n, 4] to y."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], initializer=list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def outside(location: str, offset: str = "0", length: str = "16") -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return small(helper.make_node("Add", ["x", "w"], ["y"]), tensors=(tensor,))


def with_if() -> onnx.ModelProto:
    branch = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    return small(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def with_function() -> onnx.ModelProto:
    model = small(helper.make_node("Relu", ["x"], ["y"]))
    model.functions.append(helper.make_function("mine", "F", ["a"], ["a"], [], []))
    return model


def cycle() -> onnx.ModelProto:
    model = small(helper.make_node("Add", ["x", "z"], ["y"]))
    model.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    return model


def with_results(*names: str) -> onnx.ModelProto:
    model = small(helper.make_node("Relu", ["x"], ["y"]))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in names)
    return model


def huge(dims: list[int]) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 16)
    return small(helper.make_node("Add", ["x", "w"], ["y"]), tensors=(tensor,))


HOSTILE = {
    "a path above the folder": (outside("../w.bin"), "onnx-external"),
    "an absolute path": (outside("/etc/passwd"), "onnx-external"),
    "a link": (outside("link.bin"), "onnx-external"),
    "a file that is not there": (outside("none.bin"), "onnx-external"),
    "no location": (outside(""), "onnx-external"),
    "a location that is no text": (
        onnx.ModelProto.FromString(outside("w.bin").SerializeToString().replace(b"w.bin", b"w.b\xff\xff")),
        "onnx-external",
    ),
    "bytes beyond the file": (outside("w.bin", "64"), "onnx-tensor"),
    "an offset below zero": (outside("w.bin", "-4"), "onnx-tensor"),
    "another length than the shape's": (outside("w.bin", "0", "12"), "onnx-tensor"),
    "a gigantic tensor": (huge([1 << 40, 1 << 40]), "onnx-tensor"),
    "a size below zero": (huge([-4]), "onnx-tensor"),
    "fewer bytes than the shape": (huge([5]), "onnx-tensor"),
    "more dimensions than there are": (huge([1] * 40), "onnx-tensor"),
    "a nested graph": (with_if(), "nested-graph"),
    "a function of its own": (with_function(), "onnx-function"),
    "a cycle": (cycle(), "onnx-order"),
    "a value nobody makes": (small(helper.make_node("Relu", ["q"], ["y"])), "onnx-order"),
    "a value made twice": (small(helper.make_node("Relu", ["x"], ["x"])), "onnx-order"),
    "no result": (with_results(), "onnx-results"),
    "a result named twice": (with_results("y", "y"), "onnx-results"),
    "an unknown operator": (small(helper.make_node("NoSuch", ["x"], ["y"])), "onnx-operator"),
    "an unknown domain": (small(helper.make_node("Relu", ["x"], ["y"], domain="evil")), "onnx-domain"),
    "an old opset": (small(helper.make_node("Relu", ["x"], ["y"]), 13), "onnx-opset"),
    "an opset to come": (small(helper.make_node("Relu", ["x"], ["y"]), 99), "onnx-opset"),
    "an operator without its input": (small(helper.make_node("Add", ["x"], ["y"])), "onnx-node"),
    "a size that depends on data": (small(helper.make_node("Reshape", ["x", "x"], ["y"])), "onnx-dynamic"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_by_name(tmp_path: Path, case: str) -> None:
    model, code = HOSTILE[case]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (tmp_path / "w.bin", folder / "w.bin"):
        file.write_bytes(b"\0" * 64)
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompileError) as caught:
        compile_onnx(folder / "m.onnx", tmp_path / "out.xllm", {"n": 4})
    assert caught.value.code == code, str(caught.value)
    assert not (tmp_path / "out.xllm").exists()


def test_any_cut_or_changed_file_is_refused_or_read(tmp_path: Path) -> None:
    """No bytes make the reader raise anything but CompileError."""
    whole = bytearray(small(helper.make_node("Add", ["x", "x"], ["y"])).SerializeToString())
    rng = np.random.default_rng(0)
    file = tmp_path / "m.onnx"
    refused = 0
    for trial in range(300):
        raw = whole[: rng.integers(1, len(whole))] if trial % 3 == 0 else bytearray(whole)
        raw[rng.integers(len(raw))] = rng.integers(256)
        file.write_bytes(raw)
        try:
            read(file)
        except CompileError:
            refused += 1
    assert 50 < refused < 300


def test_external_data_is_mapped(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(outside("w.bin", "16").SerializeToString())
    compile_onnx(tmp_path / "m.onnx", tmp_path / "out.xllm", {"n": 4})
    with Session(tmp_path / "out.xllm", threads=1) as session:
        (made,) = session.run({"x": np.ones((3, 4), np.float32)}).values()
    assert np.array_equal(made, np.ones((3, 4), np.float32) + np.arange(4, 8, dtype=np.float32))


def test_running_sums(tmp_path: Path) -> None:
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [-1])
    file = tmp_path / "m.onnx"
    file.write_bytes(small(helper.make_node("CumSum", ["x", "axis"], ["y"]), tensors=(axis,)).SerializeToString())
    assert compile_onnx(file, tmp_path / "out.xllm", {"n": 4}).fallbacks == ()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Session(tmp_path / "out.xllm", threads=1) as session:
        assert np.array_equal(session.run({"x": x})["y"], np.cumsum(x, -1))
    for node in (
        helper.make_node("CumSum", ["x", "axis"], ["y"], exclusive=1),
        helper.make_node("CumSum", ["x", "axis"], ["y"], reverse=1),
    ):
        file.write_bytes(small(node, tensors=(axis,)).SerializeToString())
        with pytest.raises(CompileError, match="running sum"):
            compile_onnx(file, tmp_path / "other.xllm", {"n": 4})


def test_a_dim_needs_its_largest_size(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(small(helper.make_node("Relu", ["x"], ["y"])).SerializeToString())
    for dims, code in (({}, "missing-dim"), ({"n": 4, "m": 2}, "bad-option"), ({"n": 0}, "bad-option")):
        with pytest.raises(CompileError) as caught:
            compile_onnx(tmp_path / "m.onnx", tmp_path / "out.xllm", dims)
        assert caught.value.code == code
