"""The official client drives everything: models, completions, chat, streams, n, logprobs, stop, seed, errors."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.service.fakes import MAX_LEN, ids

SAY: list[Any] = [{"role": "user", "content": "grüße 😀"}]
PROMPT_OF_SAY = "user\ngrüße 😀assistant\n"  # what the fake engine repeats: the prompt without special tokens


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("prompt", ["hello", ids("hello")])
def test_behaviour_33_a_completion_has_its_usage(client, prompt):
    answer = client.completions.create(model="fake", prompt=prompt)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_length_and_ignored_eos(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=7, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == "abcabc"  # 7 tokens, one of them the hidden EOS
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_several_prompts_and_samples(client):
    answer = client.completions.create(model="fake", prompt=["one", "two"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == ["oneone", "oneone", "twotwo", "twotwo"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 6
    answer = client.completions.create(model="fake", prompt=[ids("a"), ids("b")])
    assert [choice.text for choice in answer.choices] == ["a", "b"]


def test_completion_logprobs(client):
    logprobs = client.completions.create(model="fake", prompt="ab", logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "b"]
    assert logprobs.token_logprobs == [-0.5, -0.5]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.top_logprobs[0]["a"] == -0.5
    assert len(logprobs.top_logprobs[0]) == 3  # the two best and the chosen one


def test_streamed_completion_equals_the_whole(client):
    arguments: dict[str, Any] = {"model": "fake", "prompt": "grüße 😀 日本", "logprobs": 1}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text == "grüße 😀 日本"
    assert not any("\N{REPLACEMENT CHARACTER}" in choice.text for choice in choices)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets == whole.choices[0].logprobs.text_offset


def test_chat(client):
    answer = client.chat.completions.create(model="fake", messages=SAY, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", PROMPT_OF_SAY)
    assert choice.finish_reason == "stop"
    assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes).decode() == PROMPT_OF_SAY
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.object == "chat.completion"


def test_streamed_chat_with_samples(client):
    stream = client.chat.completions.create(
        model="fake", messages=SAY, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, roles, reasons, usage = ["", "", ""], [], [], None
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.append(choice.delta.role) if choice.delta.role else None
            reasons.append(choice.finish_reason) if choice.finish_reason else None
    assert texts == [PROMPT_OF_SAY] * 3
    assert roles == ["assistant"] * 3
    assert reasons == ["stop"] * 3
    assert usage is not None
    assert usage.completion_tokens == 3 * (len(PROMPT_OF_SAY.encode()) + 1)


def test_behaviour_34_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].message.content == "system\nduser\na\nbassistant\n"


def test_an_answer_can_be_sent_back(client):
    answer = client.chat.completions.create(model="fake", messages=SAY)
    client.chat.completions.create(model="fake", messages=[*SAY, answer.choices[0].message, *SAY])


@pytest.mark.parametrize("stream", [False, True])
def test_behaviour_54_stop_strings_are_cut_and_never_leak(client, served, stream):
    arguments: dict[str, Any] = {
        "model": "fake",
        "prompt": "one, two. three",
        "stop": ["o. th", "never"],
        "logprobs": 0,
    }
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**arguments, stream=True)]
    else:
        choices = client.completions.create(**arguments).choices
    assert "".join(choice.text for choice in choices) == "one, tw"
    assert choices[-1].finish_reason == "stop"
    assert "".join(token for choice in choices for token in choice.logprobs.tokens) == "one, tw"
    assert served[1].engine.stats().running == 0


def test_stop_ids_end_without_their_text(client):
    answer = client.completions.create(model="fake", prompt="abcd", extra_body={"stop_token_ids": ids("c")})
    assert answer.choices[0].text == "ab"


def test_special_tokens_are_shown_when_asked_for(client):
    arguments: dict[str, Any] = {"model": "fake", "prompt": "ab", "max_tokens": 3}
    answer = client.completions.create(**arguments, extra_body={"skip_special_tokens": False, "ignore_eos": True})
    assert answer.choices[0].text == "ab<|end|>"


def test_seed(client):
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model="fake", prompt="x", seed=seed, n=2)
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert first == ask(7) != ask(8)
    assert first[0] != first[1]  # same seed, other sample index


def test_sampling_fields_reach_the_engine(client, served):
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [9]}
    client.completions.create(
        model="fake",
        prompt="abc",
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"5": -100},
        seed=11,
        max_tokens=9,
        user="someone",
        best_of=1,
        extra_body=extra,
    )
    params = served[1].engine.seen[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0.5, 7, 0.9, 0.1, 11)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.2, -0.3, 1.1)
    assert (params.logit_bias, params.max_tokens, params.min_tokens) == ({5: -100.0}, 9, 2)
    assert (params.stop_token_ids, params.ignore_eos, params.logprobs) == ((9,), False, None)


def test_what_is_left_of_the_context_is_the_default_length(client, served):
    client.completions.create(model="fake", prompt="abc")
    assert served[1].engine.seen[-1].params.max_tokens == MAX_LEN - 3


def test_errors_are_typed(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nope", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="fake", messages=SAY, temperature=3)
    assert wrong.value.param == "temperature"
    assert wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as stream:
        client.completions.create(model="fake", prompt="x" * 5000, stream=True)
    assert stream.value.code == "context_length_exceeded"
    assert "2048" in stream.value.message
