"""What compares peers: rates of arrivals, the protocol of a child, ratios and rows; and the conversion to GGUF, number
by number."""

import json
import os
import sys
from typing import Any, cast

import numpy as np
import pytest

from bench.checkpoints import write_checkpoint
from bench.peers.__main__ import Failure, answer, ratio, summarize
from bench.peers.child import Job, figures, measure, prompts
from bench.report import Spread

TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 511, "tie_word_embeddings": True,
}  # fmt: skip


def test_rates_count_only_while_all_sequences_decode():
    early = [(1.0, 7), (2.0, 8), (3.0, 9), (4.0, 9)]
    late = [(2.0, 7), (3.0, 8), (4.0, 9), (5.0, 9)]
    found = figures([early, late], begin=0.5)
    assert found["prefill_seconds"] == 1.5
    assert found["decode_tokens_per_second"] == 4 / 2  # at 3 and 4, both
    assert found["tokens"] == [7, 8, 9, 9]


def test_one_token_has_no_rate():
    assert figures([[(1.0, 7)]], begin=0.0)["decode_tokens_per_second"] is None


def test_prompts_are_the_same_for_all_and_differ_within():
    job = Job("model", 2, 8, 1, 1, 100)
    assert prompts(job, 2, 8, 0) == prompts(job, 2, 8, 0)
    first, second = prompts(job, 2, 8, 0)
    assert first != second and max(first + second) < 100


def test_a_short_answer_is_an_error():
    class Short:
        version = "1"

        def run(self, asked, output):
            return [[(0.0, 1)] for _ in asked]

    with pytest.raises(ValueError, match="instead of 1 of 5"):
        measure(cast(Any, Short()), Job("model", 1, 8, 5, 1, 100))


def test_a_child_answers_by_its_last_line_of_json():
    script = "print('hello'); print('{\"a\": 1}'); print('bye')"
    assert answer([sys.executable, "-c", script], os.environ) == {"a": 1}


def test_a_child_that_breaks_says_why():
    found = answer([sys.executable, "-c", "raise ValueError('no such type')"], os.environ)
    assert found == Failure("ValueError: no such type")
    assert answer([sys.executable, "-c", "import os; os.abort()"], os.environ) == Failure("ended with -6")


def test_ratio_is_of_the_best_peer_in_either_direction():
    spreads = {"a": Spread.of([10.0]), "b": Spread.of([20.0])}
    assert ratio(Spread.of([30.0]), spreads, more_is_better=True) == (1.5, "b")
    assert ratio(Spread.of([5.0]), spreads, more_is_better=False) == (2.0, "a")
    assert ratio(Spread.of([5.0]), {}, more_is_better=True) is None


def test_a_failed_peer_is_a_cell_and_no_rival():
    runs = {
        ("decode", "int8", "xllm"): [{"decode_tokens_per_second": 20.0}, {"decode_tokens_per_second": 22.0}],
        ("decode", "int8", "slow"): [{"decode_tokens_per_second": 10.0, "version": "3"}] * 2,
        ("decode", "int8", "fast"): [{"decode_tokens_per_second": 99.0}, Failure("it crashed")],
    }
    [row] = summarize(runs)
    assert row["cells"]["fast"] == "failed: it crashed"
    assert (row["ratio"], row["best_peer"], row["versions"]) == (2.1, "slow", {"slow": "3"})


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_holds_the_checkpoint(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    from bench.peers.to_gguf import convert, floats, read_tensors

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **TINY, **experts}
    folder = write_checkpoint(tmp_path / "model", config)
    convert(folder, kind, tmp_path / "out.gguf")
    held = read_tensors(folder / "model.safetensors")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert len(found) == 2 + 2 * 12  # embedding, norm; 4 of attention and 4 norms, router, 3 of experts

    def values(name):
        return gguf.quants.dequantize(found[name].data, found[name].tensor_type)

    error = {"F16": 1e-3, "BF16": 0.0, "Q8_0": 0.01, "Q4_0": 0.12}[kind]
    for ours, theirs in (("blk.1.attn_k", "layers.1.self_attn.k_proj"), ("token_embd", "embed_tokens")):
        expected = floats(held[f"model.{theirs}.weight"])
        assert np.linalg.norm(values(f"{ours}.weight") - expected) <= error * np.linalg.norm(expected)
    expert = floats(held["model.layers.0.mlp.experts.3.down_proj.weight"])
    assert np.linalg.norm(values("blk.0.ffn_down_exps.weight")[3] - expert) <= error * np.linalg.norm(expert)
    np.testing.assert_array_equal(values("blk.0.ffn_gate_inp.weight"), floats(held["model.layers.0.mlp.gate.weight"]))


def test_llama_rows_are_rotated_as_neighbours():
    pytest.importorskip("gguf")
    from bench.peers.to_gguf import frequency_divisors, interleaved

    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four
    assert interleaved(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    scaling = {
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = json.loads(json.dumps({**TINY, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}))
    divisors = frequency_divisors(config)
    assert divisors is not None and divisors[0] == 1 and divisors[-1] == pytest.approx(32)
    assert frequency_divisors(TINY) is None
