"""Answers of a given form: the embedded model knows nothing but stories, what it writes is what was asked for."""

from __future__ import annotations

import json
import queue
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers import Server, serving
from xllm.artifact import Artifact
from xllm.compiler import compile_checkpoint
from xllm.embedded import checkpoint_path
from xllm.offline import LLM
from xllm.runtime import EngineConfig, Request, RequestRefused, SamplingParams, TokenOutput
from xllm.runtime import masks as runtime_masks
from xllm.runtime.engine import Engine
from xllm.service.forms import Form
from xllm.targets.cpu.executor import CpuExecutor

ASK = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n"
SHORT = {"type": "string", "maxLength": 8}
COUNT = {"type": "integer", "minimum": 0, "maximum": 999}


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


SCHEMAS = {
    "enum": closed(kind={"enum": ["fox", "h\u00e9ron", 'a "quoted"\nline', 7, None, True]}),
    "nested": closed(who=closed(name=SHORT, friend=closed(age=COUNT)), ok={"type": "boolean"}),
    "arrays": closed(of={"type": "array", "items": COUNT, "minItems": 2, "maxItems": 4}),
    "numbers": closed(x={"type": "number", "minimum": -2, "maximum": 2.5, "multipleOf": 0.5}, n=COUNT),
    "pattern": closed(at={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}),
    "escapes": closed(t={"type": "string", "pattern": '^[\u00e9\U0001f98a\n"\\\\]{2,4}$'}),
    "any of": closed(v={"anyOf": [SHORT, {"type": "array", "items": COUNT, "maxItems": 2}]}),
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": closed(n=COUNT, sub={"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]})},
    },
}
OTHERS = {
    "regex": ({"regex": r"[A-Z][a-z]{2,8} and [A-Z][a-z]{2,8}"}, r"[A-Z][a-z]{2,8} and [A-Z][a-z]{2,8}"),
    "choice": ({"choice": ["yes", 'say "no"', "h\u00e9ron\\"]}, 'yes|say "no"|h\u00e9ron\\\\'),
    "grammar": ({"grammar": 'start: "the" (" " W){2,4}\nW: /[a-z]{1,6}/'}, r"the( [a-z]{1,6}){2,4}"),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("structured") / "story.xllm"
    compile_checkpoint(checkpoint_path(), path)
    return path


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Iterator[LLM]:
    with LLM(artifact, threads=1) as running:
        yield running


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact, "--memory", "256MiB", "--log-level", "error") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


TEMPLATE = """{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}{% for message in messages %}<|im_start|>{{
message.role }}
{{ message.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}
    for name, parameters in {"weather": closed(city=SHORT), "clock": closed(hour=COUNT, of=SHORT)}.items()
]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The embedded model with a template that tells it about tools."""
    folder = tmp_path_factory.mktemp("caller")
    shutil.copytree(checkpoint_path(), folder / "checkpoint", ignore=shutil.ignore_patterns("*.jinja"))
    (folder / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)
    compile_checkpoint(folder / "checkpoint", folder / "caller.xllm")
    with serving(folder / "caller.xllm", "--memory", "256MiB", "--log-level", "error") as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0)


