"""Sampling parameters through the public surface: the embedded model, a real server, the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.servers import serving
from xllm.compiler import compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.offline import LLM

ASK = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n"
TOLD: dict[str, Any] = {"prompt": ASK, "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampled") / "story.xllm"
    compile_checkpoint(checkpoint_path(), path)
    return path


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Iterator[LLM]:
    with LLM(artifact, threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def client(artifact: Path) -> Iterator[openai.OpenAI]:
    with serving(artifact, "--memory", "256MiB", "--log-level", "error") as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0)


def complete(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    return client.completions.create(model=client.models.list().data[0].id, **{**TOLD, **fields}, extra_body=extra)


def test_bad_words_and_allowed_ids_shape_the_answer(client: openai.OpenAI, llm: LLM) -> None:
    text = complete(client).choices[0].text
    words = [word.strip(".,") for word in text.split()[:6]]
    other = complete(client, {"bad_words": words}).choices[0].text
    assert other and not set(words) & {word.strip(".,") for word in other.split()}
    assert complete(client, {"bad_words": [f"{words[0]} {words[1]}"]}).choices[0].text.split()[:2] != words[:2]
    ids = llm.codec.encode(" the fox ran home", False)
    answer = complete(client, {"allowed_token_ids": ids}, logprobs=3)
    assert set(answer.choices[0].logprobs.token_ids) <= set(ids)
    assert llm.generate([ASK], temperature=0, max_tokens=24, bad_words=words)[0].text == other


def test_what_leaves_nothing_to_draw_is_told(client: openai.OpenAI, llm: LLM) -> None:
    [token] = llm.codec.encode("a", False)
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, {"allowed_token_ids": [token], "bad_words": ["a"]})
    assert refused.value.code == "nothing_allowed"
    assert complete(client).choices[0].text


@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_best_of_many_are_those_of_the_highest_likelihood(client: openai.OpenAI, logprobs: int | None) -> None:
    ask: dict[str, Any] = {"prompt": [ASK, "Once"], "temperature": 1, "seed": 7, "max_tokens": 8}
    every = complete(client, {"ignore_eos": True}, **ask, n=5, logprobs=0).choices
    best = complete(client, {"ignore_eos": True}, **ask, n=2, best_of=5, logprobs=logprobs)
    expected = []
    for of_prompt in (every[:5], every[5:]):
        expected += sorted(of_prompt, key=lambda choice: -sum(choice.logprobs.token_logprobs))[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all((choice.logprobs is None) == (logprobs is None) for choice in best.choices)
    assert best.usage.completion_tokens == 2 * 5 * 8


def test_processed_logprobs_are_those_of_the_draw(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"temperature": 0.7, "seed": 3, "logprobs": 5, "max_tokens": 4}
    raw = complete(client, {"top_k": 2}, **ask).choices[0]
    drawn = complete(client, {"top_k": 2, "logprobs_mode": "processed"}, **ask).choices[0]
    assert raw.text == drawn.text and raw.logprobs.tokens == drawn.logprobs.tokens
    for one, other in zip(raw.logprobs.top_logprobs, drawn.logprobs.top_logprobs, strict=True):
        assert len(other) == 2 < len(one) and list(other) == list(one)[:2]
