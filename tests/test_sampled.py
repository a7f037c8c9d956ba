"""Sampling parameters through the public surface: the embedded model, a real server, the official client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.models import HYBRIDS, build
from tests.servers import serving
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.offline import LLM
from xllm.runtime.request import PromptLogprobs, joined

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


def forced(llm: LLM, prompt: list[int], at: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """What the model gives to a token of a prompt when it is the only one that may be drawn there."""
    asked: dict[str, Any] = {"max_tokens": 1, "logprobs": 2, "ignore_eos": True}
    [answer] = llm.generate([prompt[:at]], allowed_token_ids=(prompt[at],), **asked)
    return answer.logprobs[0], answer.top_logprobs[0]


def test_logprobs_of_a_prompt_are_those_of_drawing_it(llm: LLM) -> None:
    """Bit by bit, whatever is cached of the prompt; and asking for them changes no answer."""
    prompt = llm.codec.encode(ASK * 3, False)
    options: dict[str, Any] = {"temperature": 1, "seed": 5, "max_tokens": 8, "logprobs": 1}
    [plain] = llm.generate([prompt], **options)
    both = llm.generate([prompt, prompt[:5]], prompt_logprobs=2, **options)
    assert [(token.token, len(token.best)) for token in both[0].prompt] == [(token, 2) for token in prompt[1:]]
    assert (both[0].tokens, both[0].logprobs) == (plain.tokens, plain.logprobs)
    assert both[1].prompt == both[0].prompt[:4]
    for at in (1, 2, 15, 16, 17, len(prompt) - 1):
        found = both[0].prompt[at - 1]
        assert (found.logprob, found.best) == forced(llm, prompt, at)
        assert found.rank == 1 if found.token == found.best[0][0] else found.rank > 1
    assert llm.generate([prompt[:1]], prompt_logprobs=2, **options)[0].prompt == ()


def test_logprobs_of_a_prompt_in_a_model_with_state(tmp_path: Path) -> None:
    """State that is written over must be written once."""
    build(tmp_path, HYBRIDS["qwen3-next"], options=CompileOptions(max_len=64, max_seqs=3))
    prompt = [*range(3, 30)]
    with LLM(tmp_path / "tiny.xllm", threads=1) as llm:
        [plain] = llm.generate([prompt], temperature=0, max_tokens=6, logprobs=0)
        [scored] = llm.generate([prompt], temperature=0, max_tokens=6, logprobs=0, prompt_logprobs=2)
        assert replace(scored, prompt=()) == plain
        for at in (1, 9, 26):
            assert (scored.prompt[at - 1].logprob, scored.prompt[at - 1].best) == forced(llm, prompt, at)
        [beams] = llm.beam_search([prompt], 1, 6)
        assert beams[0].tokens == plain.tokens


def test_answers_show_the_logprobs_of_their_prompts(client: openai.OpenAI, llm: LLM) -> None:
    prompts = [llm.codec.encode(text, False) for text in (ASK, "Once upon a time", "A")]
    found = complete(client, {"prompt_logprobs": 1}, prompt=prompts, n=2, temperature=1)
    for index, choice in enumerate(found.choices):
        ids, shown = prompts[index // 2], choice.prompt_logprobs
        assert len(shown) == len(ids) and shown[0] is None
        for token, place in zip(ids[1:], shown[1:], strict=True):
            assert 1 <= len(place) <= 2 and min(item["rank"] for item in place.values()) == 1
            assert place[str(token)]["decoded_token"] == llm.codec.token_text(token)
    chat: Any = [{"role": "user", "content": "hi"}]
    name = client.models.list().data[0].id
    said: Any = client.chat.completions.create(
        model=name, messages=chat, max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    assert len(said.prompt_logprobs) == said.usage.prompt_tokens
    assert not hasattr(complete(client).choices[0], "prompt_logprobs")
    for fields in ({"stream": True}, {"extra_body": {"prompt_logprobs": 1, "beam_width": 2}}):
        with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
            client.completions.create(**{"model": name, "prompt": "a", "extra_body": {"prompt_logprobs": 1}, **fields})


def test_parts_of_a_prompt_that_was_begun_again_are_one() -> None:
    """A preempted prompt is computed again, in other chunks."""

    def part(first: int, last: int, mark: float) -> PromptLogprobs:
        size = last - first + 1
        ids, wide = np.full((size, 1), first, np.int32), np.full((size, 1), mark, np.float32)
        return PromptLogprobs(
            first, np.full(size, mark, np.float32), np.arange(first, last + 1, dtype=np.int32), ids, wide
        )

    parts = [part(1, 10, 1), part(11, 20, 2), part(1, 7, 3), part(8, 15, 4), part(1, 12, 5), part(13, 30, 6)]
    whole = joined(parts)
    assert whole.start == 1 and whole.ranks.tolist() == [*range(1, 31)]
    assert whole.logprobs.tolist() == [5.0] * 12 + [6.0] * 18


def test_behaviour_35_slots_are_answered_in_order_with_what_would_stand_there(client: openai.OpenAI, llm: LLM) -> None:
    """The same bits as a draw in the slot's place; a slot that nothing precedes has none."""

    def sample(prompt: str, value: str, **fields: Any) -> Any:
        body = {"prompt": prompt, "selector": {"type": "literal", "value": value}, **fields}
        return client.post("/sample", body=body, cast_to=object)

    slot = "<|im_end|>"
    text = f"{slot}Once upon a{slot} the{slot} fox"
    ids = llm.codec.encode(text, True)
    places = [at for at, token in enumerate(ids) if token == ids[0]]
    found = sample(text, slot, logprobs=3)
    assert found["object"] == "sample_completion" and [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    reasons = [choice["finish_reason"] for choice in found["choices"]]
    assert len(places) == 3 and reasons == ["empty_logprobs", "selector_match", "selector_match"]
    for place, choice in zip(places[1:], found["choices"][1:], strict=True):
        [drawn] = llm.generate([ids[:place]], temperature=0, max_tokens=1, logprobs=3, ignore_eos=True)
        assert choice["logprobs"]["token_ids"] == [[token for token, _ in drawn.top_logprobs[0]]]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(list(drawn.logprobs), abs=0)
        assert choice["text"] == llm.codec.token_text(drawn.tokens[0])
    assert sample("no slot here", slot)["choices"] == []
    assert found["usage"]["prompt_tokens"] == len(ids) and found["usage"]["completion_tokens"] == 2
