"""A load generator of our own: streamed completions over raw asyncio sockets, timed where their bytes arrive.

Two loads: closed (so many clients, each sends its next request when the last has ended) and open (requests leave at
given times, whatever the server does). In the open one a request counts from the time it was due, so that a server
that stalls cannot hide the wait of those it kept out.
"""

from __future__ import annotations

import asyncio
import csv
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.report import percentile
from xllm.artifact import Artifact

READ_BYTES = 1 << 16
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Target:
    """Where requests go. `extra`: further fields of each body. `seconds`: after so long a request is given up."""

    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 600.0


@dataclass(frozen=True)
class Work:
    """One request: prompt ids, output tokens, and when it is due, in seconds after the first (open load only)."""

    prompt: tuple[int, ...]
    max_tokens: int
    at: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Times are of time.perf_counter; `events` are the arrivals of chunks with text.

    `prompt_tokens` and `output_tokens` are the server's own count (its usage chunk). `error` None: it ended as asked.
    """

    start: float
    end: float
    events: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """One run. Times in seconds, each by percentile ("p50"); rates over the span from the first start to the last end.

    itl: gaps between the chunks of one request, all requests together. tokens_per_event: 1 if every token came alone.
    """

    requests: int
    errors: Mapping[str, int]
    seconds: float
    ttft: Mapping[str, float]
    itl: Mapping[str, float]
    end_to_end: Mapping[str, float]
    output_tokens_per_second: float
    total_tokens_per_second: float
    tokens_per_event: float


class SseParser:
    """Bytes in any pieces to the data of whole server-sent events. Lines end in LF or CRLF; comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of every event that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events


async def closed_loop(target: Target, works: Sequence[Work], clients: int) -> list[Outcome]:
    """All works, at most `clients` at a time; outcomes in the order in which they ended."""
    waiting = iter(works)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for work in waiting:  # shared: each work is taken once
            outcomes.append(await send(target, work))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return outcomes


async def open_loop(target: Target, works: Sequence[Work]) -> list[Outcome]:
    """Each work when it is due; outcomes in the order of works."""
    begin = time.perf_counter()

    async def due(work: Work) -> Outcome:
        await asyncio.sleep(begin + work.at - time.perf_counter())
        return await send(target, work, start=begin + work.at)

    return list(await asyncio.gather(*(due(work) for work in works)))


async def send(target: Target, work: Work, start: float | None = None) -> Outcome:
    """One streamed request on a connection of its own. Whatever goes wrong is in the outcome's `error`."""
    begin = time.perf_counter() if start is None else start
    answer = _Answer()
    try:
        async with asyncio.timeout(target.seconds):
            await _exchange(target, work, answer)
    except TimeoutError:
        answer.error = "timeout"
    except EOFError:
        answer.error = "cut short"
    except (OSError, ValueError) as error:
        answer.error = type(error).__name__
    if answer.error is None and not answer.done:
        answer.error = "cut short"
    if answer.error is None and answer.output_tokens != work.max_tokens:
        answer.error = "wrong length"
    end = time.perf_counter()
    return Outcome(begin, end, tuple(answer.events), answer.prompt_tokens, answer.output_tokens, answer.error)


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Percentiles and rates. Failed requests count as errors and nowhere else, but their time is part of the span."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max((o.end for o in outcomes), default=0.0) - min((o.start for o in outcomes), default=0.0)
    output = sum(outcome.output_tokens for outcome in good)
    total = output + sum(outcome.prompt_tokens for outcome in good)
    events = sum(len(outcome.events) for outcome in good)
    gaps = [b - a for outcome in good for a, b in zip(outcome.events, outcome.events[1:], strict=False)]
    return Summary(
        requests=len(outcomes),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        seconds=seconds,
        ttft=_percentiles([outcome.events[0] - outcome.start for outcome in good if outcome.events]),
        itl=_percentiles(gaps),
        end_to_end=_percentiles([outcome.end - outcome.start for outcome in good]),
        output_tokens_per_second=output / seconds if seconds else math.nan,
        total_tokens_per_second=total / seconds if seconds else math.nan,
        tokens_per_event=output / events if events else math.nan,
    )


