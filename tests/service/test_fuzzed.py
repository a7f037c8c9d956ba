"""Hypothesis over sampling parameters and chats: whatever a body asks for is refused by the name of a field it has, or
is something that the native sampler draws by. XLLM_FUZZ_EXAMPLES sets how many of each are tried."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.fakes import CHAT_TEMPLATE, MAX_LEN, VOCAB, byte_tokenizer
from xllm.kernels.cpu import Runner
from xllm.kernels.cpu.sampling import NOTHING_ALLOWED, Sampler
from xllm.service.body import ChatBody, CompletionBody, parse
from xllm.service.errors import ApiError
from xllm.service.params import Job, chat_job, completion_job
from xllm.service.sampling import ModelFacts
from xllm.service.template import ChatTemplate
from xllm.service.tokenizer import TextCodec

EXAMPLES = int(os.environ.get("XLLM_FUZZ_EXAMPLES", "150"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
CODEC, TEMPLATE = TextCodec(byte_tokenizer()), ChatTemplate(CHAT_TEMPLATE)
FACTS = ModelFacts("fake", VOCAB, MAX_LEN)

TOKENS = st.integers(0, VOCAB - 1) | st.integers(-2, VOCAB + 2)
NUMBERS = st.floats(-3, 3) | st.integers(-3, 3) | st.sampled_from([0, 1, 1e-30, 1e300, -0.0, 10**30])
COUNTS = st.integers(-2, 40) | st.sampled_from([128, 129, 2**31, 2**63])
WORDS = st.text(max_size=6)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"), NUMBERS),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), NUMBERS),
    **dict.fromkeys(("top_k", "n", "best_of", "min_tokens", "max_tokens", "seed", "beam_width"), COUNTS),
    **dict.fromkeys(("num_return_sequences", "prompt_logprobs", "max_completion_tokens"), COUNTS),
    "logit_bias": st.dictionaries(TOKENS.map(str), st.floats(-101, 101), max_size=4),
    "stop": WORDS | st.lists(WORDS, max_size=5),
    "stop_token_ids": st.lists(TOKENS, max_size=3),
    "bad_words": st.lists(WORDS, max_size=3),
    "allowed_token_ids": st.lists(TOKENS, max_size=4),
    "logprobs_mode": st.sampled_from(["raw", "processed", "other"]),
    "early_stopping": st.sampled_from([True, False, "never", "often"]),
    **dict.fromkeys(("ignore_eos", "stream", "echo"), st.booleans()),
}
BODIES = st.fixed_dictionaries({"prompt": st.just("hi")}, optional={**SAMPLING, "logprobs": COUNTS})
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", ""])}, optional={"text": WORDS, "x": WORDS}
)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": WORDS, "arguments": st.sampled_from(["{}", '{"a": 1}', "[", "1"])})},
    optional={"id": WORDS, "type": st.sampled_from(["function", "other"])},
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "boss"])},
    optional={
        "content": WORDS | st.none() | st.lists(PARTS, max_size=3), "name": WORDS, "reasoning_content": WORDS,
        "tool_call_id": WORDS, "tool_calls": st.lists(CALLS, max_size=2),
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=1) as made:
        yield made


def planned(body: dict[str, Any], kind: Any) -> Job | None:
    """None when it is refused, which must be by the name of a field that it has, or that is missing in one."""
    try:
        parsed = parse(json.dumps(body).encode(), kind)
        if kind is ChatBody:
            return chat_job(parsed, FACTS, CODEC.encode, TEMPLATE.render)
        return completion_job(parsed, FACTS, CODEC.encode, CODEC.decode)
    except ApiError as error:
        assert error.status == 400 and error.message.isprintable()
        name = (error.param or "").replace("[", ".").partition(".")[0]
        assert name in body, (error.code, error.param)
        return None


@given(body=BODIES)
@FUZZ
def test_what_is_planned_can_be_drawn(runner, body):
    job = planned(body, CompletionBody)
    if job is None:
        return
    params = replace(job.params[0], seed=job.params[0].seed or 1)
    assert params.max_tokens is not None and params.min_tokens <= params.max_tokens < MAX_LEN
    assert 1 <= job.n <= job.best_of <= 128 and not (job.stream and job.best_of > job.n)
    sampler = Sampler(runner, VOCAB, 1)
    sampler.attach(0, params, job.prompts[0], (), 0, params.stop_token_ids)
    logits = np.random.default_rng(len(str(body))).standard_normal((4, VOCAB)).astype(np.float32)
    drawn: list[int] = []
    for row in logits:
        token = int(sampler.sample(row.ctypes.data, np.zeros(1, np.int32)).tokens[0])
        if token == NOTHING_ALLOWED:
            assert params.allowed_token_ids is not None
            break
        drawn.append(token)
        assert 0 <= token < VOCAB
        assert params.allowed_token_ids is None or token in params.allowed_token_ids
        assert not any(tuple(drawn[-len(word) :]) == word for word in params.bad_words)
    sampler.close()


@given(messages=st.lists(MESSAGES, max_size=4), sampling=st.fixed_dictionaries({}, optional=SAMPLING))
@FUZZ
def test_a_chat_is_planned_with_all_that_it_says(messages, sampling):
    sampling.pop("echo", None)
    job = planned({"messages": messages, **sampling}, ChatBody)
    if job is None:
        return
    text = CODEC.decode(job.prompts[0], skip_special_tokens=False)
    for message in messages:
        content = message.get("content") or ""
        for part in [content] if isinstance(content, str) else [item["text"] for item in content]:
            assert part in text
    assert text.count("<|start|>") >= len(messages) + 1
