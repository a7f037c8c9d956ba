"""Decides what OpenAI's Responses API answers: responses whole and as events, and those that are stored, which later
ones follow. They are kept in memory: the last ones, of each key its own."""

from __future__ import annotations

import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from xllm.service.completions import OfChat
from xllm.service.endpoint import Service
from xllm.service.errors import ApiError
from xllm.service.format import Format, Usage, Whole
from xllm.service.gate import Receive, Record, Scope, Send, record, send_json
from xllm.service.generation import Delta
from xllm.service.openai import token_logprob
from xllm.service.params import Job
from xllm.service.parsers import values
from xllm.service.parsers.parts import Call, Content, More, Part
from xllm.service.responses_body import NAMES, NOT_SUPPORTED, ResponsesBody, chat_body, items_of
from xllm.service.tokenizer import TextCodec

PATH = "/v1/responses"
PAD = 64  # characters that an obfuscated delta is filled up to
MAX_STORED = 1024
MAX_STORED_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response with the items before it; `tenant` may ask for it. `data`: both as JSON."""

    tenant: str
    items: bytes
    response: bytes


class Store:
    """The last responses, by id. Belongs to the event loop; reading is safe from the pool."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def keep(self, name: str, stored: Stored) -> None:
        self._held[name] = stored
        self._bytes += len(stored.items) + len(stored.response)
        while len(self._held) > MAX_STORED or self._bytes > MAX_STORED_BYTES:
            self._forget(next(iter(self._held)))

    def find(self, name: str, tenant: str, param: str | None = None) -> Stored:
        """Raises ApiError 404 for what is not there, or is another's."""
        stored = self._held.get(name)
        if stored is None or stored.tenant != tenant:
            text = "there is no such response: the last ones are kept, of each key, and none that store: false left out"
            raise ApiError(404, "response_not_found", text, param)
        return stored

    def remove(self, name: str, tenant: str) -> None:
        """Raises ApiError 404."""
        self.find(name, tenant)
        self._forget(name)

    def _forget(self, name: str) -> None:
        stored = self._held.pop(name)
        self._bytes -= len(stored.items) + len(stored.response)


@dataclass(frozen=True)
class Asked:
    """What an answer repeats of its request. items: of all turns before the answer."""

    body: ResponsesBody
    items: list[dict[str, Any]]
    tenant: str


