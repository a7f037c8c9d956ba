"""Quantised tensors by every layout: the numbers they are, by rows and whole, as integers; and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.frontend import zoo
from tests.quantised import Maker, awq, float8, gptq, int8, packed
from xllm.errors import CompileError
from xllm.frontend.facts import quantisation
from xllm.frontend.formats import formats_of
from xllm.frontend.quantised import Quantised
from xllm.frontend.weights import Checkpoint
from xllm.ir.grids import grid
from xllm.ir.program import Program, Weight
from xllm.ir.quantised import E4M3, E8M0
from xllm.ir.weight_rules import (
    Concat,
    Dequantise,
    Slice,
    Source,
    Stack,
    WeightRule,
    dequantised,
    evaluate,
    evaluate_item,
    renamed,
    rule_text,
)

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A configuration of one group."""
    held = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": held, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


PACK, INT8, FLOAT = (
    compressed("pack-quantized"),
    compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
    compressed("float-quantized", num_bits=8, type="float", strategy="tensor", group_size=None),
)
# The last: columns that share a scale where all of it is integers on a grid that int8 holds.
LAYOUTS: Mapping[str, tuple[dict[str, Any], Maker, tuple[int, ...], int | None]] = {
    "gptq": (GPTQ, gptq(4, 32, zeros="middle"), (40, 96), 32),
    "gptq zeros that borrow": (GPTQ, gptq(4, 32), (40, 96), 32),
    "gptq by activation": ({**GPTQ, "desc_act": True}, gptq(4, 32, act_order=True), (40, 96), None),
    "gptq by activation, in order": ({**GPTQ, "desc_act": True}, gptq(4, 32), (40, 96), 32),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(4, 32, version=2), (40, 96), 32),
    "gptq int8": ({**GPTQ, "bits": 8}, gptq(8, 32, zeros="middle"), (40, 96), 32),
    "gptq int8 asymmetric": ({**GPTQ, "bits": 8}, gptq(8, 32), (40, 96), None),
    "gptq int2 per channel": ({**GPTQ, "bits": 2, "group_size": -1}, gptq(2, -1), (40, 96), 96),
    "gptq last group smaller": (GPTQ, gptq(4, 32), (40, 80), None),
    "gptq dynamic": ({**GPTQ, "dynamic": {"-:.*head": {}, "+:.*a": {"bits": 8, "group_size": 48}}},
                     gptq(8, 48, zeros="middle"), (40, 96), 48),
    "awq": (AWQ, awq(32), (40, 96), 32),
    "packed": (PACK, packed(4, 32), (42, 96), 32),
    "packed int8": (compressed("pack-quantized", num_bits=8), packed(8, 32), (42, 96), 32),
    "packed asymmetric": (compressed("pack-quantized", symmetric=False), packed(4, 32, symmetric=False), (42, 96), 32),
    "packed padded per channel": (compressed("pack-quantized", strategy="channel", group_size=None), packed(4, -1),
                                  (31, 27), 27),
    "packed by activation": (compressed("pack-quantized", actorder="group"), packed(4, 32, act_order=True), (42, 96),
                             None),
    "packed stack": (PACK, packed(4, 32), (3, 24, 64), 32),
    "packed stack asymmetric": (compressed("pack-quantized", symmetric=False), packed(4, 32, symmetric=False),
                                (3, 20, 64), 32),
    "int8": (INT8, int8(), (42, 27), 27),
    "int8 groups": (compressed("int-quantized", num_bits=8), int8(32), (42, 96), 32),
    "int8 asymmetric": (compressed("int-quantized", num_bits=8, symmetric=False), int8(32, symmetric=False), (42, 96),
                        None),
    "int8 stack": (INT8, int8(), (3, 20, 27), 27),
    "float8 per tensor": (FLOAT, float8(None, "_scale"), (42, 27), None),
    "float8 per channel": (compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=-1),
                           float8((1, 0), "_scale"), (42, 27), None),
    "fp8 blocks": (FP8, float8((128, 128)), (200, 300), None),
    "fp8 powers of two": ({**FP8, "scale_fmt": "ue8m0"}, float8((128, 128), dtype=torch.float8_e8m0fnu), (200, 300),
                          None),
    "fp8 stack": (FP8, float8((128, 128)), (3, 130, 140), None),
}  # fmt: skip


