"""Decides what Anthropic's routes answer: messages whole and as events, and the number of tokens of a prompt."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from xllm.service.anthropic_body import NAMES, NOT_SUPPORTED, MessagesBody, chat_body
from xllm.service.completions import OfChat
from xllm.service.errors import ApiError, invalid
from xllm.service.format import Format, Usage, Whole
from xllm.service.gate import Receive, Record, Send, send_json
from xllm.service.generation import Delta
from xllm.service.params import Job
from xllm.service.parsers import parts, values
from xllm.service.parsers.parts import Call, Content, More, Part, joined

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageFormat(Format):
    """One message. Its blocks follow the order of the answer: reasoning, text and calls."""

    idle = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks = 0  # that were opened
        self._open: type[Part] | None = None  # what the last of them holds, until it is closed
        self._end: dict[str, Any] = {}

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        [choice] = choices
        message = self._message(_blocks(joined(choice.parts)), usage) | _end(choice.finish_reason, choice.stop)
        return msgspec.json.encode(message)

    def first(self, choices: int, usage: Usage) -> bytes:
        return _event("message_start", message=self._message([], usage))

    def chunk(self, index: int, delta: Delta) -> bytes:
        events = b"".join(map(self._part, delta.parts))
        if delta.finish_reason is not None:
            self._end = _end(delta.finish_reason, delta.stop)
            events += self._close()
        return events

    def last(self, usage: Usage) -> bytes:
        return _event("message_delta", delta=self._end, usage=_usage(usage)) + _event("message_stop")

    def failed(self, error: ApiError, request_id: str) -> bytes:
        return b"event: error\ndata: " + msgspec.json.encode(error.anthropic_body(request_id)) + b"\n\n"

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        facts = {"id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content}
        return facts | {"stop_reason": None, "stop_sequence": None, "usage": _usage(usage)}

    def _part(self, part: Part) -> bytes:
        events = b""
        if isinstance(part, Call) or (type(part) is not self._open and not isinstance(part, More)):
            events += self._close()
            empty = _block(part) | ({"input": {}} if isinstance(part, Call) else {_field(part): ""})
            events += _event("content_block_start", index=self._blocks, content_block=empty)
            self._open, self._blocks = type(part), self._blocks + 1
        if isinstance(part, Call | More):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        else:
            delta = {"type": f"{_field(part)}_delta", _field(part): part.text}
        return events + _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._blocks - 1)


class Messages(OfChat):
    """POST /v1/messages."""

    body, refused, names = MessagesBody, NOT_SUPPORTED, NAMES
    kind = "message"

    def job(self, data: bytes, entry: Record) -> Job:
        body = self.parse(data, MessagesBody)
        if body.max_tokens is None:
            raise invalid("missing_parameter", "the field `max_tokens` is required", "max_tokens")
        return self.chat_job(chat_body(body))

    def format(self, job: Job) -> Format:
        return MessageFormat(self.service.facts.name)


class CountTokens(OfChat):
    """POST /v1/messages/count_tokens."""

    body, refused, names = MessagesBody, NOT_SUPPORTED, NAMES
    kind = "count"
    queues = False

    def job(self, data: bytes, entry: Record) -> Job:
        job = self.chat_job(chat_body(self.parse(data, MessagesBody)))
        return replace(job, form=None)  # nothing is generated: no form needs a grammar

    async def run(self, job: Job, entry: Record, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"input_tokens": len(job.prompts[0])})


def _blocks(given: Sequence[parts.Whole]) -> list[dict[str, Any]]:
    """The blocks of a whole message: parts of one kind in a row are one."""
    blocks: list[dict[str, Any]] = []
    kind: type[parts.Whole] | None = None
    for part in given:
        if type(part) is kind and not isinstance(part, Call):
            blocks[-1][_field(part)] += part.text
        else:
            blocks.append(_block(part))
        kind = type(part)
    return blocks


def _block(part: parts.Whole) -> dict[str, Any]:
    if isinstance(part, Call):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": values.complete(part.arguments)}
    signature = {} if isinstance(part, Content) else {"signature": ""}
    return {"type": _field(part), _field(part): part.text} | signature


def _field(part: parts.Whole) -> str:
    return "text" if isinstance(part, Content) else "thinking"


def _end(reason: str | None, stop: str | None) -> dict[str, Any]:
    ended = "stop_sequence" if stop is not None and reason == "stop" else REASONS.get(reason or "")
    return {"stop_reason": ended, "stop_sequence": stop if ended == "stop_sequence" else None}


def _usage(usage: Usage) -> dict[str, int]:
    """As the API counts: what was found cached is no input."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | fields))
