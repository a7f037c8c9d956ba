"""A mix of what clients do to a server, good and bad: short and long prompts, shared beginnings, streams left half-way,
schemas, samples, nonsense. Each request says which answers are right; whatever else comes back is an error."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bench.load import SseParser, read_head, read_pieces

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = [
    "the",
    "a",
    "small",
    "old",
    "king",
    "fox",
    "river",
    "house",
    "day",
    "night",
    "went",
    "saw",
    "had",
    "said",
    "to",
    "in",
    "and",
    "he",
    "she",
    "it",
    "was",
    "very",
    "happy",
]
SCHEMAS: tuple[Mapping[str, Any], ...] = (
    {"type": "object", "properties": {"name": {"enum": ["Tom", "Ann"]}}, "required": ["name"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "string", "maxLength": 8},
    {"type": "integer", "minimum": 0, "maximum": 99},
)
NONSENSE: tuple[tuple[str, bytes], ...] = (
    (COMPLETIONS, b"{"),
    (COMPLETIONS, b'{"prompt": "x", "n": 0}'),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}'),
    (COMPLETIONS, b'{"prompt": [999999]}'),
    (COMPLETIONS, b'{"prompt": "x", "no_such_field": 1}'),
    (COMPLETIONS, b'{"prompt": "x", "structured_outputs": {"regex": "("}}'),
    (CHAT, b'{"messages": []}'),
    (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}'),
)


@dataclass(frozen=True)
class Act:
    """One request. leave: None reads the answer to its end, k leaves after k events of the stream (0: before any).
    right: statuses that are right."""

    kind: str
    path: str
    body: bytes
    leave: int | None = None
    right: frozenset[int] = frozenset({200})


@dataclass
class Mix:
    """Draws acts. shares: how often each kind comes, in parts. The same seed draws the same acts."""

    seed: int
    max_len: int
    shares: Mapping[str, int] = field(
        default_factory=lambda: {
            "short": 45, "stream": 18, "left": 10, "cancelled": 5, "schema": 6, "samples": 4, "beams": 2, "long": 4,
            "nonsense": 6,
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._shared = [self._words(80) for _ in range(8)]
        self._kinds: dict[str, Callable[[], Act]] = {
            "short": lambda: self._completion("short"),
            "stream": lambda: self._chat("stream", None),
            "left": lambda: self._chat("left", self._random.randrange(1, 6)),
            "cancelled": lambda: self._chat("cancelled", 0),
            "schema": self._schema,
            "samples": lambda: self._completion("samples", n=3, best_of=4, temperature=1.0),
            "beams": lambda: self._completion("beams", beam_width=3),
            "long": lambda: self._completion("long", words=self.max_len // 3),
            "nonsense": self._nonsense,
        }

    def draw(self) -> Act:
        kind = self._random.choices(list(self.shares), list(self.shares.values()))[0]
        return self._kinds[kind]()

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def _prompt(self, words: int) -> str:
        shared = self._random.choice(self._shared) + " " if self._random.random() < 0.3 else ""
        return shared + self._words(words)

    def _sampling(self) -> dict[str, Any]:
        source = self._random
        return {
            "temperature": source.choice((0, 0.7, 1.0)),
            "top_p": source.choice((1.0, 0.9)),
            "presence_penalty": source.choice((0, 0.5)),
            "seed": source.randrange(1 << 30),
            "max_tokens": source.randrange(1, 17),
        }

    def _completion(self, kind: str, words: int | None = None, **more: Any) -> Act:
        body = {"prompt": self._prompt(words or self._random.randrange(1, 30)), **self._sampling()}
        if self._random.random() < 0.2 and "beam_width" not in more:
            body["logprobs"] = self._random.randrange(1, 5)
        if "beam_width" in more:
            body = {"prompt": body["prompt"], "max_tokens": body["max_tokens"]}
        return Act(kind, COMPLETIONS, json.dumps(body | more).encode())

    def _chat(self, kind: str, leave: int | None) -> Act:
        messages = [{"role": "user", "content": self._prompt(self._random.randrange(1, 30))}]
        body = {"messages": messages, "stream": True, **self._sampling()}
        if leave is not None:
            body |= {"max_tokens": 64, "ignore_eos": True}
        return Act(kind, CHAT, json.dumps(body).encode(), leave)

    def _schema(self) -> Act:
        form = {"json": self._random.choice(SCHEMAS)}
        body = {"prompt": self._prompt(8), **self._sampling(), "max_tokens": 24, "structured_outputs": form}
        return Act("schema", COMPLETIONS, json.dumps(body).encode())

    def _nonsense(self) -> Act:
        path, body = self._random.choice(NONSENSE)
        return Act("nonsense", path, body, right=frozenset({400}))


async def perform(url: str, act: Act) -> str | None:
    """Sends it and reads as much as it asks for. None, or what was wrong with the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        head = (
            f"POST {act.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(act.body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + act.body)
        if act.leave == 0:
            await asyncio.sleep(0.01)
            return None
        status, chunked = await read_head(reader)
        if status not in act.right:
            data = b"".join([piece async for piece in read_pieces(reader, chunked)])
            return f"{act.kind}: status {status} {data[:200].decode('utf-8', 'replace')}"
        return await _read(reader, chunked, act)
    except (OSError, EOFError, ValueError) as error:
        return f"{act.kind}: {type(error).__name__}"
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, chunked: bool, act: Act) -> str | None:
    parser, data, events = SseParser(), b"", 0
    async for piece in read_pieces(reader, chunked):
        if not chunked:
            data += piece
            continue
        for event in parser.feed(piece):
            events += 1
            if event == "[DONE]":
                return None
            if '"error"' in event:
                return f"{act.kind}: {event[:200]}"
            if events == act.leave:
                return None
    if chunked:
        return f"{act.kind}: the stream ended without its end"
    answer = json.loads(data)
    return None if ("error" in answer) == (400 in act.right) else f"{act.kind}: {data[:200]!r}"
