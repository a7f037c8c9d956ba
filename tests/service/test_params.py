"""Bodies become jobs or typed refusals, whatever is in them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.service.fakes import CHAT_TEMPLATE, MAX_LEN, VOCAB, byte_tokenizer
from xllm.service.body import NOT_SUPPORTED, ChatBody, CompletionBody, parse
from xllm.service.errors import ApiError
from xllm.service.params import Job, chat_job, completion_job
from xllm.service.sampling import ModelFacts, default_sampling
from xllm.service.template import ChatTemplate
from xllm.service.tokenizer import TextCodec

CODEC = TextCodec(byte_tokenizer())
TEMPLATE = ChatTemplate(CHAT_TEMPLATE)
FIELDS = tuple(dict.fromkeys((*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__, *NOT_SUPPORTED, "x.y\n")))
VALUES: list[Any] = [None, True, False, 0, 1, -1, 1.5, 10**20, 10**400, float("nan"), float("inf"), "", "a", "\ud800"]
VALUES += [[], [1], ["a"], [[1]], [[]], {}, [None], [1] * 3000, {"1": 2}, {"include_usage": True}, {"type": "text"}]
VALUES += [[{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}], [{"role": []}], [{}]]


def plan(data: bytes, chat: bool = False, defaults: dict[str, float] | None = None) -> Job:
    facts = ModelFacts("fake", VOCAB, MAX_LEN, defaults or {})
    if chat:
        return chat_job(parse(data, ChatBody), facts, CODEC.encode, TEMPLATE.render)
    return completion_job(parse(data, CompletionBody), facts, CODEC.encode, CODEC.decode)


def test_random_bodies_are_planned_or_refused_by_name():
    draw = random.Random(0)
    planned = 0
    for _ in range(3000):
        chat = draw.random() < 0.5
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        for _ in range(draw.randint(0, 3)):
            body[draw.choice(FIELDS)] = draw.choice(VALUES)
        data = bytearray(json.dumps(body).encode())
        if draw.random() < 0.1:
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        try:
            plan(bytes(data), chat)
            planned += 1
        except ApiError as error:
            assert error.status == 400
            assert error.message.isprintable()
            json.dumps(error.body("id")).encode()
    assert planned > 300


def test_the_cost_of_a_body_is_bounded_by_its_bytes():
    """Millions of empty lists in a few megabytes would take minutes and gigabytes."""
    for body in (b'{"prompt":[' + b"[]," * 70_000 + b"[]]}", b'{"user":' + b'[{"' * 70_000):
        with pytest.raises(ApiError) as refused:
            plan(body)
        assert (refused.value.code, "lists and objects" in refused.value.message) == ("invalid_json", True)
    text = json.dumps({"prompt": "hi", "user": '[{"\\' * 70_000}).encode()
    assert len(plan(text).prompts[0]) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {f"{token:04}": 1 for token in range(1025)}}, "logit_bias"),
        ({"n": 128, "logprobs": 20, "max_tokens": 1000}, "logprobs"),
    ],
)
def test_what_one_request_may_hold_is_bounded(fields, param):
    with pytest.raises(ApiError) as refused:
        plan(json.dumps({"prompt": "hi"} | fields).encode())
    assert refused.value.param == param
    assert "at most" in refused.value.message


def test_a_stream_holds_no_logprobs():
    job = plan(b'{"prompt":"hi","n":128,"logprobs":20,"max_tokens":1000,"stream":true}')
    assert job.params[0].logprobs == 20


def test_defaults_come_from_the_generation_config():
    generation = {"temperature": 0.6, "top_k": 20, "eos_token_id": [1], "do_sample": True, "top_p": None}
    assert default_sampling(generation) == {"temperature": 0.6, "top_k": 20}
    assert default_sampling({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert default_sampling({"top_k": -1}) == {"top_k": 0}
    for broken in ({"temperature": -1}, {"top_p": float("nan")}, {"repetition_penalty": 0}):
        with pytest.raises(ValueError, match=next(iter(broken))):
            default_sampling(broken)
    params = plan(b'{"prompt":"hi"}', defaults=default_sampling(generation)).params[0]
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
    params = plan(b'{"prompt":"hi","temperature":0,"top_k":-1}', defaults=default_sampling(generation)).params[0]
    assert (params.temperature, params.top_k) == (0.0, 0)
    assert plan(b'{"prompt":"hi"}').params[0].temperature == 1.0


def test_behaviour_27_ignore_eos_passes_stop_ids_but_not_stop_strings():
    job = plan(b'{"prompt":"hi","ignore_eos":true,"stop_token_ids":[5],"stop":"x"}')
    assert job.params[0].stop_token_ids == ()
    assert job.stops == ("x",)


def test_numbers_may_be_written_as_integers_and_null_means_not_given():
    params = plan(b'{"prompt":"hi","temperature":1,"top_p":1,"n":null,"seed":-5}').params[0]
    assert (params.temperature, params.seed) == (1.0, -5)


@pytest.mark.parametrize(("length", "fits"), [(MAX_LEN - 1, True), (MAX_LEN, False), (50 * MAX_LEN, False)])
def test_the_context_holds_the_prompt_and_one_token(length, fits):
    data = json.dumps({"prompt": "x" * length}).encode()
    if fits:
        assert plan(data).params[0].max_tokens == 1
        return
    with pytest.raises(ApiError) as caught:
        plan(data)
    assert caught.value.code == "context_length_exceeded"
    assert str(MAX_LEN) in caught.value.message
