"""Answers that go on with a given text, and reasoning that has to end: what the model gets, and how it is read."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import numpy as np
import pytest

from tests.service.fakes import CHAT_TEMPLATE, VOCAB, Script, fake, fake_service, ids, running
from tests.service.test_tools import TEMPLATE, WEATHER
from xllm.service.budget import Bounded
from xllm.service.parsers.reading import Dialect
from xllm.service.tokenizer import TextCodec

CHAT = "/v1/chat/completions"
SAY: list[Any] = [{"role": "user", "content": "weather?"}]
HARMONY = CHAT_TEMPLATE + "{# <|channel|> tools #}"


@pytest.fixture(scope="module")
def served(tmp_path_factory, script):
    service = fake_service(tmp_path_factory.mktemp("begun"), template=TEMPLATE, reply=script)
    with running(service) as (base, _):
        yield base, service


@pytest.fixture
def claude(served):
    with anthropic.Anthropic(base_url=served[0], api_key="none", max_retries=0, timeout=30) as client:
        yield client


def prompt(service: Any) -> str:
    return service.codec.decode(fake(service).seen[-1].prompt, skip_special_tokens=False)


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | fields


def chat(base: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(base + CHAT, json={"messages": SAY} | fields, timeout=30)
    return answer.json()["choices"][0] if answer.status_code == 200 else answer.json()["error"]


def test_a_message_goes_on_where_it_ends(served, claude, script):
    script.text = " is sunny. <think>a word</think>"
    answer = claude.messages.create(model="fake", max_tokens=99, messages=[*SAY, said("It")])
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": script.text}]
    assert prompt(served[1]) == "<|start|>user\nweather?<|end|><|start|>assistant\nIt"
    told: dict[str, Any] = {"messages": [*SAY, said("It ")], "continue_final_message": True}
    assert chat(served[0], **told, add_generation_prompt=False)["message"]["content"] == script.text
    assert prompt(served[1]).endswith("assistant\nIt ")


def test_reasoning_goes_on_where_it_is_open(served, script):
    script.text = " so</think>Sunny."
    told = {"messages": [*SAY, said("<think>It is noon,")], "continue_final_message": True}
    message = chat(served[0], **told)["message"]
    assert (message["reasoning_content"], message["content"]) == ("so", "Sunny.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": SAY}, "continue_final_message"),
        ({"messages": [*SAY, said("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]},
         "continue_final_message"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_what_can_not_go_on(served, fields, param):
    error = chat(served[0], **{"messages": [*SAY, said("It")], "continue_final_message": True} | fields)
    assert error["param"] == param, error


def test_a_template_that_hides_the_last_message_is_told(tmp_path):
    with running(fake_service(tmp_path, template="{{ messages[0].content }}")) as (base, _):
        error = chat(base, messages=[*SAY, said("It")], continue_final_message=True)
        assert error["code"] == "unsupported_parameter" and "chat template" in error["message"]


def test_white_space_at_the_end_is_left_to_the_answer(claude):
    with pytest.raises(anthropic.BadRequestError, match="white space"):
        claude.messages.create(model="fake", max_tokens=9, messages=[*SAY, said("It ")])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 5, 500])
def test_reasoning_has_a_budget(served, claude, script, budget, stream):
    script.text = "x" * 20
    thinking = {"type": "enabled", "budget_tokens": budget}
    with claude.messages.stream(model="fake", max_tokens=60, messages=SAY, extra_body={"thinking": thinking}) as events:
        answer = events.get_final_message()
    if not stream:
        answer = claude.messages.create(model="fake", max_tokens=60, messages=SAY, extra_body={"thinking": thinking})
    found = [block.to_dict() for block in answer.content]
    thoughts = "".join(block["thinking"] for block in found if block["type"] == "thinking")
    texts = "".join(block["text"] for block in found if block["type"] == "text")
    if budget == 500:
        assert (thoughts, texts) == (script.text, "")
    else:  # forced tokens take the places of those that the model would have written
        assert thoughts == "x" * budget and set(texts) <= {"x"}
        assert len(texts) == max(0, 20 - budget - len("</think>"))


def test_a_budget_needs_thinking_that_is_enabled(claude):
    for thinking in ({"type": "disabled", "budget_tokens": 5}, {"type": "enabled", "budget_tokens": -1}):
        with pytest.raises(anthropic.BadRequestError, match=r"thinking\.budget_tokens"):
            claude.messages.create(model="fake", max_tokens=9, messages=SAY, extra_body={"thinking": thinking})


def test_a_budget_and_a_form(served, script):
    script.text = "x" * 40
    told = {"structured_outputs": {"choice": ["yes"]}, "thinking_token_budget": 3}
    message = chat(served[0], **told)["message"]
    assert (message["reasoning_content"], message["content"]) == ("xxx", "yes")


def allowed(matcher: Any) -> list[int]:
    mask = np.zeros(VOCAB // 32, np.uint32)
    matcher.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("dialect", [Dialect(reasoning="qwen3"), Dialect("harmony", "harmony")])
def test_reasoning_that_the_answer_opens_is_counted(served, dialect):
    """What is before it, and what comes after, is free; both ways to bring tokens lead to the same masks."""
    codec: TextCodec = served[1].codec
    opening = "<think>" if dialect.tools == "none" else "<|channel|>analysis<|message|>"
    grammar = Bounded(None, dialect.reading(), 2, codec, VOCAB)
    closing = list(grammar.closing)
    matcher, other = grammar.start(), grammar.start()
    written = ids(f"{opening}ab")
    for token in written:
        assert len(allowed(matcher)) == VOCAB
        matcher.take([token])
    other.take(written)
    for token in closing:
        assert allowed(matcher) == allowed(other) == [token]
        matcher.take([token])
        other.take([token])
    for token in ids("free <think>"):
        assert len(allowed(matcher)) == VOCAB
        matcher.take([token])


def test_a_call_is_forced_from_a_model_that_writes_in_channels(tmp_path):
    script = Script()
    script.text = '[{"name": "weather", "arguments": {"city": "Bern"}}]'
    service = fake_service(tmp_path, template=HARMONY, reply=script)
    with running(service) as (base, _):
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            found = chat(base, tools=[WEATHER], tool_choice=choice)
            [call] = found["message"]["tool_calls"]
            assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
            assert prompt(service).endswith("assistant\n<|channel|>commentary<|message|>")
        script.text = "sunny<|return|>"
        goes_on = chat(base, messages=[*SAY, said("It is ")], continue_final_message=True)
        assert goes_on["message"]["content"] == "sunny"
