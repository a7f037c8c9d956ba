"""Quantised checkpoints, compiled: logits beside transformers' on the numbers they stand for, in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.checkpoints import write_checkpoint
from tests.models import family
from tests.quantised import Maker, awq, float8, gptq, int8, packed, rewrite
from tests.test_parity import Reference, worst_beside
from xllm.compiler import CompileOptions, compile_checkpoint

SIZES = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = family("qwen3", "Qwen3ForCausalLM", **SIZES)
EXPERTS = {"moe_intermediate_size": 96, "num_experts_per_tok": 3, "num_experts": 4, "norm_topk_prob": True}
SPARSE = family("qwen3_moe", "Qwen3MoeForCausalLM", **SIZES, **EXPERTS)


def group(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **more}
    form = weights.pop("format", "pack-quantized")
    return {"targets": ["re:.*proj"], "weights": weights, "input_activations": None, "format": form}


MIXED = {
    "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {
        "group_0": group(4, "group", group_size=32),
        "group_1": group(4, "channel", symmetric=False),
        "group_2": group(8, "group", group_size=32, symmetric=False, format="int-quantized"),
        "group_3": group(8, "channel", type="float", format="float-quantized"),
    },
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Maker], str]] = {
    "gptq": (DENSE, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
             {"_proj.weight": gptq(4, 32, act_order=True)}, "14 weights dequantised from GPTQ int4 group 32 in order"),
    "awq": (DENSE, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
            {"_proj.weight": awq(32)}, "14 weights dequantised from AWQ int4 group 32"),
    "compressed-tensors": (DENSE, MIXED, {
        "q_proj.weight": packed(4, 32), "k_proj.weight": packed(4, 32), "v_proj.weight": packed(4, -1, symmetric=False),
        "gate_proj.weight": packed(4, -1, symmetric=False), "up_proj.weight": int8(32, symmetric=False),
        "o_proj.weight": float8((1, 0), "_scale", torch.bfloat16), "down_proj.weight": packed(4, 32),
    }, "6 weights dequantised from compressed-tensors int4 group 32"),
    "fp8 experts": (SPARSE, BLOCKS, {"_proj.weight": float8((128, 128))},
                    "32 weights dequantised from FP8 float8 blocks of 128x128"),
    "fp8 stacked experts": (SPARSE, BLOCKS, {"_proj.weight": float8((128, 128)), "_proj": float8((128, 128))},
                            "12 weights dequantised from FP8 float8 blocks of 128x128"),
    "gptq experts": (SPARSE, {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
                     {"_proj.weight": gptq(8, -1, version=2)}, "32 weights dequantised from GPTQ int8 per channel"),
}  # fmt: skip


def stack(folder: Path) -> None:
    """Experts as the model has them: gate and up of all of them in one tensor, down in another."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        taken = [{part: tensors.pop(f"{stem}.{expert}.{part}_proj.weight") for part in ("gate", "up", "down")}
                 for expert in range(4)]  # fmt: skip
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in taken])
        tensors[f"{stem}.down_proj"] = torch.stack([one["down"] for one in taken])
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, tmp_path: Path) -> None:
    config, said, makers, line = CASES[name]
    write_checkpoint(tmp_path / "seed", config, dtype="float32")
    if "stacked" in name:
        stack(tmp_path / "seed")
    rewrite(tmp_path / "seed", tmp_path / "quantised", tmp_path / "plain", said, makers)
    options = CompileOptions(weights="float32", kv="float32")
    report = compile_checkpoint(tmp_path / "quantised", tmp_path / "out.xllm", options)
    assert any(note.startswith(line) for note in report.notes), report.notes
    assert not report.unused and not report.fallbacks
    assert worst_beside(tmp_path / "out.xllm", Reference(tmp_path / "plain", at_once=True), options) <= 1e-5


def test_bfloat16_unless_asked(tmp_path: Path) -> None:
    """float32 scales and norms: storage is for what was eight bits."""
    write_checkpoint(tmp_path / "seed", DENSE, dtype="float32")
    makers = {"_proj.weight": float8((128, 128))}
    rewrite(tmp_path / "seed", tmp_path / "quantised", tmp_path / "plain", BLOCKS, makers)
    compile_checkpoint(tmp_path / "quantised", tmp_path / "q.xllm")
    compile_checkpoint(tmp_path / "plain", tmp_path / "p.xllm", CompileOptions(weights="bfloat16"))
    held = [re.sub(rb'"name":"[a-z]+"', b"", (tmp_path / f"{part}.xllm/plan.json").read_bytes()) for part in "qp"]
    assert held[0] == held[1]  # the digests of all weights are in it


AWQ = awq(32)


@pytest.mark.parametrize(
    ("maker", "bits", "weights"),
    [
        (gptq(4, 32, zeros="middle"), 4, "int4.32"),
        (gptq(4, 32), 4, "int8.32"),
        (gptq(8, 32, zeros="middle"), 8, "int8.32"),
        (AWQ, 4, "int8.32"),
    ],
    ids=["symmetric int4", "int4 with zeros", "symmetric int8", "AWQ"],
)
def test_integers_stay_what_they_are(maker: Maker, bits: int, weights: str, tmp_path: Path) -> None:
    """What a checkpoint keeps as integers is stored as the same integers: what is left is the activations' rounding."""
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    if maker is not AWQ:
        said = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    write_checkpoint(tmp_path / "seed", DENSE, dtype="float32")
    rewrite(tmp_path / "seed", tmp_path / "quantised", tmp_path / "plain", said, {"_proj.weight": maker})
    options = CompileOptions(weights=weights, head="float32", kv="float32")
    compile_checkpoint(tmp_path / "quantised", tmp_path / "q.xllm", options)
    limit = 1e-3 if weights.startswith("int8") else 3e-2
    assert worst_beside(tmp_path / "q.xllm", Reference(tmp_path / "plain", at_once=True), options) <= limit
