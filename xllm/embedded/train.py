"""Train the embedded model: `python -m xllm.embedded.train --out DIR`.

Step i's batch is a function of (seed, i), so a run that was stopped goes on from its last checkpoint as if it hadn't
been. What is measured at the end is the saved folder, read back: bfloat16 rounding is part of the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from xllm.embedded.dialogue import TOPICS, converse
from xllm.embedded.evaluate import held_out_loss, tallies
from xllm.embedded.muon import Muon
from xllm.embedded.text import END, END_OF_TEXT, Segment, save_tokenizer, segments, token_id, train_tokenizer

SEED = 1
MEASURE_SEED = 7  # prompts other than those looked at while the language was being shaped
VOCAB = 832
TOKENIZER_CONVERSATIONS = 4000
MAX_LEN = 1024
ADAM_RATE = 4e-3  # embeddings and norms
MUON_RATE = 2e-2  # matrices of the blocks
WARM_UP = 50
SAVE_EVERY = 250
# Loss weights of tokens. Most of a story is free choice, whose noise drowns what an answer to a question teaches.
PROMPT_WEIGHT, STORY_WEIGHT, ANSWER_WEIGHT = 0.1, 1.0, 1.5


def new_model(vocab: int, end: int, pad: int) -> Qwen3ForCausalLM:
    """The architecture, with random weights from torch's global generator."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def batch(tokenizer: Tokenizer, seed: int, step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [rows, length] and loss weights of the same shape; each row is one long conversation, cut at `length`.

    Most rows hold one story and what is asked about it; some are longer, so that late positions are trained too.
    """
    rng = random.Random(f"{seed}/train/{step}")
    length = {3: 128, 7: 512}.get(step % 8, 256)
    ids = torch.full((tokens // length, length), token_id(tokenizer, END_OF_TEXT))
    weights = torch.zeros(ids.shape)
    for row in range(ids.shape[0]):
        at = 0
        for part in segments(tokenizer, converse(rng, stories=length // 48)):
            part_ids = torch.tensor(part.ids[: length - at])
            ids[row, at : at + len(part_ids)] = part_ids
            weights[row, at : at + len(part_ids)] = _weight(part)
            at += len(part_ids)
            if at == length:
                break
    return ids, weights


def _weight(part: Segment) -> float:
    if part.answer is None:
        return PROMPT_WEIGHT
    return STORY_WEIGHT if part.answer in TOPICS else ANSWER_WEIGHT


def schedule(step: int, steps: int) -> float:
    """Learning rate as a share of the peak: linear warm-up, then a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def export(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the Hugging Face folder, weights rounded to bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    rounded = Qwen3ForCausalLM(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        eos_token_id=[token_id(tokenizer, END), token_id(tokenizer, END_OF_TEXT)],
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )
    rounded.save_pretrained(out)
    save_tokenizer(tokenizer, out, MAX_LEN)


def adopt(model: Qwen3ForCausalLM, tokenizer: Tokenizer, earlier: Path) -> None:
    """Start from an earlier checkpoint's weights; embedding rows follow their token, whatever its id there was."""
    weights = AutoModelForCausalLM.from_pretrained(earlier, dtype=torch.float32).state_dict()
    theirs = Tokenizer.from_file(str(earlier / "tokenizer.json")).get_vocab()
    table = model.model.embed_tokens.weight.detach().clone()
    for token, row in tokenizer.get_vocab().items():
        if token in theirs:
            table[row] = weights["model.embed_tokens.weight"][theirs[token]]
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = table
    model.load_state_dict(weights)


def train(out: Path, steps: int, tokens: int, seed: int, threads: int, earlier: Path | None) -> None:
    """Train for `steps` steps of `tokens` tokens and leave the checkpoint folder in `out`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed, VOCAB, TOKENIZER_CONVERSATIONS)
    model = new_model(VOCAB, token_id(tokenizer, END), token_id(tokenizer, END_OF_TEXT))
    if earlier:
        adopt(model, tokenizer, earlier)
    muon = Muon([p for p in model.model.layers.parameters() if p.dim() == 2])
    rest = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    state = out / "training.safetensors"
    first = load_state(state, model, adam, muon) if state.exists() else 0
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {steps}", flush=True)
    began, recent = time.monotonic(), []
    for step in range(first, steps):
        share = schedule(step, steps)
        ids, weights = batch(tokenizer, seed, step, tokens)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = ADAM_RATE * share
        adam.step()
        muon.step(MUON_RATE * share)
        model.zero_grad(set_to_none=True)
        answer = (weight == ANSWER_WEIGHT).float()
        recent.append(((losses.detach() * answer).sum() / answer.sum()).item())
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * tokens / (time.monotonic() - began)
            print(
                f"step {step + 1}: loss on questions {sum(recent) / len(recent):.4f}, {speed:,.0f} tokens/s", flush=True
            )
            recent.clear()
        if (step + 1) % SAVE_EVERY == 0:
            export(model, tokenizer, out)
            save_state(state, model, adam, muon, step + 1)
            model.eval()
            held_out = {k: round(v, 4) for k, v in held_out_loss(model, tokenizer, 50, seed).items()}
            print(f"step {step + 1}: held-out {held_out}", flush=True)
            model.train()
    export(model, tokenizer, out)
    state.unlink(missing_ok=True)


def save_state(file: Path, model: Qwen3ForCausalLM, adam: torch.optim.AdamW, muon: Muon, steps: int) -> None:
    """All that a run needs to go on after `steps` steps."""
    tensors = {f"model.{name}": value for name, value in model.model.state_dict().items()}
    for index, held in adam.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in held.items()}
    tensors |= {f"muon.{index}": average for index, average in enumerate(muon.averages.values())}
    aside = file.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, aside, {"steps": str(steps)})
    aside.replace(file)


def load_state(file: Path, model: Qwen3ForCausalLM, adam: torch.optim.AdamW, muon: Muon) -> int:
    """Puts a run back where `save_state` left it; returns the steps it had made."""
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118  # not a mapping
        steps = int(saved.metadata()["steps"])
    model.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    held: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, kind = name.split(".")
            held.setdefault(int(index), {})[kind] = value
    adam.load_state_dict({**adam.state_dict(), "state": held})
    muon.averages = {shape: tensors[f"muon.{index}"] for index, shape in enumerate(muon.averages)}
    return steps


def measure(folder: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """Figures of a checkpoint folder: held-out loss, and the share of unseen prompts of each kind answered rightly."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = tallies(model, tokenizer, per_kind, seed)
    for kind, tally in kinds.items():
        print(f"{kind}: {len(tally.wrong)} of {tally.asked} wrong", *tally.wrong[:3], sep="\n    ", file=sys.stderr)
    groups = {"all stories": "story: ", "all questions": "question: "}
    whole = {
        name: sum(tally.right for kind, tally in kinds.items() if kind.startswith(prefix))
        / sum(kind.startswith(prefix) for kind in kinds)
        for name, prefix in groups.items()
    }
    rates = whole | {kind: tally.right for kind, tally in kinds.items()}
    return {
        "parameters": model.num_parameters(),
        "held_out_nats_per_token": {k: round(v, 4) for k, v in held_out_loss(model, tokenizer, 500, seed).items()},
        "prompts_per_kind": per_kind,
        "coherent_greedy": {kind: round(right, 4) for kind, right in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model and measure it.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write; a stopped run goes on")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--start-from", type=Path, help="an earlier checkpoint to start from, after a change of the corpus"
    )
    parser.add_argument("--measure-only", action="store_true", help="measure the folder as it is")
    args = parser.parse_args()
    if not args.measure_only:
        train(args.out, args.steps, args.tokens, args.seed, args.threads, args.start_from)
    torch.set_num_threads(args.threads)
    results = measure(args.out, MEASURE_SEED, per_kind=200)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
