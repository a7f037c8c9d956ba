"""A small sound artifact, made without a compiler, and ways to change one behind its back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xllm.artifact import Artifact, ArtifactError, ArtifactWriter, writing
from xllm.plan import Bucket, Buffer, Call, Plan, StoredWeight
from xllm.targets.base import LOGIT_ROWS, TOKENS, Cost, Extent, KVLayout, Layout

WIDTH, VOCAB = 8, 20
PLAIN = Layout("plain", "float32")


def small_plan() -> Plan:
    """ids -> embedding -> norm -> rows of the last tokens -> logits; the last call runs in torch."""
    calls = (
        Call("embed", "xllm.embedding", "embedding.f32", {"ids": "$ids", "weight": "@embed", "out": "%x"},
             {"vocab": VOCAB, "width": WIDTH}, stream="compute", results=("%x",)),
        Call("norm", "xllm.rms_norm", "rms_norm.f32", {"x": "%x", "weight": "@norm", "out": "%n"}, {"width": WIDTH},
             {"eps": 1e-6}, stream="compute", results=("%n",),
             cost=Cost(Extent.of(T=4 * WIDTH), Extent.of(T=8 * WIDTH))),
        Call("rows", "xllm.rows", "rows.f32", {"index": "$last", "table": "%n", "out": "%r"}, {"width": WIDTH},
             rows=LOGIT_ROWS, stream="compute", results=("%r",)),
        Call("head", "aten.mm.default", "torch", rows=LOGIT_ROWS, stream="compute", results=("%logits",), operands=(
            ("self", {"ref": "%r", "shape": [{"S": 1}, WIDTH], "dtype": "float32"}),
            ("mat2", {"ref": "@head", "shape": [WIDTH, VOCAB], "dtype": "float32"}),
        )),
    )  # fmt: skip
    sizes = {
        "x": (TOKENS, WIDTH),
        "n": (TOKENS, WIDTH),
        "r": (LOGIT_ROWS, WIDTH),
        "logits": (LOGIT_ROWS, VOCAB),
    }
    buffers = {name: Buffer(rows.times(4 * width), "float32", (rows, width)) for name, (rows, width) in sizes.items()}
    offsets = {"x": 0, "n": 512, "r": 0, "logits": 256}
    weights = {
        "embed": StoredWeight("embed", (VOCAB, WIDTH), PLAIN, bytes=VOCAB * WIDTH * 4),
        "head": StoredWeight("head", (WIDTH, VOCAB), PLAIN, bytes=VOCAB * WIDTH * 4),
        "norm": StoredWeight("norm", (WIDTH,), PLAIN, bytes=WIDTH * 4),
        "table": StoredWeight("table", (100, 16), PLAIN, bytes=6400),
    }
    buckets = (Bucket({"T": 4, "S": 2}, 640, offsets), Bucket({"T": 16, "S": 2}, 1024, offsets))
    return Plan(calls, buffers, buckets, weights, KVLayout("float32", 16, 4096, (0, 2048)), "logits")


def weight_bytes(weight: StoredWeight) -> np.ndarray:
    """Any bytes that are the same each time."""
    return np.random.default_rng(len(weight.name)).integers(0, 256, weight.bytes, np.uint8)


MANIFEST: dict[str, Any] = {
    "target": {"name": "cpu", "level": "x86-64-v3", "architecture": "x86_64"},
    "model": {"name": "小模型", "vocab": VOCAB, "max_len": 64, "eos_ids": [1]},
    "task": {"kind": "generate"},
    "generation": {"temperature": 0.7},
    "special_tokens": {"eos_token": "</s>"},
    "limits": {"max_len": 64, "max_seqs": 4, "max_batch_tokens": 16},
}


def fill(writer: ArtifactWriter, values: Callable[[StoredWeight], np.ndarray] = weight_bytes) -> None:
    writer.write("ir/00-captured.ir", "program\n")
    written = writer.write_weights(small_plan(), lambda weight: [values(weight)])
    writer.write("plan.json", written.plan.to_json())
    writer.write("tokenizer/tokenizer.json", '{"model": {"vocab": {}}}')
    writer.write("tokenizer/chat_template.jinja", "{{ messages }}")
    writer.finish({**MANIFEST, "weights_header": written.header, "weights_checksum": written.checksum})


def write_small(path: Path, values: Callable[[StoredWeight], np.ndarray] = weight_bytes) -> Path:
    with writing(path) as writer:
        fill(writer, values)
    return path


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest and seals it again, as a compiler that meant it would."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    writer = ArtifactWriter(path)
    writer._files = manifest["files"]
    writer.finish({key: value for key, value in manifest.items() if key not in ("schema", "files", "digest")})


def replan(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the plan and seals the artifact again."""
    raw = json.loads((path / "plan.json").read_text())
    change(raw)
    manifest = Artifact.open(path).manifest
    writer = ArtifactWriter(path)
    writer._files = dict(manifest["files"])
    writer.write("plan.json", json.dumps(raw))
    writer.finish({key: value for key, value in manifest.items() if key not in ("schema", "files", "digest")})


def contents(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def refusal(path: Path, key: Path | None = None) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(path, key).map_weights()
    return caught.value
