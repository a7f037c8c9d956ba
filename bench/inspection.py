"""Writes docs/explain-qwen3-moe.md and docs/diff-qwen3-moe.md: what `xllm explain` and `xllm diff` say of a small
Qwen3-MoE with random weights. Run: python -m bench.inspection
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.checkpoints import write_checkpoint
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.inspection import diff, explain

DOCS = Path(__file__).parents[1] / "docs"
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 515, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 514, "tie_word_embeddings": False,
    "norm_topk_prob": True,
}  # fmt: skip
EXPLAIN = """# What `xllm explain` says of a small Qwen3-MoE

Passes with their hits and near misses, the kernel of every operator, what is left to torch, the buckets and the memory,
from the artifact alone. Written by `python -m bench.inspection`.
"""
DIFF = """# What `xllm diff` says of two artifacts

A small Qwen3-MoE as it is (A), and compiled with `--disable-pass fuse-qkv` (B). What is equal stands in the last line;
addresses are left out of the programs. Written by `python -m bench.inspection`.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_checkpoint(root / "qwen3-moe", CONFIG)
        for name, disabled in (("a.xllm", ()), ("b.xllm", ("fuse-qkv",))):
            compile_checkpoint(root / "qwen3-moe", root / name, CompileOptions(disable=disabled))
        one, two = (Artifact.open(root / name) for name in ("a.xllm", "b.xllm"))
        explained = explain.text(explain.explain(one))
        compared = diff.text(diff.compare(one, two), "a.xllm", "b.xllm")
    (DOCS / "explain-qwen3-moe.md").write_text(f"{EXPLAIN}\n```\n{explained}```\n", encoding="utf-8")
    (DOCS / "diff-qwen3-moe.md").write_text(f"{DIFF}\n```diff\n{compared}```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
