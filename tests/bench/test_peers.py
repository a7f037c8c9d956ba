"""What compares peers: rates, the protocol of a child, what is kept and what comes next, ratios and rows; and the
conversion to GGUF, number by number."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench.checkpoints import write_checkpoint
from bench.peers import __main__ as peers
from bench.peers import contenders, to_compressed
from bench.peers.__main__ import Entry, answer, identity
from bench.peers.child import Job, figures, measure, prompts
from bench.peers.contenders import CONTENDERS, XLLM
from bench.peers.rounds import Cell, Failure, Found, Log, following, left_out, minutes_a_round, ratio, summarize
from bench.peers.workloads import WORKLOADS
from bench.report import Spread
from tests.frontend.test_quantised import bound, stored
from xllm.ir.weight_rules import Source, evaluate

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
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert answer(sleeps, os.environ, seconds=0.1) == Failure("no answer in 0.1 s")  # idle: not its last word


def test_ratio_is_of_the_best_peer_in_either_direction():
    spreads = {"a": Spread.of([10.0]), "b": Spread.of([20.0])}
    assert ratio(Spread.of([30.0]), spreads, more_is_better=True) == (1.5, "b")
    assert ratio(Spread.of([5.0]), spreads, more_is_better=False) == (2.0, "a")
    assert ratio(Spread.of([5.0]), {}, more_is_better=True) is None


def rates(*values: float) -> Found:
    return Found({"decode_tokens_per_second": value} for value in values)


def test_a_failed_peer_is_a_cell_and_no_rival():
    cells = {
        Cell("decode", "int8", "xllm exact"): rates(20, 22),
        Cell("decode", "int8", "xllm rounded"): rates(40),
        Cell("decode", "int8", "slow"): rates(10, 10),
        Cell("decode", "int8", "broken"): Found([Failure("it crashed")]),
        Cell("decode", "int8", "late"): Found(),
    }
    cells[Cell("decode", "int8", "xllm exact")].figures[0]["ceiling"] = {"read": 7.0}
    [row] = summarize(cells, WORKLOADS)
    assert row["ceiling"] == {"read": Spread.of([7.0])}
    assert (row["cells"]["broken"], row["cells"]["late"]) == ("failed: it crashed", "not yet")
    assert row["cells"]["xllm exact"].count == 2
    assert (row["ratios"], row["best_peer"]) == ({"xllm exact": 2.1, "xllm rounded": 4.0}, "slow")


def test_a_run_goes_on_where_the_last_one_was_cut(tmp_path):
    file, cell, known = tmp_path / "runs" / "shape.jsonl", Cell("decode", "int8", "peer"), {"version": "1", "n": (1, 2)}
    Log(file).add(cell, known, {"a": 1.5})
    file.write_text(file.read_text() + '\n{"workload": "deco')
    Log(file).add(cell, known, Failure("it crashed"))
    again = Log(file)
    assert again.found(cell, known) == [{"a": 1.5}, Failure("it crashed")]
    assert again.found(cell, {**known, "version": "2"}) == []
    other = cell._replace(workload="batch-8")
    again.add(other, known, {"a": 2.5})
    again.forget(["decode"], ["int8"])
    assert (Log(file).found(cell, known), Log(file).found(other, known)) == ([], [{"a": 2.5}])


def test_every_cell_has_its_turn_before_any_has_another():
    order = [Cell(name, "int8", who) for name in ("decode", "batch-8") for who in ("xllm", "peer")]
    cells = {order[0]: rates(9), order[1]: rates(9), order[2]: rates(9), order[3]: rates()}  # cut within a round
    turns = []
    while cell := following(cells, 3):
        turns.append(cell)
        cells[cell].extend(rates(9))
    assert turns[0] == order[3] and sorted(turns[1:5]) == sorted(turns[5:]) == sorted(order)
    assert [cell.workload for cell in turns[1:]] == ["decode"] * 2 + ["batch-8"] * 2 + ["decode"] * 2 + ["batch-8"] * 2


def test_contenders_take_turns_in_another_order_each_round():
    cells = {Cell("decode", "int8", who): rates() for who in ("xllm exact", "xllm rounded", "peer")}
    orders = []
    for _ in range(5):
        orders.append([])
        for _ in cells:
            cell = following(cells, 5)
            assert cell is not None
            orders[-1].append(cell.contender)
            cells[cell].extend(rates(9))
    assert len({tuple(order) for order in orders}) > 2 and len({order[0] for order in orders}) > 1


def test_nothing_is_begun_that_took_longer_than_is_left():
    slow, fast, new = (Cell("decode", "int8", who) for who in ("slow", "fast", "new"))
    cells = {slow: Found([{"seconds": 90.0}, {"seconds": 40.0}]), fast: Found([{"seconds": 30.0}] * 2), new: Found()}
    assert following(cells, 3, (new,), 90) == slow and following(cells, 3, (new,), 89) == fast
    assert following(cells, 3, (new,), 29) is None and following(cells, 3, (), 1) == new  # whose time nobody knows
    assert minutes_a_round(cells) == {"decode": 2.0} and minutes_a_round(cells, (slow,)) == {"decode": 0.5}


def test_tiles_are_set_up_as_the_source_means(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "HOME", tmp_path)
    tiles = tmp_path / "src" / "llama_cpp_python-1" / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx"
    tiles.mkdir(parents=True)
    (tiles / "mmq.cpp").write_text("    _tile_loadconfig(&tc);\n    done = true;\n")
    for _ in range(2):
        assert contenders._llama_source(CONTENDERS[1]) == tmp_path / "src" / "llama_cpp_python-1"
        assert (tiles / "mmq.cpp").read_text() == f"    {contenders.TILE_CONFIG[1]}\n    done = true;\n"


def test_a_conversion_that_fails_leaves_nothing_and_needs_room(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "HOME", tmp_path)
    checkpoint = tmp_path / "models" / "qwen3-0.6b" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer_config.json").write_text("{}" * 500)

    def breaks(*command, **_):
        Path(command[-1]).write_text("half a model")
        raise RuntimeError("it broke")

    monkeypatch.setattr(contenders, "_run", breaks)
    with pytest.raises(RuntimeError, match="it broke"):
        contenders.convert(CONTENDERS[1], "qwen3-0.6b", "int8", "Q8_0")
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    monkeypatch.setattr(contenders.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2999))
    with pytest.raises(RuntimeError, match="remove models of other shapes"):
        contenders.convert(CONTENDERS[1], "qwen3-0.6b", "int8", "Q8_0")


def test_a_cell_is_given_up_where_trying_is_of_no_use():
    cell = Cell("decode", "int8", "peer")
    assert following({cell: Found([Failure("a port was taken")])}, 1) == cell
    assert following({cell: Found([Failure("it crashed")] * 2)}, 1) is None
    assert following({cell: Found([Failure("no answer", final=True)])}, 1) is None


def test_later_rounds_leave_out_who_cannot_be_best():
    cells = {
        Cell("decode", "int8", who): rates(rate) for who, rate in (("xllm", 5), ("far", 19), ("near", 21), ("b", 30))
    }
    out = left_out(cells, WORKLOADS)
    assert out == {Cell("decode", "int8", "far")}  # and never us
    assert following(cells, 1, out) is None and following(cells, 2, out) == Cell("decode", "int8", "xllm")
    [row] = summarize(cells, WORKLOADS, out)
    assert (row["left_out"], row["cells"]["far"].count, row["best_peer"]) == (["far"], 1, "b")
    late = {Cell("start", "int8", who): Found([{"first_token_seconds": s}]) for who, s in (("a", 1.0), ("b", 2.0))}
    assert left_out(late, WORKLOADS) == {Cell("start", "int8", "b")}


def test_figures_of_other_code_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "version_of", lambda contender: "1")
    (tmp_path / "manifest.json").write_text('{"digest": "d"}')
    ours, asked = Entry(XLLM, "int8", "exact", tmp_path), WORKLOADS["decode"]
    held = identity(ours, asked, 2)
    assert held == identity(ours, asked, 2) != identity(ours, asked, 1)
    assert held != identity(ours, WORKLOADS["decode-4096"], 2)
    (tmp_path / "manifest.json").write_text('{"digest": "e"}')
    compiled_anew = identity(ours, asked, 2)
    monkeypatch.setattr(peers, "sources", lambda: "changed")
    assert len({json.dumps(one) for one in (held, compiled_anew, identity(ours, asked, 2))}) == 3
    assert "changed" not in identity(Entry(CONTENDERS[1], "int8", "Q8_0"), asked, 2).values()


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


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("int4", 0.12)])
def test_compressed_tensors_stand_for_the_checkpoint(tmp_path, kind, error):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = to_compressed.quantised("a.weight", weight, kind)
    program, opened = bound(tmp_path, to_compressed.config(kind), made, Source(("a.weight",)))
    found = evaluate(program.weights["w"].rule, stored(opened), {})
    assert 0 < np.linalg.norm(found - weight.float().numpy()) <= error * weight.float().norm()
