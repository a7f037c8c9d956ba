"""Decides what routes ask an engine of rows for, and what /v1/embeddings answers. A row depends on its prompt alone, so
what is answered about a text never depends on those beside it."""

from __future__ import annotations

import asyncio
import uuid
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from xllm.runtime import Request
from xllm.runtime.urgency import Urgency
from xllm.service.answer import report, send_whole
from xllm.service.body import EmbeddingBody, RowsBody
from xllm.service.dispatch import Subscription
from xllm.service.endpoint import Endpoint
from xllm.service.errors import from_output, invalid
from xllm.service.gate import Receive, Record, Send
from xllm.service.params import check_ids, check_text, listed, messages
from xllm.service.sampling import ModelFacts, within
from xllm.service.tokenizer import TextCodec
from xllm.service.tokens import MAX_CHARS

if TYPE_CHECKING:
    import numpy as np

    Rows = Sequence[np.ndarray]  # float32 [N] each, in the order of their prompts

MAX_PROMPTS = 2048  # of one HTTP request, as OpenAI takes
MAX_TOKENS = 1 << 21  # of one HTTP request
MAX_FLOATS = 1 << 21  # of one answer: as text they take twenty times their bytes


@dataclass(frozen=True)
class RowsJob:
    """One validated HTTP request: a row for each prompt, and the answer that is made of all of them."""

    prompts: tuple[tuple[int, ...], ...]
    answer: Callable[[Rows], dict[str, Any]]


class RowsEndpoint(Endpoint[RowsJob]):
    """A route whose answer is made of rows."""

    async def run(self, job: RowsJob, entry: Record, receive: Receive, send: Send) -> None:
        name = uuid.uuid4().hex
        known = {"arrival": entry.started, "urgency": Urgency(offline=entry.offline)}
        requests = [Request(f"{name}-{at}", ids, **known) for at, ids in enumerate(job.prompts)]
        reasons = ["abort"] * len(requests)
        async with self.submitted(requests, receive, entry) as subscription:
            try:
                rows = await _gather(subscription, reasons)
                # Numbers as text take a while, so they are written beside the event loop.
                data = await asyncio.get_running_loop().run_in_executor(self.service.pool, self._body, job, rows)
                await send_whole(send, data, subscription, entry)
            finally:
                report(self.service.recorder, entry, job.prompts, reasons)

    def _body(self, job: RowsJob, rows: Rows) -> bytes:
        tokens = sum(map(len, job.prompts))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return msgspec.json.encode(job.answer(rows) | {"model": self.service.facts.name, "usage": usage})


class Embeddings(RowsEndpoint):
    """POST /v1/embeddings."""

    body = EmbeddingBody
    kind = "embedding"
    tasks = ("embed",)

    def plan(self, data: bytes, entry: Record) -> RowsJob:
        body, facts = self.parse(data, EmbeddingBody), self.service.facts
        if body.encoding_format not in (None, "float", "base64"):
            shown = body.encoding_format[:64]
            raise invalid("invalid_request", f"encoding_format is {shown!r}, allowed: float, base64", "encoding_format")
        within("dimensions", body.dimensions, 1, facts.width)
        width = body.dimensions or facts.width
        given, name, special = self._inputs(body)
        if len(given) * width > MAX_FLOATS:
            text = f"{len(given)} embeddings of {width} numbers are more than {MAX_FLOATS}: ask for them in parts"
            raise invalid("invalid_request", text, name)
        tokens = Tokens(facts, self.service.codec, body, special)
        several = isinstance(body.input, list) and not isinstance(body.input[0], int)
        prompts = [tokens.of(each, f"{name}[{at}]" if several else name) for at, each in enumerate(given)]
        return RowsJob(tuple(prompts), lambda rows: _embeddings(rows, width, body.encoding_format == "base64"))

    def _inputs(self, body: EmbeddingBody) -> tuple[list[str | list[int]], str, bool]:
        """What to embed, the field it is in, and whether special tokens are added to it."""
        if (body.input is None) == (body.messages is None):
            raise invalid("missing_parameter", "give either `input` or `messages`", "input")
        if body.input is not None:
            if body.chat_template_kwargs is not None:
                raise invalid("invalid_request", "chat_template_kwargs needs messages", "chat_template_kwargs")
            given = listed(body.input, "input")
            check_count(given, "input")
            return given, "input", body.add_special_tokens is not False
        text = self.service.render(messages(body.messages or []), body.chat_template_kwargs or {}, False)
        return [text], "messages", body.add_special_tokens is True


