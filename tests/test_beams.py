"""Beam search end to end: transformers' own definition over the same weights, the API, and the same answers whatever
else runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import FAMILIES, build
from tests.servers import Server, serving
from tests.service.fakes import wait_for
from xllm.compiler import CompileOptions
from xllm.offline import LLM
from xllm.runtime import RequestRefused

PROMPTS = [[5, 9, 2, 33, 7], [*range(20, 60)], [3]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("beams"), FAMILIES["qwen3"], options=CompileOptions(max_len=256, max_seqs=8))


@pytest.fixture(scope="module")
def llm(built: tuple[Path, Path]) -> Iterator[LLM]:
    with LLM(built[1], threads=1) as running:
        yield running


@pytest.mark.parametrize("ends", [0, 1, 4])
@pytest.mark.parametrize(("penalty", "stopping"), [(1.0, False), (0.0, "never"), (2.0, True), (-0.5, False)])
def test_what_transformers_finds(built: tuple[Path, Path], llm: LLM, penalty: float, stopping: Any, ends: int) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(built[0], dtype=torch.float32).eval()
    for prompt in PROMPTS:
        often = [int(token) for token in model(torch.tensor([prompt])).logits[0, -1].topk(9)[1][2::2]][:ends]
        found = model.generate(
            torch.tensor([prompt]), num_beams=5, num_return_sequences=5, max_new_tokens=12, do_sample=False,
            length_penalty=penalty, early_stopping=stopping, eos_token_id=often or None, pad_token_id=1,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        [ours] = llm.beam_search(
            prompt, 5, 12, length_penalty=penalty, early_stopping=stopping, stop_token_ids=tuple(often), ignore_eos=True
        )
        theirs = [row[len(prompt) :].tolist() for row in found.sequences]
        for answer, wanted, score in zip(ours, theirs, found.sequences_scores.tolist(), strict=True):
            length = len(answer.tokens)
            assert list(answer.tokens) == wanted[:length] and set(wanted[length:]) <= {1}
            assert answer.score == pytest.approx(score, abs=1e-4)


def test_beams_do_not_depend_on_what_else_runs(built: tuple[Path, Path], llm: LLM) -> None:
    """Alone or together, with others beside them, with and without the prefix cache: the same bits."""
    alone = [llm.beam_search(prompt, 4, 10, ignore_eos=True)[0] for prompt in PROMPTS]
    assert llm.beam_search(PROMPTS, 4, 10, ignore_eos=True) == alone
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(lambda: llm.generate(PROMPTS * 8, temperature=1, seed=1, max_tokens=20))
        assert llm.beam_search(PROMPTS, 4, 10, ignore_eos=True) == alone
        beside.result()
    with LLM(built[1], threads=1, prefix_cache=False) as other:
        assert other.beam_search(PROMPTS, 4, 10, ignore_eos=True) == alone


def test_beams_that_no_step_holds_are_refused(llm: LLM, client: openai.OpenAI) -> None:
    with pytest.raises(RequestRefused, match="beam_width is 9, a step holds 8 sequences"):
        llm.beam_search(PROMPTS[0], 9, 4)
    with pytest.raises(openai.BadRequestError, match="raise max_seqs") as refused:
        client.completions.create(model="tiny", prompt="a", max_tokens=4, extra_body={"beam_width": 9})
    assert refused.value.code == "exceeds_capacity"


def test_what_shapes_a_draw_shapes_beams(llm: LLM) -> None:
    [plain] = llm.beam_search(PROMPTS[0], 3, 8, ignore_eos=True, logprobs=2)
    banned = plain[0].tokens[3:5]
    [other] = llm.beam_search(PROMPTS[0], 3, 8, ignore_eos=True, logit_bias={banned[0]: -100.0})
    assert all(banned[0] not in answer.tokens for answer in other)
    [few] = llm.beam_search(PROMPTS[0], 3, 8, ignore_eos=True, allowed_token_ids=(4, 5))
    assert {token for answer in few for token in answer.tokens} == {4, 5} and len(set(few)) == 3
    [formed] = llm.beam_search(PROMPTS[0], 3, 20, structured_outputs={"choice": ["yes", "no", "maybe"]})
    assert {answer.text for answer in formed} == {"yes", "no", "maybe"}
    for answer in plain:
        assert answer.score == pytest.approx(np.mean(answer.logprobs), abs=1e-5)
        assert [len(best) for best in answer.top_logprobs] == [2] * 8


@pytest.fixture(scope="module")
def server(built: tuple[Path, Path]) -> Iterator[Server]:
    with serving(built[1], "--memory", "256MiB", "--log-level", "error") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_both_routes_answer_with_the_best_beams(client: openai.OpenAI, llm: LLM) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "extra_body": {"beam_width": 4, "num_return_sequences": 2}}
    found = client.completions.create(prompt=PROMPTS, logprobs=1, **ask)
    expected = llm.beam_search(PROMPTS, 4, 8, num_return_sequences=2, logprobs=1)
    assert [choice.text for choice in found.choices] == [answer.text for both in expected for answer in both]
    assert [choice.index for choice in found.choices] == list(range(6))
    assert found.usage is not None and found.usage.prompt_tokens == sum(map(len, PROMPTS))
    for choice, answer in zip(found.choices, (answer for both in expected for answer in both), strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        shown = choice.logprobs.token_logprobs
        assert shown == pytest.approx(answer.logprobs[: len(shown)], abs=1e-6)
    chat: Any = [{"role": "user", "content": "hi"}]
    said = client.chat.completions.create(messages=chat, **ask)
    assert [choice.message.content for choice in said.choices] == [
        answer.text for answer in llm.beam_search({"messages": chat}, 4, 8, num_return_sequences=2)[0]
    ]


def test_behaviour_28_a_search_asks_for_the_logprobs_it_needs_and_shows_those_asked_for(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 6, "extra_body": {"beam_width": 3}}
    without, shown = client.completions.create(**ask), client.completions.create(**ask, logprobs=1)
    assert [choice.text for choice in without.choices] == [choice.text for choice in shown.choices]
    assert all(choice.logprobs is None for choice in without.choices)
    for choice in shown.choices:
        assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
        assert all(1 <= len(best) <= 2 for best in choice.logprobs.top_logprobs), "the best, and the chosen one"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 129}, "beam_width"),
        ({"beam_width": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"length_penalty": 1}, "length_penalty"),
        ({"beam_width": 2, "length_penalty": 11}, "length_penalty"),
        ({"beam_width": 2, "early_stopping": "often"}, "early_stopping"),
        ({"beam_width": 2, "temperature": 0.5}, "temperature"),
        ({"beam_width": 2, "n": 2}, "n"),
        ({"beam_width": 2, "stop": "a"}, "stop"),
        ({"beam_width": 2, "stream": True}, "stream"),
    ],
)
def test_what_a_search_can_not_have_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", max_tokens=4, extra_body=fields)
    assert refused.value.param == param


def test_a_search_ends_with_its_client(server: Server, client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 200, "beam_width": 8, "ignore_eos": True}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/completions", json=body | {"early_stopping": "never"}, timeout=0.05)
    wait_for(lambda: server.metric("num_concurrent_requests") == 0)
    steps = server.metric("num_processing_tokens_total_generated")
    assert client.completions.create(model="tiny", prompt=PROMPTS[1], max_tokens=1).choices
    assert server.metric("num_processing_tokens_total_generated") == steps + 1