def uniform(count: int, prompt_tokens: int, max_tokens: int, vocab: int, seed: int) -> list[Work]:
    """Works of one size. Prompts are random ids and all different, so that no cache of prefixes helps."""
    source = random.Random(seed)
    return [Work(_ids(source, prompt_tokens, vocab), max_tokens) for _ in range(count)]


def poisson(works: Sequence[Work], rate: float, seed: int) -> list[Work]:
    """The works with arrivals of a Poisson process of `rate` requests a second, the first at 0."""
    source, at, timed = random.Random(seed), 0.0, []
    for work in works:
        timed.append(Work(work.prompt, work.max_tokens, at))
        at += source.expovariate(rate)
    return timed


@dataclass(frozen=True)
class TraceOptions:
    """How a trace is fitted to a small machine. speed compresses time (bursts stay bursts); scale multiplies lengths
    before the caps cut them."""

    requests: int = 50
    speed: float = 1.0
    scale: float = 1.0
    max_prompt: int = 1024
    max_output: int = 128


def replay(file: Path, options: TraceOptions, vocab: int, seed: int) -> list[Work]:
    """The first rows of a CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens. Raises ValueError for another."""
    source, works, begin = random.Random(seed), [], None
    with file.open(newline="") as lines:
        for row, _ in zip(csv.DictReader(lines), range(options.requests), strict=False):
            try:
                # Seven digits of a second are one more than fromisoformat takes.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                sizes = (int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except KeyError as error:
                raise ValueError(f"{file.name} has no column {error}") from None
            begin = at if begin is None else begin
            prompt, output = (max(1, round(size * options.scale)) for size in sizes)
            ids = _ids(source, min(prompt, options.max_prompt), vocab)
            works.append(Work(ids, min(output, options.max_output), (at - begin) / options.speed))
    return works


def one_letter(artifact: Artifact) -> dict[str, Any]:
    """Fields of a body that make every token the letter "a", so that each is a chunk of its own.

    Random weights write halves of characters, which a server rightly holds back. The work of a step stays the same.
    """
    vocab = json.loads(artifact.tokenizer or b"")["model"]["vocab"]
    return {"logit_bias": {str(vocab["a"]): 100}}


def _ids(source: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(source.randrange(vocab) for _ in range(count))


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{share * 100:g}": percentile(values, share) for share in SHARES}


class _Answer:
    """A stream as it arrives."""

    def __init__(self) -> None:
        self.events: list[float] = []
        self.prompt_tokens = self.output_tokens = 0
        self.error: str | None = None
        self.done = False

    def take(self, data: str, now: float) -> None:
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"].get("code") or "error")
        if usage := event.get("usage"):
            self.prompt_tokens, self.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if any(choice.get("text") for choice in event.get("choices", ())):
            self.events.append(now)


async def _exchange(target: Target, work: Work, answer: _Answer) -> None:
    parts = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        writer.write(_request(target, work, parts.netloc))
        status, chunked = await read_head(reader)
        if status != 200:
            answer.error = f"status {status}"
            return
        parser = SseParser()
        async for piece in read_pieces(reader, chunked):
            now = time.perf_counter()
            for data in parser.feed(piece):
                answer.take(data, now)
            if answer.done or answer.error:
                return
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _request(target: Target, work: Work, host: str) -> bytes:
    body = {
        "model": target.model, "prompt": work.prompt, "max_tokens": work.max_tokens, "stream": True, "temperature": 0,
        "ignore_eos": True, "stream_options": {"include_usage": True}, **target.extra,
    }  # fmt: skip
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + data


async def read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status, _, headers = head.partition("\r\n")
    return int(status.split()[1]), any(
        line.replace(" ", "") == "transfer-encoding:chunked" for line in headers.split("\r\n")
    )


async def read_pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it arrives."""
    if not chunked:
        while piece := await reader.read(READ_BYTES):
            yield piece
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


def flat(summary: Summary) -> Iterator[tuple[str, float]]:
    """Every figure by a name of its own ("ttft.p50"), in a fixed order."""
    for name, value in vars(summary).items():
        if isinstance(value, Mapping) and name != "errors":
            yield from ((f"{name}.{share}", seconds) for share, seconds in value.items())
        elif isinstance(value, float):
            yield name, value
