"""What storage of weights, and of keys and values, costs in accuracy: error of logits on random weights, held-out loss
of the embedded model.

    python -m bench.accuracy [--kv] [--checkpoint DIR] [--conversations 40]

Logits: ‖Δ‖ / ‖reference‖ against bfloat16 weights of the same checkpoint (a small one like Qwen3, unless named). Random
weights pass errors on almost undamped, layer after layer, so the share grows with depth; trained ones damp them.
Weights: ‖Δ‖ / ‖weights‖ of random ones. Beside ours, in groups of 32 too, stand Q8_0 and Q4_0 of llama.cpp, by its own
package: each weight of two dimensions goes through it and back, and runs as float32.

With --kv: of keys and values, beside bfloat16 weights; against float32 ones, logits in the shape of Qwen3-0.6B.
"""

from __future__ import annotations

import argparse
import mmap
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bench.checkpoints import SHAPES, write_checkpoint
from bench.report import RESULTS, console, footer, save, table
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.embedded.evaluate import held_out_loss
from xllm.kernels import cpu
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams
from xllm.storage import KVS
from xllm.targets import host
from xllm.targets.cpu.executor import CpuExecutor

LIBRARY = {"Q8_0 of llama.cpp": GGMLQuantizationType.Q8_0, "Q4_0 of llama.cpp": GGMLQuantizationType.Q4_0}
STORAGES = ("bfloat16", "int8.32", "int8.64", "int8.128", "int8.row", "int4.32", "int4.64", "int4.128")
# Storage of weights, and what activations are rounded to beside it; the first is what others are held against.
KINDS = (
    ("bfloat16", ""), ("bfloat16", "bfloat16"), *((storage, "") for storage in STORAGES[1:]),
    *((storage, "int8") for storage in STORAGES if storage.startswith("int")), *((name, "") for name in LIBRARY),
)  # fmt: skip
SHAPE = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
}  # fmt: skip


