"""Decides the JSON of OpenAI answers: whole completions and chat completions, and the chunks of their streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.runtime.request import PromptLogprobs
from xllm.service.errors import ApiError
from xllm.service.format import Format, Usage, Whole
from xllm.service.generation import Delta, TokenLogprob
from xllm.service.parsers.parts import Call, Content, More, Part, Reasoning, joined
from xllm.service.tokenizer import TextCodec

LOWEST = -9999.0  # stands for minus infinity, which JSON doesn't have (OpenAI's value)
DONE = b"data: [DONE]\n\n"


def frame(value: Any) -> bytes:
    """One server-sent event. JSON has no raw line ends, so one `data:` line is enough."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class OpenAIFormat(Format):
    """What OpenAI's two APIs of generation share: the envelope of choices. `logprobs` tells whether the request asked
    for them."""

    prefix = object = chunk_object = ""

    def __init__(self, model: str, codec: TextCodec, logprobs: bool, include_usage: bool) -> None:
        self._codec = codec
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model

    def gather(self, choice: Whole, delta: Delta) -> None:
        super().gather(choice, delta)
        if self._logprobs:
            choice.logprobs.extend(map(self._token, delta.logprobs))

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        bodies = [self._whole(index, choice) for index, choice in enumerate(choices)]
        body = self._envelope(self.object, bodies) | {"usage": usage_body(usage)} | self._of_all(choices)
        return msgspec.json.encode(body)

    def prompt(self, found: PromptLogprobs | None, prompt: Sequence[int]) -> msgspec.Raw:
        """The logprobs of a prompt as vLLM shows them: by place, and by id there; there are none of its first token."""
        shown: list[dict[str, Any] | None] = [None]
        for item in found.tokens(prompt) if found else ():
            place = {token: (logprob, rank) for rank, (token, logprob) in enumerate(item.best, 1)}
            place.setdefault(item.token, (item.logprob, item.rank))
            shown.append({
                str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._codec.token_text(token)}
                for token, (logprob, rank) in place.items()
            })  # fmt: skip
        return _encoded(shown)

    def _of_all(self, choices: Sequence[Whole]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        return {}

    def failed(self, error: ApiError, request_id: str) -> bytes:
        return frame(error.body(request_id)) + DONE

    def last(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return frame(self._envelope(self.chunk_object, []) | {"usage": usage_body(usage)}) + DONE

    def _whole(self, index: int, choice: Whole) -> dict[str, Any]:
        raise NotImplementedError

    def _token(self, item: TokenLogprob) -> Any:
        """One token as the answer will show it, its alternatives encoded already: as text they take a tenth of the
        memory that objects take, and an answer that ends has little left to do."""
        raise NotImplementedError

    def _envelope(self, object_: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"id": self._id, "object": object_, "created": self._created, "model": self._model, "choices": choices}
        return body | {"system_fingerprint": self.weights} if self.weights else body

    def _event(self, *choices: dict[str, Any]) -> bytes:
        body = self._envelope(self.chunk_object, list(choices))
        return frame(body | {"usage": None} if self._include_usage else body)


class CompletionFormat(OpenAIFormat):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, codec: TextCodec, logprobs: bool, include_usage: bool, echo: Sequence[str]) -> None:
        """`echo`: the text to repeat before each choice, "" for none."""
        super().__init__(model, codec, logprobs, include_usage)
        self._echo = echo

    def first(self, choices: int, usage: Usage) -> bytes:
        return b"".join(self._event(self._choice(at, text, (), None)) for at, text in enumerate(self._echo) if text)

    def chunk(self, index: int, delta: Delta) -> bytes:
        logprobs = [self._token(item) for item in delta.logprobs]
        return self._event(self._choice(index, delta.text, logprobs, delta.finish_reason))

    def _whole(self, index: int, choice: Whole) -> dict[str, Any]:
        text = self._echo[index] + _joined(choice.parts, Content)
        body = self._choice(index, text, choice.logprobs, choice.finish_reason)
        return body | ({"prompt_logprobs": choice.prompt} if choice.prompt is not None else {})

    def _choice(self, index: int, text: str, logprobs: Sequence[tuple[Any, ...]], reason: str | None) -> dict[str, Any]:
        body = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        if self._logprobs:
            columns = zip(*logprobs, strict=True) if logprobs else ((),) * 5
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids")
            body["logprobs"] = dict(zip(names, columns, strict=True))
        return body

    def _token(self, item: TokenLogprob) -> tuple[Any, ...]:
        """The best tokens are listed, and the chosen one even when it is none of them."""
        text = self._codec.token_text(item.token)
        best = {self._codec.token_text(token): _finite(logprob) for token, logprob in item.top}
        best.setdefault(text, _finite(item.logprob))
        return text, _finite(item.logprob), _encoded(best), item.offset, item.token


class ChatFormat(OpenAIFormat):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, codec: TextCodec, logprobs: bool, include_usage: bool, tools: bool) -> None:
        """tools: whether the answer may be calls, without content then."""
        super().__init__(model, codec, logprobs, include_usage)
        self._nothing = None if tools else ""

    def first(self, choices: int, usage: Usage) -> bytes:
        delta = {"role": "assistant", "content": self._nothing}
        return b"".join(self._event(self._choice(at, {"delta": delta}, (), None)) for at in range(choices))

    def chunk(self, index: int, delta: Delta) -> bytes:
        """A text and how it ended are two events: clients take the last one for the end of the choice."""
        shown = [_delta(part) for part in delta.parts] or ([{}] if delta.logprobs else [])
        logprobs = [self._token(item) for item in delta.logprobs]
        event = b""
        for body in shown:
            event += self._event(self._choice(index, {"delta": body}, logprobs, None))
            logprobs = []
        if delta.finish_reason is not None:
            event += self._event(self._choice(index, {"delta": {}}, (), delta.finish_reason))
        return event

    def _whole(self, index: int, choice: Whole) -> dict[str, Any]:
        content = _joined(choice.parts, Content) or self._nothing
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning := _joined(choice.parts, Reasoning):
            message["reasoning_content"] = reasoning
        if calls := [_call(part) for part in joined(choice.parts) if isinstance(part, Call)]:
            message["tool_calls"] = calls
        return self._choice(index, {"message": message}, choice.logprobs, choice.finish_reason)

    def _of_all(self, choices: Sequence[Whole]) -> dict[str, Any]:
        return {"prompt_logprobs": choices[0].prompt} if choices[0].prompt is not None else {}

    def _choice(
        self, index: int, content: dict[str, Any], logprobs: Sequence[msgspec.Raw], reason: str | None
    ) -> dict[str, Any]:
        body = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        if self._logprobs:
            body["logprobs"] = {"content": logprobs, "refusal": None}
        return body

    def _token(self, item: TokenLogprob) -> msgspec.Raw:
        return token_logprob(self._codec, item)


def token_logprob(codec: TextCodec, item: TokenLogprob) -> msgspec.Raw:
    """A token with its alternatives, as JSON."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = codec.token_bytes(token)
        return {"token": codec.token_text(token), "logprob": _finite(logprob), "bytes": list(data)}

    best = [entry(token, logprob) for token, logprob in item.top]
    return _encoded(entry(item.token, item.logprob) | {"top_logprobs": best})


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, More):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}
    if isinstance(part, Call):
        return {"tool_calls": [{"index": part.index} | _call(part)]}
    return {"content" if isinstance(part, Content) else "reasoning_content": part.text}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _joined(parts: Sequence[Part], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def _encoded(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST
