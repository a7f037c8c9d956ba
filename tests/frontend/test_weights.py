"""Checkpoints: single and sharded files read in place, malformed ones refused, misfits with a program named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.weights import Checkpoint
from xllm.ir.program import Weight
from xllm.ir.weight_rules import Concat, Source

_VALUES = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0, 3.0]).bfloat16(),
    "c": torch.tensor([0.25, 4.0]).half(),
}


def _raw_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _check_values(checkpoint: Checkpoint) -> None:
    assert sorted(checkpoint) == ["a", "b", "c"]
    for name, tensor in _VALUES.items():
        assert checkpoint[name].dtype == np.float32
        np.testing.assert_array_equal(checkpoint[name], tensor.float().numpy())
    assert [checkpoint.dtype(name) for name in "abc"] == ["float32", "bfloat16", "float16"]
    np.testing.assert_array_equal(checkpoint.raw("b"), _VALUES["b"].view(torch.uint16).numpy())
    assert not checkpoint["a"].flags.owndata and not checkpoint["a"].flags.writeable


def test_single_file(tmp_path: Path) -> None:
    save_file(_VALUES, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _check_values(Checkpoint.open(tmp_path))


def test_shards(tmp_path: Path) -> None:
    save_file({"a": _VALUES["a"]}, tmp_path / "one.safetensors")
    save_file({"b": _VALUES["b"], "c": _VALUES["c"]}, tmp_path / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    _check_values(Checkpoint.open(tmp_path))


def test_a_whole_file_counts_before_the_index_of_an_earlier_save(tmp_path: Path) -> None:
    save_file({name: -value for name, value in _VALUES.items()}, tmp_path / "old.safetensors")
    places = dict.fromkeys(_VALUES, "old.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(_VALUES, tmp_path / "model.safetensors")
    _check_values(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3, "..\\x.safetensors"]
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, file: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CompileError, match="no safetensors file of this folder"):
        Checkpoint.open(tmp_path)


def _entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1]",
        b"[" * 100_000,
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": _entry(0, 16, [4])},  # beyond the file
        {"a": _entry(-4, 4, [2])},
        {"a": _entry(0, 8, [3])},  # size and shape disagree
        {"a": _entry(0, 8, [-1, -2])},
        {"a": _entry(0, 8, [2.0])},
        {"a": _entry(0, 8, [2]), "b": _entry(4, 8, [1])},  # overlap
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: Any) -> None:
    _raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CompileError) as refused:
        Checkpoint.open(tmp_path)
    assert refused.value.code == "bad-safetensors"


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_truncated_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CompileError, match="not a sound safetensors file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "no-weights"),
        ({"pytorch_model.bin": b"x"}, "unsafe-checkpoint"),
    ],
)
def test_folders_without_plain_weights_are_refused(tmp_path: Path, files: dict[str, bytes], code: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError) as refused:
        Checkpoint.open(tmp_path)
    assert refused.value.code == code and refused.value.try_


def _qwen3_state() -> dict[str, torch.Tensor]:
    state = {name: torch.from_numpy(array.copy()) for name, array in zoo.reference("qwen3")[0].items()}
    del state["lm_head.weight"]  # tied
    return state


def test_a_program_fits_its_checkpoint(tmp_path: Path) -> None:
    save_file({**_qwen3_state(), "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).check(zoo.stamped("qwen3")) == ("extra",)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state, name = _qwen3_state(), "model.layers.3.mlp.up_proj.weight"
    save_file({**state, name: state[name].T.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CompileError, match=name) as refused:
        Checkpoint.open(tmp_path).check(zoo.stamped("qwen3"))
    assert refused.value.code == "shape-mismatch"
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CompileError, match=name) as refused:
        Checkpoint.open(tmp_path).check(zoo.stamped("qwen3"))
    assert refused.value.code == "missing-tensor"


@pytest.mark.parametrize("shape", [(4, 9), (4,), (), (4, 8, 1)])
def test_parts_that_do_not_join_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_file({"q": torch.zeros(4, 8), "k": torch.zeros(shape)}, tmp_path / "model.safetensors")
    program = zoo.stamped("qwen3").copy()
    program.weights = {"qk": Weight((8, 8), Concat((Source(("q",)), Source(("k",)))))}
    with pytest.raises(CompileError) as refused:
        Checkpoint.open(tmp_path).check(program)
    assert refused.value.code == "shape-mismatch"