class Compiled:
    """An artifact as what `held_out_loss` asks: the logits of every token of one sequence."""

    def __init__(self, artifact: Path) -> None:
        self._executor, self._step = CpuExecutor(Artifact.open(artifact), host.threads().count), 0
        spec, length = self._executor.kv, self._executor.limits.max_len
        self._state = mmap.mmap(-1, -(-length // spec.group_tokens) * spec.group_bytes + spec.fixed_bytes)
        self._base = np.frombuffer(self._state, np.uint8).ctypes.data

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]; token by token, which gives the bits that any other cut gives."""
        assert len(ids) <= self._executor.limits.max_len, "the state holds no more"
        self._executor.attach(0, Request("accuracy", tuple(ids), SamplingParams(temperature=0.0)), ())
        rows = []
        for at, token in enumerate(ids):
            self._executor.launch(Batch(self._step, (Row(0, self._base, at, (token,), True),))).result()
            self._step += 1
            rows.append(self._executor.rows(1)[0])
        self._executor.detach(0)
        return np.array(rows)

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.from_numpy(self.logits(input_ids[0].tolist()))[None])

    def close(self) -> None:
        self._executor.close()


def logits(source: Path, artifact: Path, chosen: CompileOptions, tokens: int) -> np.ndarray:
    """float32 [tokens, V] of a random text."""
    compile_checkpoint(source, artifact, chosen)
    model, vocab = Compiled(artifact), Artifact.open(artifact).manifest["model"]["vocab"]
    try:
        return model.logits(np.random.default_rng(1).integers(0, vocab, tokens).tolist())
    finally:
        model.close()


def loss(source: Path, artifact: Path, chosen: CompileOptions, conversations: int) -> float:
    """Held out, in nats per token, of the embedded model at `source`."""
    compile_checkpoint(source, artifact, chosen)
    model, tokenizer = Compiled(artifact), Tokenizer.from_file(str(source / "tokenizer.json"))
    try:
        return held_out_loss(model, tokenizer, conversations, 0)["all"]
    finally:
        model.close()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def by_library(weight: np.ndarray, form: GGMLQuantizationType) -> np.ndarray:
    return quants.dequantize(quants.quantize(weight, form), form)


def checkpoint_by_library(source: Path, folder: Path, form: GGMLQuantizationType) -> Path:
    """The checkpoint with what a product or an embedding has for weights rounded to `form`, in float32."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        held = {name: weight.float() for name, weight in load_file(file).items()}
        for name, weight in held.items():
            if weight.ndim == 2:
                held[name] = torch.from_numpy(by_library(weight.numpy(), form))
        save_file(held, file, {"format": "pt"})
    return folder


def rounding(storage: str, weight: np.ndarray) -> float:
    """Error of a weight in this storage."""
    if storage in LIBRARY:
        return relative(by_library(weight, LIBRARY[storage]), weight)
    kind = cpu.quantised(storage)
    assert kind is not None
    # A product with the identity reads the packed weight back; activations of one step are exact.
    n, k = weight.shape
    eye, out = np.eye(k, dtype=np.float32), np.empty((k, n), np.float32)
    packed, rows = cpu.pack_panels(weight, storage), np.empty(kind.row_bytes(k) * k, np.uint8)
    args = {"x": eye, "weight": packed, "out": out, "scratch_rows": rows}
    call = cpu.Call(
        f"linear.i{kind.bits}",
        {**{name: held.ctypes.data for name, held in args.items()}, "bias": None},
        {"k": k, "n": n, "group": kind.group},
    )
    step = np.arange(k, dtype=np.int32)
    with cpu.Runner(1) as runner:
        span = np.zeros(128, np.uint8)
        base = np.array([span.ctypes.data + -span.ctypes.data % 64], np.uint64)
        batch = cpu.Batch(step, step, np.zeros(0, np.int32), np.array([0, k], np.int32), base)
        runner.run(runner.add_plan([call]), batch)
    return relative(out.T, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="whose logits are compared")
    parser.add_argument("--conversations", type=int, default=40, help="of the held-out loss")
    parser.add_argument("--kv", action="store_true", help="storage of keys and values in place of weights")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name, shape, tokens = ("accuracy-kv", SHAPES["qwen3-0.6b"], 256) if options.kv else ("accuracy", SHAPE, 64)
    kinds = [(*kind, "bfloat16") for kind in KINDS]
    if options.kv:
        kinds = [("bfloat16", "", kv) for kv in KVS]
    weight = np.random.default_rng(0).standard_normal((256, 1024), np.float32)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.xllm"
        folder = options.checkpoint or write_checkpoint(Path(scratch) / "seed", shape)
        reference = np.zeros(0)
        for storage, activations, kv in track(kinds, "measuring", console=console(), transient=True):
            stored, story, seed = storage, checkpoint_path(), folder
            if storage in LIBRARY:
                stored, form = "float32", LIBRARY[storage]
                story = checkpoint_by_library(story, Path(scratch) / f"story {form.name}", form)
                seed = checkpoint_by_library(seed, Path(scratch) / f"seed {form.name}", form)
            chosen = CompileOptions(weights=stored, activations=activations or None, kv=kv)
            found = {"loss": loss(story, made, chosen, options.conversations)}
            got = logits(seed, made, chosen, tokens)
            reference = reference if results else got
            found |= {"logits": relative(got, reference), "token_bytes": Artifact.open(made).plan.kv.token_bytes}
            if storage != STORAGES[0] and not activations:
                found["weights"] = rounding(storage, weight)
            rounded = f"{storage}, activations {activations}" if activations else storage
            results[kv if options.kv else rounded] = found
    out = console()
    view = table(name, "storage", "KV bytes a token" if options.kv else "weights", "logits", "held-out loss", "more")
    first = next(iter(results.values()))["loss"]
    for kind, found in results.items():
        of_kind = f"{found['weights']:.2%}" if "weights" in found else ""
        of_kind = f"{found['token_bytes']:,}" if options.kv else of_kind
        more = f"{found['loss'] / first - 1:+.2%}"
        view.add_row(kind, of_kind, f"{found['logits']:.2%}", f"{found['loss']:.4f}", more)
    out.print(view)
    settings = {"conversations": options.conversations, "shape": shape, "tokens": tokens}
    save(options.out or RESULTS / f"{name}.json", "accuracy", settings, results)
    footer(out)


if __name__ == "__main__":
    main()
