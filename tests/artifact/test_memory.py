"""Packing holds a few blocks in memory: not the checkpoint that it reads, nor the weights that it writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 512, "hidden_size": 1024,
    "intermediate_size": 12288, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
WATCHED = """
import sys
from pathlib import Path
from xllm.artifact import ArtifactWriter
from xllm.compiler import compile_checkpoint

def resident(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

write = ArtifactWriter.write_weights
def watched(*args, **named):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    written = write(*args, **named)
    print(resident("VmHWM") - before)
    return written
ArtifactWriter.write_weights = watched
print(compile_checkpoint(sys.argv[1], sys.argv[2]).weight_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a stage are told by Linux")
def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """600 MB of weights; read whole they would be resident once, written ones as well."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", CONFIG, shard_bytes=256 << 20)
    command = [sys.executable, "-c", WATCHED, str(checkpoint), str(tmp_path / "model.xllm")]
    grown, weights = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert weights > 600e6
    assert grown < weights / 3