def checkpoint(folder: Path, said: Any, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    save_file(dict(tensors), folder / "model.safetensors")
    return Checkpoint.open(folder)


def bound(folder: Path, said: Any, tensors: Mapping[str, torch.Tensor], rule: WeightRule) -> tuple[Program, Checkpoint]:
    opened = checkpoint(folder, said, tensors)
    program = zoo.stamped("qwen3").copy()
    program.weights = {"w": Weight((), rule)}
    return Quantised(opened, quantisation(folder)).bound(program), opened


def stored(opened: Checkpoint) -> dict[str, np.ndarray]:
    return {name: opened.raw(name) for name in opened}


@pytest.mark.parametrize("name", LAYOUTS)
def test_numbers(name: str, tmp_path: Path) -> None:
    """Exact, whole, by rows, and as integers."""
    said, maker, shape, columns = LAYOUTS[name]
    tensors, plain = maker("a.weight", shape, np.random.default_rng(0))
    program, opened = bound(tmp_path, said, tensors, Source(("b.weight", "a.weight")))
    rule, read = program.weights["w"].rule, stored(opened)
    assert isinstance(rule, Dequantise)
    assert opened.shape_of(rule, program) == shape
    np.testing.assert_array_equal(evaluate(rule, read, {}), plain)
    cuts = [0, 1, *([] if len(shape) == 3 else [7, 8, 29]), shape[0]]
    for start, stop in pairwise(cuts):
        np.testing.assert_array_equal(dequantised(rule, read, start, stop), plain[start:stop])
        made = grid(rule, read, start, stop)
        assert (made is None) == (columns is None)
        if made is not None:
            codes, scales, group = made
            assert group == columns and codes.dtype == np.int8 and scales.dtype == np.float32
            np.testing.assert_array_equal(codes * np.repeat(scales, group, axis=-1), plain[start:stop])
    if len(shape) == 3:
        np.testing.assert_array_equal(evaluate_item(rule, 1, read, {}), plain[1])


def test_eight_bit_floats_are_torchs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy())


def test_grids_of_joined_and_cut_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    tensors, plain = packed(4, 32)("a.weight", (24, 64), generator)
    more, other = packed(4, 32, symmetric=False)("b.weight", (40, 64), generator)
    stacked, third = packed(4, 32)("c.weight", (3, 20, 64), generator)
    wide, _ = int8()("d.weight", (24, 64), generator)
    said = compressed("mixed-precision")
    said["config_groups"] = {
        str(place): {**form["config_groups"]["group_0"], "format": form["format"]}
        for place, form in enumerate((PACK, compressed("pack-quantized", symmetric=False), INT8))
    }
    a, b, c, d = (Source((f"{name}.weight",)) for name in "abcd")
    rules = {
        "joined": (Concat((a, b, Slice(a, 0, 3, 9))), np.concatenate([plain, other, plain[3:9]])),
        "stacked": (Stack((a, Slice(b, 0, 4, 28))), np.stack([plain, other[4:28]])),
        "half": (Slice(c, 1, 10, 20), third[:, 10:20]),
        "groups differ": (Concat((a, d)), None),
        "not all integers": (Concat((a, Source(("e.weight",)))), None),
    }
    plainly = {"e.weight": torch.zeros(8, 64)}
    for name, (rule, want) in rules.items():
        program, opened = bound(tmp_path, said, {**tensors, **more, **stacked, **wide, **plainly}, rule)
        rule, read = program.weights["w"].rule, stored(opened)
        count = 0 if want is None else len(want)
        for start, stop in ((0, count), (1, count - 1)) if count > 2 else ((0, max(count, 32)),):
            made = grid(rule, read, start, stop)
            assert (made is None) == (want is None), name
            if made is not None and want is not None:
                np.testing.assert_array_equal(made[0] * np.repeat(made[1], made[2], axis=-1), want[start:stop])


def test_rules_of_quantised_tensors_print_and_move(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 32)("layers.0.a.weight", (40, 96), np.random.default_rng(0))
    program, _ = bound(tmp_path, GPTQ, tensors, Source(("layers.0.a.weight",)))
    rule = program.weights["w"].rule
    assert rule_text(rule) == "dequantise(layers.0.a.qweight, gptq of 4 bits in blocks of 1x32)"
    moved = renamed(rule, lambda names: tuple(name.replace(".0.", ".7.") for name in names))
    assert isinstance(moved, Dequantise) and moved.scales == Source(("layers.7.a.scales",))
    assert program.notes == ("1 weights dequantised from GPTQ int4 group 32",)


def test_a_block_beyond_the_matrix_is_the_matrix(tmp_path: Path) -> None:
    """What a file says of its groups is no reason to make room for them."""
    tensors, plain = gptq(4, -1)("a.weight", (40, 96), np.random.default_rng(0))
    program, opened = bound(tmp_path, {**GPTQ, "group_size": (1 << 31) - 1}, tensors, Source(("a.weight",)))
    rule = program.weights["w"].rule
    assert isinstance(rule, Dequantise) and rule.scheme.block == (1, 96)
    np.testing.assert_array_equal(evaluate(rule, stored(opened), {}), plain)


def test_configurations_of_older_tools(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert quantisation(tmp_path) == ()
    (tmp_path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 64, "version": "GEMM"}))
    assert quantisation(tmp_path)[0].text == "AWQ int4 group 64"
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": -1, "desc_act": False}))
    assert quantisation(tmp_path)[0].text == "GPTQ int8 per channel"
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": FP8}}))
    assert quantisation(tmp_path)[0].text == "FP8 float8 blocks of 128x128"


