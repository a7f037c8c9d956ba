"""The engine on a fake device: every request gets what it would get alone, ends once, and leaves nothing behind."""

from __future__ import annotations

import pytest

from tests.runtime.fakes import (
    BOTH_LOOPS,
    EOS,
    Rig,
    assert_as_alone,
    request,
)
from xllm.runtime import MemoryFault, Request, RequestRefused, SamplingParams


@BOTH_LOOPS
def test_one_request_is_generated_to_its_length(overlap):
    rig = Rig(async_scheduling=overlap)
    req = request("a", 40, max_tokens=10, ignore_eos=True)
    rig.engine.submit(req)
    rig.finish()
    assert_as_alone(rig, req)
    assert rig.end("a").finish_reason == "length"
    assert rig.end("a").prompt_tokens == 40
    stats = rig.engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished, stats.wasted_rows) == (40, 10, 1, 0)
    assert (stats.rows, stats.tokens) == (stats.steps, 40 + 10 - 1), "the last token is never computed on"
    assert stats.mapped_pages == 0 and 0 < stats.reusable_pages + stats.cached_pages <= stats.total_pages
    rig.assert_baseline()


@BOTH_LOOPS
def test_eos_ends_with_stop_and_costs_at_most_one_row(overlap):
    rig = Rig(async_scheduling=overlap, vocab=8)
    req = request("a", (1, 2, 3), max_tokens=200)
    rig.engine.submit(req)
    rig.finish()
    assert rig.tokens("a")[-1] == EOS and rig.end("a").finish_reason == "stop"
    assert rig.engine.stats().wasted_rows == (1 if overlap else 0)
    rig.assert_baseline()


@BOTH_LOOPS
def test_min_tokens_stop_ids_and_ignore_eos(overlap):
    rig = Rig(async_scheduling=overlap, vocab=8, max_len=128)
    requests = [
        request("min", (1, 2, 3), max_tokens=60, min_tokens=25),
        request("stop", (1, 2, 3), max_tokens=60, stop_token_ids=(5,), ignore_eos=True),
        request("ignore", (1, 2, 3), ignore_eos=True),
    ]
    for req in requests:
        rig.engine.submit(req)
    rig.finish()
    for req in requests:
        assert_as_alone(rig, req)
    assert len(rig.tokens("min")) >= 25
    assert rig.tokens("stop")[-1] == 5 and EOS in rig.tokens("ignore")
    assert len(rig.tokens("ignore")) == rig.max_len - 3


def test_logprobs_are_delivered_as_asked():
    rig = Rig()
    for name, logprobs in (("none", None), ("chosen", 0), ("best", 1)):
        rig.engine.submit(request(name, 5, max_tokens=1, logprobs=logprobs))
    rig.finish()
    none, chosen, best = rig.end("none"), rig.end("chosen"), rig.end("best")
    assert (none.logprob, none.top_logprobs) == (None, ())
    assert chosen.token and best.token
    assert (chosen.logprob, chosen.top_logprobs) == (-chosen.token, ())
    assert best.top_logprobs == ((best.token, -best.token),)


def test_chunks_and_decodes_share_steps_within_the_budget():
    rig = Rig(max_tokens_per_step=20, max_chunk=8)
    rig.engine.submit(request("a", 4, max_tokens=12, ignore_eos=True))
    rig.turn()
    rig.engine.submit(request("b", 60, max_tokens=2, ignore_eos=True))
    rig.finish()
    mixed = [b for b in rig.executor.batches if sorted(len(r.tokens) for r in b.rows) == [1, 19]]
    assert mixed, "with ample memory the prompt takes all that decodes leave"
    assert rig.executor.largest_step <= 20


@BOTH_LOOPS
def test_preemption_by_recompute_changes_no_token(overlap):
    rig = Rig(async_scheduling=overlap, pages=8, admit_below=1.0, max_len=400)
    requests = [request(name, 60, max_tokens=150, ignore_eos=True, seed=3) for name in "abcd"]
    for req in requests:
        rig.engine.submit(req)
    rig.finish()
    assert rig.engine.stats().preemptions > 0 and rig.engine.stats().recomputed_tokens > 0
    for req in requests:
        assert_as_alone(rig, req)
    rig.assert_baseline()


@BOTH_LOOPS
def test_behaviour_51_cancel_frees_within_one_step(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.engine.submit(request("a", 30, ignore_eos=True))
    rig.engine.submit(request("b", 30, max_tokens=30, ignore_eos=True))
    for _ in range(6):
        rig.turn()
    rig.engine.cancel("a")
    rig.turn()
    assert rig.end("a").finish_reason == "cancelled" and rig.end("a").token is None
    assert len(rig.executor.sequences) == 1
    rig.engine.cancel("a")
    rig.engine.cancel("unknown")
    rig.finish()
    assert len(rig.tokens("b")) == 30
    rig.assert_baseline()


def test_cancel_while_waiting_and_with_a_reason():
    rig = Rig(max_seqs=1)
    rig.engine.submit(request("a", 3, max_tokens=5, ignore_eos=True))
    rig.engine.submit(request("b", 3, max_tokens=5))
    rig.turn()
    rig.engine.cancel("b", "stop")
    rig.finish()
    assert rig.end("b").finish_reason == "stop" and rig.tokens("b") == []
    with pytest.raises(RequestRefused, match="invalid_parameter"):
        rig.engine.cancel("a", "because")  # pyright: ignore[reportArgumentType]


@BOTH_LOOPS
def test_a_failed_step_fails_its_requests_only(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.fail_steps = {3}
    rig.engine.submit(request("a", 5, ignore_eos=True))
    rig.engine.submit(request("b", 5, ignore_eos=True))
    for _ in range(3):
        rig.turn()
    late = request("late", 5, max_tokens=7, ignore_eos=True)
    rig.turn()
    rig.engine.submit(late)
    rig.finish()
    for name in "ab":
        assert rig.end(name).finish_reason == "error" and rig.end(name).error == "device_error: step failed"
    assert_as_alone(rig, late)
    assert (rig.engine.stats().failed, rig.engine.stats().failed_steps) == (2, 1)
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_step_that_cannot_be_launched_fails_its_requests_only(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.refuse_steps = {2}
    rig.executor.refuse_attach = {"c"}
    for name in "abc":
        rig.engine.submit(request(name, 5, ignore_eos=True))
    for _ in range(4):
        rig.turn()
    late = request("late", 5, max_tokens=7, ignore_eos=True)
    rig.engine.submit(late)
    rig.finish()
    assert {rig.end(name).error for name in "ab"} == {"device_error: cannot launch"}
    assert rig.end("c").error == "device_error: no sampler state left"
    assert_as_alone(rig, late)
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_numeric_error_fails_one_request(overlap):
    rig = Rig(async_scheduling=overlap)
    rig.executor.numeric_errors = {("a", 3)}
    other = request("b", 5, max_tokens=9, ignore_eos=True)
    rig.engine.submit(request("a", 5, max_tokens=9, ignore_eos=True))
    rig.engine.submit(other)
    rig.finish()
    assert (rig.end("a").error or "").startswith("numeric_error") and len(rig.tokens("a")) == 3
    assert_as_alone(rig, other)
    rig.assert_baseline()


@BOTH_LOOPS
def test_a_mapping_that_fails_ends_one_request(overlap):
    rig = Rig(async_scheduling=overlap, group_bytes=4096)
    others = [request(name, 5, max_tokens=9, ignore_eos=True) for name in "bc"]
    rig.engine.submit(request("a", 10, max_tokens=20, ignore_eos=True))
    for _ in range(3):
        rig.turn()

    def refuse(page, address, writable=True):
        raise MemoryFault("memory_unavailable", "mmap failed")

    rig.memory.map, works = refuse, rig.memory.map
    for _ in range(20):
        rig.turn()
    rig.memory.map = works
    for req in others:
        rig.engine.submit(req)
    rig.finish()
    assert rig.end("a").error == "memory_unavailable: mmap failed"
    assert len(rig.tokens("a")) == 7 - overlap, "a token in flight is dropped"
    for req in others:
        assert_as_alone(rig, req)
    rig.assert_baseline()


def test_stats_tell_how_long_the_first_request_waits():
    rig = Rig(max_seqs=1)
    rig.engine.submit(request("a", 5, max_tokens=20, ignore_eos=True))
    rig.engine.submit(request("b", 5, max_tokens=1))
    for _ in range(6):
        rig.turn()
    assert rig.engine.stats().oldest_wait_s == 5.0 and rig.engine.why == ("b: no free slot",)
    rig.finish()
    assert rig.engine.stats().oldest_wait_s == 0.0


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (Request("x", ()), "empty_prompt"),
        (Request("x", (1, 50)), "token_out_of_range"),
        (Request("x", (1, -1)), "token_out_of_range"),
        (Request("x", (1,), SamplingParams(logit_bias={50: 1.0})), "token_out_of_range"),
        (request("x", 256), "context_length_exceeded"),
        (request("x", 200, max_tokens=57), "context_length_exceeded"),
        (request("x", 200, max_tokens=10), "exceeds_capacity"),
    ],
)
def test_what_can_never_run_is_refused(bad, code):
    rig = Rig(pages=3)
    with pytest.raises(RequestRefused) as refusal:
        rig.engine.submit(bad)
    assert refusal.value.code == code
    assert not rig.busy and rig.engine.stats().accepted == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"min_tokens": 4, "max_tokens": 3},
        {"repetition_penalty": 0.0},
        {"logit_bias": {1: float("inf")}},
        {"logprobs": -1},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestRefused, match=f"invalid_parameter: {next(iter(bad))}"):
        SamplingParams(**bad)


def test_without_max_tokens_generation_ends_at_the_smaller_of_context_and_pool():
    rig = Rig(pages=3)
    rig.engine.submit(request("a", 20, ignore_eos=True))
    rig.finish()
    assert len(rig.tokens("a")) == rig.engine.pool.plan.tokens_for(3) + 1 - 20
    rig.assert_baseline()


def test_a_full_queue_and_a_duplicate_are_refused():
    rig = Rig(queue_limit=2, max_seqs=1)
    for name in "ab":
        rig.engine.submit(request(name, 5, max_tokens=3))
    with pytest.raises(RequestRefused, match="queue_full"):
        rig.engine.submit(request("c", 5))
    rig.turn()
    with pytest.raises(RequestRefused, match="duplicate_request"):
        rig.engine.submit(request("a", 5))
    rig.finish()
    rig.engine.submit(request("a", 5, max_tokens=1))
    rig.finish()


def test_two_runs_take_the_same_decisions():
    def batches():
        rig = Rig(pages=6, admit_below=1.0)
        for name in "abcdef":
            rig.engine.submit(request(name, 50, max_tokens=60, ignore_eos=True))
        rig.finish()
        return rig.executor.batches

    assert batches() == batches()