class Text(NamedTuple):
    """A text, and the field that it is in."""

    text: str
    path: str


class Tokens:
    """Texts of one request to ids, cut where the request says so. Errors name the field, `path`."""

    def __init__(self, facts: ModelFacts, codec: TextCodec, body: RowsBody, special: bool = True) -> None:
        self._facts, self._codec, self._special = facts, codec, special
        self._limit = facts.max_len if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
        within("truncate_prompt_tokens", self._limit, 1, facts.max_len)
        self._left = MAX_TOKENS

    def of(self, prompt: str | list[int], path: str) -> tuple[int, ...]:
        """The ids of a text; of ids, the same."""
        if isinstance(prompt, str):
            self._check(prompt, path, may_be_cut=True)
            return self._encoded(path, prompt)
        return self._taken(prompt if self._limit is None else prompt[: self._limit], path)

    def of_pair(self, first: Text, second: Text) -> tuple[int, ...]:
        """The ids of two texts as the tokenizer joins them; it is the second that is cut."""
        self._check(first.text, first.path, may_be_cut=False)
        self._check(second.text, second.path, may_be_cut=True)
        return self._encoded(second.path, first.text, second.text)

    def _check(self, text: str, path: str, may_be_cut: bool) -> None:
        if self._limit is None or not may_be_cut or not text:
            check_text(text, path, self._facts, self._codec.encode)
        elif len(text) > MAX_CHARS:
            raise invalid("invalid_request", f"{path} has {len(text)} characters, {MAX_CHARS} are tokenized", path)

    def _encoded(self, path: str, text: str, other: str | None = None) -> tuple[int, ...]:
        stride = self._facts.vocab if self._facts.segments > 1 else 0
        try:
            ids = self._codec.encode_within(self._limit, text, other, stride, self._special)
        except ValueError as error:
            message = f"truncate_prompt_tokens leaves nothing of {path}: {error}"
            raise invalid("invalid_request", message, "truncate_prompt_tokens") from None
        return self._taken(ids, path)

    def _taken(self, ids: Sequence[int], path: str) -> tuple[int, ...]:
        self._left -= len(ids)
        if self._left < 0:
            message = f"the prompts up to {path} have more than {MAX_TOKENS} tokens together: ask for them in parts"
            raise invalid("invalid_request", message, path)
        return check_ids(ids, path, self._facts)


def check_count(given: Sequence[Any], name: str) -> None:
    """Refuses a list with nothing in it, or with too much."""
    if not given:
        raise invalid("empty_prompt", f"{name} is empty", name)
    if len(given) > MAX_PROMPTS:
        raise invalid("invalid_request", f"{name} has {len(given)} entries, at most {MAX_PROMPTS} are allowed", name)


def _embeddings(rows: Rows, width: int, base64: bool) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": at, "embedding": _shown(_cut(row, width), base64)}
        for at, row in enumerate(rows)
    ]
    return {"object": "list", "data": data}


def _shown(row: np.ndarray, base64: bool) -> str | msgspec.Raw:
    """Encoded one by one: as objects, all the numbers of an answer would take a hundred megabytes."""
    if base64:
        return b64encode(row.astype("<f4").tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(row.tolist()))


def _cut(row: np.ndarray, width: int) -> np.ndarray:
    """The first `width` numbers; of length 1 where that is not all."""
    if width == len(row):
        return row
    wide = row[:width].astype("f8")
    return (wide / (length(wide) or 1.0)).astype("f4")


def length(wide: np.ndarray) -> float:
    """Of a float64 [N] vector."""
    return float((wide * wide).sum()) ** 0.5


async def _gather(subscription: Subscription, reasons: list[str]) -> Rows:
    """All rows, in the order of their prompts; `reasons` says how each ended so far. Raises ApiError."""
    rows: dict[int, np.ndarray] = {}
    while len(rows) < len(reasons):
        for index, output in await subscription.next():
            if output.row is None:
                raise from_output(output.error or "shutting_down: the request was cancelled by the server")
            rows[index], reasons[index] = output.row, "stop"
    return [rows[index] for index in range(len(reasons))]