def whole(parts: Iterable[Any]) -> list[Any]:
    """The calls of a stream: a first part has the name, and all of them together the arguments."""
    calls: list[Any] = []
    for part in parts:
        if part.index == len(calls):
            calls.append(part)
        else:
            calls[part.index].function.arguments += part.function.arguments
    return calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_does_and_keeps_to_its_schema(caller: openai.OpenAI, stream: bool) -> None:
    clock = {"type": "function", "function": {"name": "clock"}}
    asked: list[Any] = [("required", {"parallel_tool_calls": False}), (clock, {})]
    for seed, (choice, options) in enumerate(asked * 3):
        answer: Any = caller.chat.completions.create(
            model=caller.models.list().data[0].id, messages=[{"role": "user", "content": "Hi"}], tools=TOOLS,
            tool_choice=choice, stream=stream, seed=seed, temperature=1.2, max_tokens=400, **options,
        )  # fmt: skip
        if stream:
            deltas = [chunk.choices[0] for chunk in answer if chunk.choices]
            calls = whole(call for delta in deltas for call in delta.delta.tool_calls or ())
            assert not any(delta.delta.content for delta in deltas)
            assert deltas[-1].finish_reason == "tool_calls"
        else:
            calls, content = answer.choices[0].message.tool_calls, answer.choices[0].message.content
            assert not content and answer.choices[0].finish_reason == "tool_calls"
        [call] = calls
        assert choice == "required" or call.function.name == "clock"
        [schema] = [tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_form_after_reasoning_begins_where_it_ends(llm: LLM) -> None:
    made = llm._grammars.compile(Form("regex", "fox", "structured_outputs.regex", after="</think>"))
    free, bound = made.start(), llm._grammars.compile(Form("regex", "fox", "structured_outputs.regex")).start()
    thoughts = llm.codec.encode("the regex is fox. </think", False)
    masks = [np.zeros(-(-llm.artifact.manifest["model"]["vocab"] // 32), np.uint32) for _ in range(2)]
    for token in thoughts:
        free.fill(masks[0])
        assert (masks[0] == 0xFFFFFFFF).all()
        free.take([token])
    free.take(llm.codec.encode(">", False))
    for matcher, mask in zip((free, bound), masks, strict=True):
        matcher.fill(mask)
    assert (masks[0] == masks[1]).all() and masks[0].any()


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_keeps_to_its_schema(llm: LLM, name: str) -> None:
    asked: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.5}, {"top_p": 0.9, "repetition_penalty": 1.3}]
    for seed, options in enumerate(asked):
        [answer] = llm.generate(ASK, structured_outputs={"json": SCHEMAS[name]}, seed=seed, max_tokens=400, **options)
        if answer.finish_reason == "stop":  # what recurs may do so for ever
            jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
        assert answer.finish_reason == "stop" or name == "recursive"


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms(llm: LLM, name: str) -> None:
    form, pattern = OTHERS[name]
    for answer in llm.generate([ASK] * 4, structured_outputs=form, temperature=1.2):
        assert re.fullmatch(pattern, answer.text) and answer.finish_reason == "stop"


def test_max_tokens_cuts_and_min_tokens_waits_for_what_the_grammar_allows(llm: LLM) -> None:
    [cut] = llm.generate(ASK, structured_outputs={"regex": "a{40}"}, max_tokens=3)
    assert cut.finish_reason == "length" and set(cut.text) == {"a"}
    [forced] = llm.generate(ASK, structured_outputs={"regex": "fox"}, min_tokens=30, max_tokens=40)
    assert (forced.text, forced.finish_reason) == ("fox", "stop")
    [longer] = llm.generate(ASK, structured_outputs={"regex": "(fox )+"}, min_tokens=10, max_tokens=200, temperature=0)
    assert len(longer.tokens) >= 10 and set(longer.text.split()) == {"fox"}


def test_bias_and_logprobs(llm: LLM) -> None:
    """The bias decides among what is allowed; logprobs are of all tokens, as without a grammar."""
    [token] = llm.codec.encode("q", False)
    [answer] = llm.generate(ASK, structured_outputs={"regex": "[a-z]"}, logit_bias={token: 100.0}, logprobs=0)
    [free] = llm.generate(ASK, logit_bias={token: 100.0}, logprobs=0, max_tokens=1)
    assert (answer.text, answer.logprobs[0]) == (free.text, free.logprobs[0]) == ("q", free.logprobs[0])


@pytest.mark.parametrize("overlapped", [True, False])
def test_alone_together_and_preempted_are_the_same(artifact: Path, llm: LLM, overlapped: bool) -> None:
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    executor = CpuExecutor(Artifact.open(artifact), 2)
    config = EngineConfig(
        kv_bytes=24 * executor.kv.group_bytes,
        page_bytes=4096,
        eos_ids=tuple(llm.artifact.manifest["model"]["eos_ids"]),
        async_scheduling=overlapped,
        check=True,
    )
    engine = Engine(executor, config, outputs.put)
    engine.start()
    forms = [{"json": SCHEMAS[name]} for name in SCHEMAS] + [form for form, _ in OTHERS.values()] + [None]
    prompt = tuple(llm.codec.encode(ASK, False))
    asked = []
    for index in range(48):
        form = forms[index % len(forms)]
        grammar = None if form is None else llm._grammars.of(form)
        params = SamplingParams(temperature=1.1, seed=index, max_tokens=60, presence_penalty=0.3, grammar=grammar)
        asked.append(Request(str(index), prompt, params))
    try:
        for request in asked:
            engine.submit(request)
        found: dict[str, list[int]] = {request.id: [] for request in asked}
        left = len(asked)
        while left:
            for output in outputs.get(timeout=120):
                found[output.request_id] += [] if output.token is None else [output.token]
                left -= output.finish_reason is not None
        assert engine.stats().preemptions > 0
    finally:
        engine.stop()
    for request in asked:
        [alone] = llm.generate([prompt], request.params)
        assert found[request.id] == list(alone.tokens)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(set(SCHEMAS) - {"recursive"})), seed=st.integers(0, 2**32))
def test_whatever_is_allowed_is_valid(llm: LLM, name: str, seed: int) -> None:
    """Tokens drawn from the masks alone, so that every way through a grammar comes up, not only what a model likes."""
    rng, tokens = np.random.default_rng(seed), []
    matcher = llm._grammars.of({"json": SCHEMAS[name]}).start()
    vocab = llm.artifact.manifest["model"]["vocab"]
    while not tokens or tokens[-1] != 2:
        mask = np.zeros(-(-vocab // 32), np.uint32)
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab])
        tokens.append(int(rng.choice(allowed)) if 2 not in allowed or rng.random() < 0.5 else 2)
        matcher.take(tokens[-1:])
    jsonschema.validate(json.loads(llm.codec.decode(tokens)), SCHEMAS[name])


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "type": ({"json": {"type": "nix"}}, "grammar_rejected", "Invalid type"),
    "keyword": ({"json": {"type": "object", "unevaluatedProperties": False, "not": {}}}, "grammar_rejected", "json"),
    "another host": ({"json": {"$ref": "http://localhost/x.json"}}, "grammar_rejected", "json"),
    "regex": ({"regex": "("}, "grammar_rejected", "unclosed"),
    "grammar": ({"grammar": "start: nothing"}, "grammar_rejected", "nothing"),
    "too large": ({"regex": "a" * 70_000}, "grammar_rejected", "65536"),
    "explodes": (
        {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": SHORT}} for j in range(8)]} for i in range(8)]}},
        "grammar_rejected",
        "too large",
    ),
    "overflows the stack": (
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4000)) + '\nr4000: "a"'},
        "grammar_rejected",
        "nest too deep",
    ),
    "never ends": (
        {"grammar": "start: A\nA: /(.*a.{20}.*)/ & /(.*b.{20}.*)/ & ~/(.*c.{20}.*)/"},
        "grammar_rejected",
        "takes more than",
    ),
    "nothing": ({}, "invalid_request", "exactly one"),
    "two": ({"regex": "a", "choice": ["a"]}, "invalid_request", "exactly one"),
    "no choice": ({"choice": []}, "invalid_request", "empty"),
}


def test_bad_forms_are_refused_while_another_request_runs(client: openai.OpenAI, server: Server) -> None:
    def ask(**fields: Any) -> httpx.Response:
        body = {"prompt": ASK, "max_tokens": 400, **fields}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(1) as pool:
        for name, (form, code, words) in BAD.items():
            other = pool.submit(ask, ignore_eos=True, temperature=0)
            answer = ask(structured_outputs=form)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, code), name
            assert words in error["message"] and error["param"].startswith("structured_outputs"), (name, error)
            assert other.result().json()["usage"]["completion_tokens"] == 400
    assert ask(structured_outputs={"regex": "a"}, ignore_eos=True).json()["error"]["param"] == "ignore_eos"
    both = ask(structured_outputs={"regex": "a"}, response_format={"type": "json_object"})
    assert both.json()["error"]["code"] == "invalid_request"
    assert ask(structured_outputs={"choice": ["still here"]}).json()["choices"][0]["text"] == "still here"


def test_the_official_client_streamed_and_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": "Tell me about a fox."}],
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMAS["nested"]}
        },
        "temperature": 0.8, "seed": 5, "max_tokens": 400, "n": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**ask)
    texts = {choice.index: "" for choice in whole.choices}
    for part in client.chat.completions.create(**ask, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    for choice in whole.choices:
        assert choice.message.content == texts[choice.index] and choice.finish_reason == "stop"
        jsonschema.validate(json.loads(texts[choice.index]), SCHEMAS["nested"])
    assert texts[0] != texts[1]
    stopped = client.chat.completions.create(**{**ask, "stop": ['"friend"'], "n": 1})
    assert stopped.choices[0].message.content == texts[0].split('"friend"')[0]


class Broken:
    """A grammar that fails, or never answers, at its third token."""

    def __init__(self, hangs: bool) -> None:
        self.left, self.hangs, self.gate = 3, hangs, queue.SimpleQueue()

    def start(self) -> Broken:
        return self

    def take(self, tokens: Any) -> None:
        self.left -= len(tokens)
        if not self.left:
            if self.hangs:
                self.gate.get()
            raise ValueError("too complex")

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = 0xFFFFFFF8  # what is no special token


@pytest.mark.parametrize("hangs", [False, True])
def test_a_grammar_that_fails_ends_its_own_request(llm: LLM, hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_masks, "STUCK_SECONDS", 0.2)
    broken, healthy = (
        Broken(hangs),
        SamplingParams(max_tokens=20, seed=1, grammar=llm._grammars.of({"regex": "[a-z]+"})),
    )
    with pytest.raises(RuntimeError, match="grammar_failed"):
        llm.generate(ASK, SamplingParams(max_tokens=9, grammar=broken))
    broken.gate.put(None)
    assert llm.generate(ASK, healthy) == llm.generate(ASK, replace(healthy))
    with pytest.raises(RequestRefused, match="ignore_eos"):
        SamplingParams(grammar=broken, ignore_eos=True)