class ResponsesFormat(Format):
    """One response. Its items follow the order of the answer: reasoning, messages and calls."""

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        asked: Asked,
        defaults: dict[str, Any],
        keep: Callable[[str, Stored], None],
    ) -> None:
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._model, self._codec, self._asked, self._defaults, self._keep = model, codec, asked, defaults, keep
        options = asked.body.stream_options
        self._pads = bool(options and options.include_obfuscation)
        self._logprobs: list[msgspec.Raw] = []  # of tokens whose text is not shown yet
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open: type[Part] | None = None  # what the last item holds, until it is closed
        self._cut = False

    def gather(self, choice: Whole, delta: Delta) -> None:
        self.chunk(0, delta)  # what the events say is what is in the answer

    def whole(self, choices: Sequence[Whole], usage: Usage) -> bytes:
        return self._stored(usage)

    def first(self, choices: int, usage: Usage) -> bytes:
        begun = self._response("in_progress", None)
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def chunk(self, index: int, delta: Delta) -> bytes:
        self._logprobs += [token_logprob(self._codec, item) for item in delta.logprobs if not item.thinking]
        events = b"".join(map(self._part, delta.parts))
        return events + (self._end(delta.finish_reason) if delta.finish_reason is not None else b"")

    def last(self, usage: Usage) -> bytes:
        return self._event(f"response.{self._status}", response=msgspec.Raw(self._stored(usage)))

    def failed(self, error: ApiError, request_id: str) -> bytes:
        response = self._response("failed", None)
        return self._event("response.failed", response=response | {"error": error.body(request_id)["error"]})

    @property
    def _status(self) -> str:
        return "incomplete" if self._cut else "completed"

    def _stored(self, usage: Usage) -> bytes:
        data = msgspec.json.encode(self._response(self._status, usage))
        if self._asked.body.store is not False:
            self._keep(self._id, Stored(self._asked.tenant, msgspec.json.encode(self._asked.items), data))
        return data

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        body = self._asked.body
        kept = {name: getattr(body, name) for name in (
            "instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key", "safety_identifier", "user"
        )}  # fmt: skip
        sampled = {
            name: self._defaults.get(name, 1.0) if (given := getattr(body, name)) is None else given
            for name in ("temperature", "top_p")
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tools": body.tools or [],
            "tool_choice": body.tool_choice or "auto",
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": body.store is not False,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": usage and _usage(usage),
            **kept,
            **sampled,
        }

    def _part(self, part: Part) -> bytes:
        logprobs, self._logprobs = self._logprobs, []
        if isinstance(part, More):
            return self._more(part.arguments)
        if isinstance(part, Call):
            return self._end() + self._call(part)
        events = b""
        if type(part) is not self._open:
            events = self._end()
            kind, at = ("message", "msg") if isinstance(part, Content) else ("reasoning", "rs")
            item: dict[str, Any] = {"id": f"{at}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
            item |= {"role": "assistant"} if isinstance(part, Content) else {"summary": []}
            events += self._event(
                "response.output_item.added", item=item | {"content": []}, output_index=len(self._items)
            )
            item["content"] = [{"type": _kind(part), "text": ""} | _extras(part)]
            self._items.append(item)
            self._open = type(part)
            events += self._of_part("response.content_part.added", part=item["content"][0])
        self._items[-1]["content"][0]["text"] += part.text
        extra = {"logprobs": logprobs} if isinstance(part, Content) else {}
        if isinstance(part, Content):
            self._items[-1]["content"][0]["logprobs"] += logprobs
        return events + self._of_part(f"response.{_kind(part)}.delta", delta=part.text, **extra)

    def _call(self, call: Call) -> bytes:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "arguments": ""}
        item |= {"call_id": call.id, "name": call.name}
        begun = self._event("response.output_item.added", item=dict(item), output_index=len(self._items))
        self._items.append(item)
        self._open = Call
        return begun + (self._more(call.arguments) if call.arguments else b"")

    def _more(self, arguments: str) -> bytes:
        item, place = self._items[-1], len(self._items) - 1
        item["arguments"] += arguments
        kind = "response.function_call_arguments.delta"
        return self._event(kind, delta=arguments, item_id=item["id"], output_index=place)

    def _end_call(self) -> bytes:
        item, place = self._items[-1], len(self._items) - 1
        told = {"item_id": item["id"], "arguments": item["arguments"], "name": item["name"]}
        done = self._event("response.function_call_arguments.done", output_index=place, **told)
        return done + self._event("response.output_item.done", item=item, output_index=place)

    def _end(self, reason: str | None = None) -> bytes:
        """Closes the last item; with a reason, the answer."""
        self._cut = reason == "length"
        if self._open is None:
            return b""
        item, kind = self._items[-1], "output_text" if self._open is Content else "reasoning_text"
        item["status"] = self._status
        if self._open is Call:
            self._open = None
            return self._end_call()
        extra = {"logprobs": item["content"][0]["logprobs"]} if self._open is Content else {}
        self._open = None
        return (
            self._of_part(f"response.{kind}.done", text=item["content"][0]["text"], **extra)
            + self._of_part("response.content_part.done", part=item["content"][0])
            + self._event("response.output_item.done", item=item, output_index=len(self._items) - 1)
        )

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        if self._pads and kind.endswith(".delta"):
            fields["obfuscation"] = secrets.token_hex(PAD)[: -len(fields["delta"]) % PAD]
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number} | fields)
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


class Responses(OfChat):
    """POST /v1/responses."""

    body, refused, names = ResponsesBody, NOT_SUPPORTED, NAMES
    kind = "response"

    def __init__(self, service: Service, store: Store) -> None:
        super().__init__(service)
        self._store = store

    def job(self, data: bytes, entry: Record) -> Job:
        body = self.parse(data, ResponsesBody)
        items = items_of(body)
        if body.previous_response_id is not None:
            before = self._store.find(body.previous_response_id, entry.tenant, "previous_response_id")
            said = msgspec.json.decode(before.response)["output"]
            items = [*msgspec.json.decode(before.items), *filter(_is_whole, said), *items]
        return replace(self.chat_job(chat_body(body, items)), asked=Asked(body, items, entry.tenant))

    def format(self, job: Job) -> Format:
        facts = self.service.facts
        return ResponsesFormat(facts.name, self.service.codec, job.asked, dict(facts.defaults), self._store.keep)


class StoredResponses:
    """GET and DELETE /v1/responses/ID, GET /v1/responses/ID/input_items."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name, _, rest = scope["path"].removeprefix(f"{PATH}/").partition("/")
        tenant = record(scope).tenant
        if rest not in ("", "input_items") or (rest and scope["method"] == "DELETE"):
            raise ApiError(404, "unknown_route", "there is no such route")
        if scope["method"] == "DELETE":
            self._store.remove(name, tenant)
            return await send_json(send, 200, {"id": name, "object": "response.deleted", "deleted": True})
        stored = self._store.find(name, tenant)
        if not rest:
            return await send_json(send, 200, msgspec.Raw(stored.response))
        items = [{"id": f"item_{at}"} | item for at, item in enumerate(msgspec.json.decode(stored.items))][::-1]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
        return await send_json(send, 200, {"object": "list", "data": items, "has_more": False} | ends)


def _is_whole(item: dict[str, Any]) -> bool:
    """Whether the next answer may go by it: a call that broke off is nothing that a template could show."""
    return item["type"] != "function_call" or values.is_object(item["arguments"])


def _kind(part: Part) -> str:
    return "output_text" if isinstance(part, Content) else "reasoning_text"


def _extras(part: Part) -> dict[str, Any]:
    return {"annotations": [], "logprobs": []} if isinstance(part, Content) else {}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
