"""What each field of a request changes: in what the engine is asked for, or in the answer. A field that is read and
forgotten changes nothing, which the test of this table finds out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
import numpy as np

from tests.service.fakes import EOS, TOKENIZER, fake, ids
from xllm.runtime import Request
from xllm.service.endpoint import Service

START = 256
CALLS = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
# Calls where tools are shown; reasoning where the prompt opens it.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}{{ note or '' }}"
    "{# </think> <tool_call> #}"
)


def reply(request: Request) -> list[int]:
    """Reasoning where it is open, "hey" and a special token, calls where there are tools."""
    text = TOKENIZER.decode(request.prompt, skip_special_tokens=False)
    said = ids(f"{'so</think>' if text.endswith('<think>') else ''}hey")
    return [*said, START, *(ids(CALLS) if '"function"' in text else []), EOS]


class Seen:
    """One request: what the engine got of it, and its answer."""

    def __init__(self, base: str, service: Service, endpoint: Any, path: str, body: dict[str, Any]) -> None:
        before = len(fake(service).seen) if hasattr(service.engine, "seen") else 0
        self._base, self._service = base, service
        self.raw = httpx.post(base + path, json=body, timeout=60)
        self.status = self.raw.status_code
        self.type = self.raw.headers["content-type"].partition(";")[0]
        self.requests = fake(service).seen[before:] if hasattr(service.engine, "seen") else []
        self._job = lambda: endpoint(*endpoint_arguments(service, endpoint)).job(json.dumps(body).encode(), None)

    @property
    def job(self) -> Any:
        return self._job()

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def params(self) -> Any:
        return self.requests[0].params

    @property
    def prompt(self) -> str:
        return TOKENIZER.decode(self.requests[0].prompt, skip_special_tokens=False)

    @property
    def answer(self) -> Any:
        return self.raw.json()

    @property
    def events(self) -> list[Any]:
        lines = (line.removeprefix("data: ") for line in self.raw.text.split("\n") if line.startswith("data: {"))
        return [json.loads(line) for line in lines]

    @property
    def first(self) -> set[str]:
        """Characters that the answer may begin with, by its grammar; all of them without one."""
        mask = np.zeros(16, np.uint32)
        if self.params.grammar is None:
            mask[:] = 0xFFFFFFFF
        else:
            self.params.grammar.start().fill(mask)
        return {char for char in map(chr, range(33, 127)) if mask[ids(char)[0] // 32] >> (ids(char)[0] % 32) & 1}

    @property
    def stored(self) -> int:
        """The status of asking for the response again."""
        return httpx.get(f"{self._base}/v1/responses/{self.answer['id']}").status_code


def endpoint_arguments(service: Service, endpoint: Any) -> tuple[Any, ...]:
    from xllm.service.responses import Responses, Store

    return (service, Store()) if endpoint is Responses else (service,)


class Effect(NamedTuple):
    """value: of the field. look: what it changes. then: what that is with the field, or whether it is right. beside:
    other fields, that are there without it too."""

    value: Any
    look: Callable[[Seen], Any]
    then: Any
    beside: Mapping[str, Any] = MappingProxyType({})


def param(value: Any, name: str, then: Any = None, **beside: Any) -> Effect:
    """Of a field that the engine gets as it is, or as `then`."""
    return Effect(value, lambda seen: getattr(seen.params, name), value if then is None else then, beside)


def said(seen: Seen) -> str:
    choice = seen.answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def marks(seen: Seen) -> int:
    """Special tokens that the prompt begins with."""
    return next(at for at, token in enumerate(seen.requests[0].prompt) if token != START)


def of_request(value: Any, name: str) -> Effect:
    return Effect(value, lambda seen: getattr(seen.requests[0].urgency, name), value)


OTHER_MODEL = Effect("other", lambda seen: seen.status, 404)
STREAM = Effect(True, lambda seen: seen.type, "text/event-stream")
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
JSON_FIRST = {"{"}
BEAMS = {"beam_width": 2, "max_tokens": 3}
SAMPLED: dict[str, Effect] = {
    "allowed_token_ids": param([5], "allowed_token_ids", (5,)),
    "bad_words": param(["x"], "bad_words", lambda found: tuple(ids("x")) in found),
    "beam_width": Effect(2, lambda seen: len(seen.answer["choices"]), 2, {"max_tokens": 3}),
    "best_of": Effect(2, lambda seen: (seen.count, len(seen.answer["choices"])), (2, 1)),
    "cache_salt": Effect("x", lambda seen: seen.requests[0].cache_salt, "/x"),
    "early_stopping": Effect("never", lambda seen: seen.job.beams.early_stopping, "never", BEAMS),
    "frequency_penalty": param(0.5, "frequency_penalty"),
    "ignore_eos": param(True, "ignore_eos", max_tokens=3),
    "length_penalty": Effect(2.0, lambda seen: seen.job.beams.length_penalty, 2.0, BEAMS),
    "logit_bias": param({"5": 1}, "logit_bias", {5: 1.0}),
    "logprobs_mode": param("processed", "logprobs_mode"),
    "max_completion_tokens": param(3, "max_tokens"),
    "max_tokens": param(3, "max_tokens"),
    "min_p": param(0.25, "min_p"),
    "min_tokens": param(2, "min_tokens"),
    "model": OTHER_MODEL,
    "n": Effect(2, lambda seen: (seen.count, len(seen.answer["choices"])), (2, 2)),
    "num_return_sequences": Effect(1, lambda seen: len(seen.answer["choices"]), 1, BEAMS),
    "offline": of_request(True, "offline"),
    "presence_penalty": param(0.5, "presence_penalty"),
    "priority": of_request("HIGH", "priority"),
    "prompt_logprobs": param(1, "prompt_logprobs"),
    "repetition_penalty": param(1.5, "repetition_penalty"),
    "seed": param(7, "seed"),
    "skip_special_tokens": Effect(False, said, lambda text: text.endswith("hey<|start|>")),
    "stop": Effect("y", said, lambda text: text.endswith("he")),
    "stop_token_ids": param(ids("i"), "stop_token_ids", tuple(ids("i"))),
    "stream": STREAM,
    "stream_options": Effect(
        {"include_usage": True}, lambda seen: bool(seen.events[-1].get("usage")), True, {"stream": True}
    ),
    "structured_outputs": Effect({"choice": ["yes"]}, lambda seen: seen.first, {"y"}),
    "temperature": param(0.5, "temperature"),
    "top_k": param(3, "top_k"),
    "top_p": param(0.5, "top_p"),
    "tpot_slo_ms": of_request(100.0, "tpot_slo_ms"),
    "ttft_slo_ms": of_request(100.0, "ttft_slo_ms"),
    "response_format": Effect({"type": "json_object"}, lambda seen: seen.first, JSON_FIRST),
}
SAY = [{"role": "user", "content": "hi"}]
ASK = [{"role": "user", "content": "why"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}
PLAIN_FUNCTION = {"type": "function", "name": "f"}
CUSTOM = {"name": "f", "input_schema": {"type": "object"}}


def shows(text: str) -> Callable[[str], bool]:
    return lambda prompt: text in prompt


def thought(seen: Seen) -> int:
    """Tokens of reasoning, with those that close it: of this tokenizer, characters."""
    return seen.answer["usage"]["completion_tokens_details"]["reasoning_tokens"]


def calls(seen: Seen) -> int:
    return len(seen.answer["choices"][0]["message"].get("tool_calls") or ())


def items(kind: str, of: str) -> Callable[[Seen], int]:
    return lambda seen: [item["type"] for item in seen.answer[of]].count(kind)


def prompted(value: Any, text: str, **beside: Any) -> Effect:
    return Effect(value, lambda seen: seen.prompt, shows(text), beside)


def repeated(value: Any, name: str) -> Effect:
    """Of a field that the answer only repeats."""
    return Effect(value, lambda seen: seen.answer[name], value)


def logprobs(seen: Seen) -> list[Any]:
    return seen.answer["output"][-1]["content"][0]["logprobs"]


def before(base: str) -> str:
    return httpx.post(f"{base}/v1/responses", json={"input": "earlier"}).json()["id"]


EFFECTS: dict[str, dict[str, Effect]] = {
    "/v1/chat/completions": SAMPLED
    | {
        "add_generation_prompt": Effect(False, lambda seen: seen.prompt.endswith("<|end|>"), True),
        "add_special_tokens": Effect(True, marks, 2),
        "chat_template_kwargs": Effect({"enable_thinking": False}, lambda seen: seen.prompt[-7:] == "<think>", False),
        "continue_final_message": Effect(
            True,
            lambda seen: seen.prompt.endswith("part"),
            True,
            {"messages": [*SAY, {"role": "assistant", "content": "part"}]},
        ),
        "logprobs": Effect(True, lambda seen: bool(seen.answer["choices"][0]["logprobs"]), True),
        "messages": prompted(ASK, "user\nwhy"),
        "parallel_tool_calls": Effect(False, calls, 1, {"tools": [FUNCTION]}),
        "response_format": SAMPLED["response_format"]._replace(beside=PLAIN),
        "structured_outputs": SAMPLED["structured_outputs"]._replace(beside=PLAIN),
        "thinking_token_budget": Effect(1, thought, 1 + len("</think>")),
        "tool_choice": Effect("none", calls, 0, {"tools": [FUNCTION]}),
        "tools": Effect([FUNCTION], lambda seen: (calls(seen), '"f"' in seen.prompt), (2, True)),
        "top_logprobs": param(2, "logprobs", logprobs=True),
    },
    "/v1/completions": SAMPLED
    | {
        "add_special_tokens": Effect(False, marks, 0),
        "echo": Effect(True, said, "ahey"),
        "logprobs": param(2, "logprobs"),
        "prompt": prompted("why", "why"),
    },
    "/v1/responses": {
        "ignore_eos": param(True, "ignore_eos", max_output_tokens=3),
        "include": Effect(["message.output_text.logprobs"], lambda seen: bool(logprobs(seen)), True),
        "input": prompted("why", "user\nwhy"),
        "instructions": prompted("be brief", "\nbe brief"),
        "max_output_tokens": param(3, "max_tokens"),
        "metadata": repeated({"a": "b"}, "metadata"),
        "model": OTHER_MODEL,
        "parallel_tool_calls": Effect(False, items("function_call", "output"), 1, {"tools": [PLAIN_FUNCTION]}),
        "previous_response_id": prompted(before, "earlier"),
        "prompt_cache_key": repeated("k", "prompt_cache_key"),
        "reasoning": Effect({"effort": "none"}, lambda seen: seen.prompt[-7:] == "<think>", False),
        "safety_identifier": repeated("s", "safety_identifier"),
        "seed": param(7, "seed"),
        "store": Effect(False, lambda seen: seen.stored, 404),
        "stream": STREAM,
        "stream_options": Effect(
            {"include_obfuscation": True},
            lambda seen: all("obfuscation" in event for event in seen.events if event["type"].endswith(".delta")),
            True,
            {"stream": True},
        ),
        "temperature": param(0.5, "temperature"),
        "top_logprobs": Effect(2, lambda seen: [len(token["top_logprobs"]) for token in logprobs(seen)], [2, 2, 2]),
        "text": Effect(
            {"format": {"type": "json_object"}}, lambda seen: seen.first, JSON_FIRST, {"reasoning": {"effort": "none"}}
        ),
        "tool_choice": Effect("none", items("function_call", "output"), 0, {"tools": [PLAIN_FUNCTION]}),
        "tools": Effect([PLAIN_FUNCTION], items("function_call", "output"), 2),
        "top_k": param(3, "top_k"),
        "top_p": param(0.5, "top_p"),
        "user": repeated("u", "user"),
    },
    "/v1/messages": {
        "ignore_eos": param(True, "ignore_eos", max_tokens=3),
        "max_tokens": param(3, "max_tokens"),
        "messages": prompted(ASK, "user\nwhy"),
        "model": OTHER_MODEL,
        "stop_sequences": Effect(["y"], lambda seen: seen.answer["stop_sequence"], "y"),
        "stream": STREAM,
        "system": prompted("be brief", "\nbe brief"),
        "temperature": param(0.5, "temperature"),
        "thinking": Effect({"type": "disabled"}, lambda seen: seen.prompt[-7:] == "<think>", False),
        "tool_choice": Effect({"type": "none"}, items("tool_use", "content"), 0, {"tools": [CUSTOM]}),
        "tools": Effect([CUSTOM], items("tool_use", "content"), 2),
        "top_k": param(3, "top_k"),
        "top_p": param(0.5, "top_p"),
    },
    "/v1/embeddings": {
        "add_special_tokens": Effect(False, lambda seen: seen.answer["usage"]["prompt_tokens"], 1),
        "chat_template_kwargs": Effect(
            {"note": "abc"}, lambda seen: seen.answer["usage"]["prompt_tokens"], 12, {"messages": SAY}
        ),
        "dimensions": Effect(2, lambda seen: len(seen.answer["data"][0]["embedding"]), 2),
        "encoding_format": Effect("base64", lambda seen: type(seen.answer["data"][0]["embedding"]), str),
        "input": Effect("abc", lambda seen: seen.answer["usage"]["prompt_tokens"], 4),
        "messages": Effect(ASK, lambda seen: seen.answer["usage"]["prompt_tokens"], lambda n: n > 5),
        "model": OTHER_MODEL,
        "truncate_prompt_tokens": Effect(
            2, lambda seen: seen.answer["usage"]["prompt_tokens"], 2, {"input": "a long text"}
        ),
    },
}
EAGER = {"eager_input_streaming": True}


def events_with(text: str) -> Callable[[Seen], int]:
    """Events that say this: of calls whose arguments are `{}`, each has one, or one of each brace."""
    return lambda seen: seen.raw.text.count(text)


# Members of fields that the clients do not have everywhere: the field and the member, and what that changes.
INSIDE: dict[str, dict[str, Effect]] = {
    "/v1/chat/completions": {
        "tools.eager_input_streaming": Effect(
            [FUNCTION | EAGER], events_with('"arguments"'), 6, {"stream": True, "tools": [FUNCTION]}
        ),
    },
    "/v1/responses": {
        "tools.eager_input_streaming": Effect(
            [PLAIN_FUNCTION | EAGER],
            events_with("event: response.function_call_arguments.delta"),
            4,
            {"stream": True, "tools": [PLAIN_FUNCTION]},
        ),
    },
    "/v1/messages": {
        "tools.eager_input_streaming": Effect(
            [CUSTOM | EAGER], events_with("input_json_delta"), 6, {"stream": True, "tools": [CUSTOM]}
        ),
    },
}
# Taken, because clients send them and nothing is lost, and without any effect: a value for each.
IDLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"user": "u"},
    "/v1/completions": {"user": "u"},
    "/v1/responses": {},
    "/v1/messages": {"cache_control": {"type": "ephemeral"}, "metadata": {"user_id": "u"}},
    "/v1/embeddings": {"user": "u"},
}