STATIC = compressed("int-quantized")
STATIC["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False}


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes (nf4)"),
        ({"quant_method": "hqq"}, "'hqq'"),
        ({"quant_method": ["gptq"]}, "['gptq']"),
        ({"something": 1}, "does not say how"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "'marlin'"),
        ({**GPTQ, "pack_dtype": "int16"}, "'int16'"),
        ({**GPTQ, "bits": 3}, "bits 3"),
        ({**GPTQ, "bits": "4"}, "bits '4'"),
        ({**GPTQ, "group_size": 0}, "group_size 0"),
        ({**GPTQ, "group_size": 1 << 40}, "group_size"),
        ({**GPTQ, "dynamic": [1]}, "dynamic is [1]"),
        ({**GPTQ, "dynamic": {"+:a": 3}}, "+:a is 3"),
        ({**AWQ, "version": "gemv_fast"}, "'gemv_fast'"),
        ({**AWQ, "bits": 8}, "8 bits"),
        (STATIC, "input_activations of group_0"),
        (compressed("nvfp4-pack-quantized", type="float"), "'nvfp4-pack-quantized'"),
        (compressed("marlin-24"), "'marlin-24'"),
        (compressed("pack-quantized", strategy="tensor_group"), "'tensor_group'"),
        (compressed("pack-quantized", num_bits=3), "num_bits 3"),
        ({**PACK, "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
        ({**PACK, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({**PACK, "config_groups": {"W4A16": ["Linear"]}}, "W4A16 is ['Linear']"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme"),
        ({**FP8, "fmt": "e5m2"}, "'e5m2'"),
        ({**FP8, "weight_block_size": [128, 0]}, "[128, 0]"),
        ({**FP8, "weight_block_size": "many"}, "'many'"),
    ],
)
def test_configurations_that_are_refused_by_name(said: Any, named: str) -> None:
    with pytest.raises(CompileError) as refused:
        formats_of(said)
    assert refused.value.code == "quantised-checkpoint" and named in refused.value.why and refused.value.try_


def _without(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda held: held.__delitem__(f"a.{part}")


def _with(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda held: held.update({f"a.{part}": change(held[f"a.{part}"]).contiguous()})


@pytest.mark.parametrize(
    ("layout", "change", "named"),
    [
        ("gptq", _without("scales"), "'a.scales'"),
        ("gptq", _without("qzeros"), "not GPTQ int4 group 32"),
        ("gptq by activation", _without("g_idx"), "in order of activation"),
        ("gptq", _with("scales", lambda x: x[:-1]), "a.scales float16 [2, 40]"),
        ("gptq", _with("scales", lambda x: x.int()), "a.scales I32"),
        ("gptq", _with("qweight", lambda x: x.long()), "a.qweight I64"),
        ("gptq", _with("qweight", lambda x: x[:0]), "a.qweight I32 [0, 40]"),
        ("gptq", _with("qweight", lambda x: x[None]), "[1, 12, 40]"),
        ("gptq", _with("qzeros", lambda x: x.T), "a.qzeros I32"),
        ("gptq", _with("g_idx", lambda x: x + 1), "'a.g_idx' names groups that are none of the 3"),
        ("gptq", _with("g_idx", lambda x: x - 1), "'a.g_idx' names groups"),
        ("gptq", _with("g_idx", lambda x: x[1:]), "'a.g_idx' is not int32 [96]"),
        ("awq", _with("qzeros", lambda x: x[:, 1:]), "not AWQ int4 group 32"),
        ("packed", _without("weight_shape"), "not compressed-tensors int4 group 32"),
        ("packed", _with("weight_shape", lambda x: x * 1000), "not compressed-tensors int4"),
        ("packed", _with("weight_shape", lambda x: x * 0 - 1), "not compressed-tensors int4"),
        ("packed", _with("weight_shape", lambda x: x.repeat(500)), "not compressed-tensors int4"),
        ("packed asymmetric", _without("weight_zero_point"), "not compressed-tensors int4"),
        ("int8", _with("weight_scale", lambda x: x[1:]), "a.weight_scale bfloat16 [41, 1]"),
        ("int8", _with("weight", lambda x: x.float()), "'a.weight' has scales, but is not stored as quantised"),
        ("fp8 blocks", _without("weight_scale_inv"), "'a.weight_scale'"),
        ("fp8 blocks", _with("weight_scale_inv", lambda x: x.T), "not FP8 float8 blocks of 128x128"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    layout: str, change: Callable[[dict[str, torch.Tensor]], None], named: str, tmp_path: Path
) -> None:
    said, maker, shape, _ = LAYOUTS[layout]
    tensors, _ = maker("a.weight", shape, np.random.default_rng(0))
    change(tensors)
    with pytest.raises(CompileError) as refused:
        bound(tmp_path, said, tensors, Source(("a.weight",)))
    assert named in refused.value.why and refused.value.try_


def test_modules_that_are_left_plain_stay_as_they_are(tmp_path: Path) -> None:
    said = {**FP8, "modules_to_not_convert": ["lm_head", "re:.*gate$"]}
    program, _ = bound(tmp_path, said, {"lm_head.weight": torch.zeros(2, 2)}, Source(("lm_head.weight",)))
    assert program.weights["w"].rule == Source(("lm_head.weight",)) and program.notes == ()
