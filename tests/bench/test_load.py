"""The load generator counts what it should: parser, percentiles, loops and errors, against a scripted server."""

import asyncio
import json
import math
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import load
from bench.load import Outcome, SseParser, Target, TraceOptions, Work

EVENTS = ['{"a": 1}', "zwölf Boxkämpfer", "two\nlines", "[DONE]"]
STREAM = (
    'data: {"a": 1}\n\n: keep-alive\n\ndata:zwölf Boxkämpfer\r\n\r\nid: 7\ndata: two\ndata: lines\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=8))
def test_parser_gives_the_same_events_however_the_bytes_are_cut(cuts):
    data, parser, events, at = STREAM.encode(), SseParser(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        events += parser.feed(data[at:cut])
        at = cut
    assert events == EVENTS


def test_parser_keeps_an_unfinished_event_back():
    parser = SseParser()
    assert parser.feed(b"data: 1\n") == []
    assert parser.feed(b"\n") == ["1"]


class Scripted:
    """A completions server: the first prompt id of a request picks what happens to it."""

    def __init__(self):
        self.now = self.most = 0
        self.bodies = []

    async def __call__(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"content-length"))
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        await self._answer(body, writer)
        self.now -= 1
        writer.close()

    async def _answer(self, body, writer):
        kind, count = body["prompt"][0], body["max_tokens"]
        if kind == 503:
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(count if kind != 2 else count - 1):
            await self._event(writer, {"choices": [{"text": "a"}]})
        if kind == 1:  # ends in the middle
            return
        if kind == 3:
            await self._event(writer, {"error": {"code": "device_error"}})
            return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count if kind != 2 else count - 1}
        await self._event(writer, {"choices": [], "usage": usage})
        await self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    async def _event(self, writer, value):
        await self._chunk(writer, f"data: {json.dumps(value)}\n\n".encode())

    async def _chunk(self, writer, data):
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await writer.drain()
        await asyncio.sleep(0)


@asynccontextmanager
async def scripted():
    handler = Scripted()
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield handler, Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", {"seed": 5})


def test_closed_loop_sends_each_work_once_and_never_more_than_its_clients():
    works = [Work((10 + index, 0, 0), 3) for index in range(7)]

    async def run():
        async with scripted() as (handler, target):
            return handler, await load.closed_loop(target, works, clients=2)

    handler, outcomes = asyncio.run(run())
    assert sorted(body["prompt"][0] for body in handler.bodies) == list(range(10, 17))
    assert handler.most <= 2
    assert all(body["seed"] == 5 and body["ignore_eos"] and body["stream"] for body in handler.bodies)
    summary = load.summarize(outcomes)
    assert (summary.requests, summary.errors, summary.tokens_per_event) == (7, {}, 1.0)
    assert all(outcome.start <= outcome.events[0] <= outcome.events[-1] <= outcome.end for outcome in outcomes)
    assert summary.output_tokens_per_second == pytest.approx(21 / summary.seconds)
    assert summary.total_tokens_per_second == pytest.approx(42 / summary.seconds)


@pytest.mark.parametrize(
    ("kind", "error"), [(503, "status 503"), (1, "cut short"), (2, "wrong length"), (3, "device_error"), (9, None)]
)
def test_every_way_to_fail_is_counted_by_name(kind, error):
    async def run():
        async with scripted() as (_, target):
            return await load.send(target, Work((kind,), 2))

    outcome = asyncio.run(run())
    assert outcome.error == error
    assert load.summarize([outcome]).errors == ({error: 1} if error else {})


def test_nobody_listens():
    async def run():
        async with scripted() as (_, target):
            pass
        return await load.send(target, Work((1,), 1))

    assert asyncio.run(run()).error == "ConnectionRefusedError"


def test_open_loop_counts_from_when_a_request_was_due():
    async def run():
        async with scripted() as (_, target):
            return await load.open_loop(target, [Work((9,), 1, 0.0), Work((9,), 1, 0.02)])

    first, second = asyncio.run(run())
    assert second.start - first.start == pytest.approx(0.02)
    assert second.events[0] >= second.start


def test_summary_of_known_times():
    outcomes = [
        Outcome(0.0, 4.0, (1.0, 2.0, 4.0), 10, 3),
        Outcome(1.0, 5.0, (4.0, 5.0), 10, 4),
        Outcome(1.0, 10.0, (2.0,), 10, 1, "timeout"),
    ]
    summary = load.summarize(outcomes)
    assert summary.ttft["p50"] == 2.0
    assert summary.itl == {"p50": 1.0, "p90": pytest.approx(1.8), "p99": pytest.approx(1.98)}
    assert summary.end_to_end["p50"] == 4.0
    assert (summary.seconds, summary.output_tokens_per_second, summary.total_tokens_per_second) == (10.0, 0.7, 2.7)
    assert summary.tokens_per_event == pytest.approx(7 / 5)
    assert summary.errors == {"timeout": 1}


def test_summary_of_nothing_is_not_a_number():
    summary = load.summarize([])
    assert summary.requests == 0
    assert all(math.isnan(value) for name, value in load.flat(summary) if name != "seconds")


def test_works_are_repeatable_and_all_different():
    works = load.uniform(5, 8, 4, 1000, seed=3)
    assert works == load.uniform(5, 8, 4, 1000, seed=3)
    assert len({work.prompt for work in works}) == 5
    timed = load.poisson(works, rate=2.0, seed=1)
    assert timed[0].at == 0.0
    assert [work.at for work in timed] == sorted(work.at for work in timed)


def test_a_trace_is_scaled_capped_and_compressed(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,100,400\n2023-11-16 18:16:50.0,1,1\n"
    )
    works = load.replay(
        file, TraceOptions(requests=2, speed=2.0, scale=0.5, max_prompt=100, max_output=50), 1000, seed=0
    )
    assert [(len(work.prompt), work.max_tokens) for work in works] == [(100, 22), (50, 50)]
    assert [work.at for work in works] == [0.0, pytest.approx(2.0)]


def test_another_csv_is_refused_by_its_column(tmp_path):
    file = tmp_path / "other.csv"
    file.write_text("TIMESTAMP,Prompt\n2023-11-16 18:15:46.6,3\n")
    with pytest.raises(ValueError, match=r"other\.csv has no column 'ContextTokens'"):
        load.replay(file, TraceOptions(), 1000, seed=0)
