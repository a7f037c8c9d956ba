"""Decides the life of what is generated, from its job to its answer, whole or as a stream. Its status waits for the
first output, so that what fails before has its own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from xllm.runtime import Group, Request, SamplingParams, TokenOutput
from xllm.runtime.request import PromptLogprobs
from xllm.service.dispatch import Subscription
from xllm.service.endpoint import Endpoint, Service
from xllm.service.errors import GONE, ApiError
from xllm.service.format import Format, Usage, Whole
from xllm.service.gate import Receive, Record, Send
from xllm.service.generation import Choice, Delta
from xllm.service.metrics import Course, Recorder
from xllm.service.params import Job

# A client that takes nothing for so long is gone, and a failed stream waits only so long to say why.
STALL_SECONDS = 60.0
FAREWELL_SECONDS = 5.0
PIECE_BYTES = 64 << 10  # of an answer that is sent whole: only so much of it lies in a connection's buffer
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generate(Endpoint[Job]):
    """A route whose answers are generated: what is asked for, and what the answer looks like."""

    def job(self, data: bytes, entry: Record) -> Job:
        """The body as what is to be generated. Raises ApiError."""
        raise NotImplementedError

    def format(self, job: Job) -> Format:
        """The bodies of the answer."""
        raise NotImplementedError

    def plan(self, data: bytes, entry: Record) -> Job:
        job = self.job(data, entry)
        grammar = self.service.grammars().compile(job.form) if job.form is not None else None
        if job.budget is not None:
            from xllm.service.budget import Bounded

            grammar = Bounded(grammar, job.reading, job.budget, self.service.codec, self.service.facts.vocab)
        if grammar is None:
            return job
        return replace(job, params=tuple(replace(params, grammar=grammar) for params in job.params))

    async def run(self, job: Job, entry: Record, receive: Receive, send: Send) -> None:
        form = self.format(job)
        async with self.submitted(requests_of(job, entry), receive, entry, form.id) as subscription:
            answer = _Answer(self.service, job, form, subscription, entry)
            try:
                await (answer.stream(send) if job.stream else answer.whole(send))
            finally:
                answer.report()


class _Answer:
    def __init__(self, service: Service, job: Job, form: Format, subscription: Subscription, entry: Record) -> None:
        self._service, self._job, self._format = service, job, form
        self._subscription, self._entry = subscription, entry
        self._choices = [
            Choice(service.codec, job.stops, job.skip_special_tokens, job.reading) for _ in subscription.ids
        ]
        self._courses = [Course(entry.started) for _ in self._choices]
        self._prompts: dict[int, PromptLogprobs] = {}  # by prompt
        self._kind = "stream" if job.stream else "non_stream"

    async def whole(self, send: Send) -> None:
        results, prompts = [Whole() for _ in self._choices], self._job.prompts
        while not self._done:
            for index, delta in self._take(await self._subscription.next()):
                self._format.gather(results[index], delta)
        if self._job.params[0].prompt_logprobs is not None:
            shown = [self._format.prompt(self._prompts.get(at), prompt) for at, prompt in enumerate(prompts)]
            for index, result in enumerate(results):
                result.prompt = shown[index // self._job.best_of]
        with self._responding():
            data = self._format.whole([results[index] for index in self._chosen()], self._usage)
        await send_whole(send, data, self._subscription, self._entry, self._headers)

    async def stream(self, send: Send) -> None:
        pending = self._take(await self._subscription.next(self._service.limits.keep_alive_seconds))
        await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, *self._headers]})
        loop = asyncio.get_running_loop()
        said = loop.time()
        try:
            async with asyncio.timeout(None) as patience:
                self._subscription.on_failure = lambda: patience.reschedule(loop.time() + FAREWELL_SECONDS)
                data = self._format.first(len(self._choices), self._usage)
                while True:
                    with self._responding():
                        data += b"".join(self._format.chunk(index, delta) for index, delta in pending if _shows(delta))
                        if self._done:
                            data += self._format.last(self._usage)
                    if data:
                        patience.reschedule(loop.time() + STALL_SECONDS)
                        await send({"type": "http.response.body", "body": data, "more_body": not self._done})
                        said = loop.time()
                    if self._done:
                        return
                    patience.reschedule(None)
                    outputs = await self._subscription.next(self._service.limits.keep_alive_seconds)
                    pending = self._take(outputs)
                    # A call is held until it is complete, which may take longer than a client waits.
                    quiet = loop.time() - said >= self._service.limits.keep_alive_seconds
                    data = self._format.idle if quiet or not outputs else b""
        except ApiError as error:
            self._entry.status = error.status
            if error.code == GONE:
                raise
            await self._farewell(send, error)
        except TimeoutError:  # returning without a last chunk makes the server drop the connection
            self._entry.status = 499

    async def _farewell(self, send: Send, error: ApiError) -> None:
        """The headers are gone: the error travels as an event, as long as the client reads at all."""
        data = self._format.failed(error, self._entry.id)
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": False})
        except TimeoutError:
            pass

    def report(self) -> None:
        """Writes what happened into the record of the request and the metrics."""
        self._entry.generated_tokens = sum(choice.tokens for choice in self._choices)
        reasons = [choice.finish_reason or "abort" for choice in self._choices]
        recorder, job = self._service.recorder, self._job
        recorder.samples.observe(job.n)
        for index, (course, choice) in enumerate(zip(self._courses, self._choices, strict=True)):
            course.prompt, course.cached = len(job.prompts[index // job.best_of]), choice.cached_tokens
            recorder.ended(course)
        for params in job.params:
            if params.max_tokens is not None:
                recorder.max_tokens.observe(params.max_tokens)
        report(recorder, self._entry, job.prompts, reasons)

    def _chosen(self) -> list[int]:
        """The sequences that are the choices: of each prompt's the n likeliest, the likeliest first."""
        n, best_of = self._job.n, self._job.best_of
        if n == best_of:
            return list(range(len(self._choices)))
        ranked = sorted(range(len(self._choices)), key=lambda at: (at // best_of, -self._choices[at].likelihood))
        return [index for place, index in enumerate(ranked) if place % best_of < n]

    @property
    def _done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-weights-version", self._format.weights.encode())] if self._format.weights else []

    @property
    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self._job.prompts)),
            completion_tokens=sum(choice.tokens for choice in self._choices),
            cached_tokens=sum(choice.cached_tokens for choice in self._choices[:: self._job.best_of]),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in self._choices),
        )

    @contextmanager
    def _responding(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._service.recorder.responding_seconds[self._kind] += time.monotonic() - begin

    def _take(self, outputs: Sequence[tuple[int, TokenOutput]]) -> list[tuple[int, Delta]]:
        now = time.monotonic()
        deltas = []
        for index, output in outputs:
            choice = self._choices[index]
            if choice.finish_reason is not None:  # steps that were on their way when a stop string hit
                continue
            if output.token is not None:
                self._service.recorder.token(self._courses[index], now, output.queued)
            if output.prompt is not None:
                self._prompts[index // self._job.best_of] = output.prompt
            deltas.append((index, choice.push(output)))
            self._format.weights = choice.weights
            if choice.cut:
                self._service.dispatcher.cancel(self._subscription, output.request_id, output.index + 1)
        self._service.recorder.detokenization_seconds[self._kind] += time.monotonic() - now
        return deltas


async def send_whole(
    send: Send,
    data: bytes,
    subscription: Subscription | None,
    entry: Record,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Sends a JSON answer in pieces, as long as the client takes them and what it subscribes to has not failed."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as patience:
            if subscription is not None:
                subscription.on_failure = lambda: patience.reschedule(loop.time())
            for at in range(0, len(data), PIECE_BYTES):
                end = at + PIECE_BYTES
                patience.reschedule(loop.time() + STALL_SECONDS)
                await send({"type": "http.response.body", "body": data[at:end], "more_body": end < len(data)})
    except TimeoutError:  # as in a stream
        entry.status = 499


def report(recorder: Recorder, entry: Record, prompts: Sequence[Sequence[int]], reasons: Sequence[str]) -> None:
    """Writes how the sequences of a request ended into its record and the metrics."""
    seconds = time.monotonic() - entry.started
    entry.prompt_tokens = sum(map(len, prompts))
    entry.finish_reasons = ",".join(dict.fromkeys(reasons))
    recorder.finished.update(reasons)
    recorder.handling_seconds[entry.kind] += seconds
    recorder.end_to_end.observe(seconds)
    recorder.prompt_tokens.observe(entry.prompt_tokens)
    recorder.generated_tokens.observe(entry.generated_tokens)


def requests_of(job: Job, entry: Record) -> list[Request]:
    """Of each prompt as many as run for it."""
    name = uuid.uuid4().hex
    salt = f"{entry.tenant}/{job.cache_salt}" if job.cache_salt else entry.tenant  # no tenant has a slash
    urgency = replace(job.urgency, offline=True) if entry.offline else job.urgency
    known = {"arrival": entry.started, "cache_salt": salt, "group": Group(), "urgency": urgency}
    return [
        Request(f"{name}-{at * job.best_of + sample}", prompt, _of_sample(params, sample), sample, **known)
        for at, (prompt, params) in enumerate(zip(job.prompts, job.params, strict=True))
        for sample in range(job.best_of)
    ]


def _of_sample(params: SamplingParams, sample: int) -> SamplingParams:
    """A prompt's logprobs are computed with its first sample."""
    return replace(params, prompt_logprobs=None) if sample and params.prompt_logprobs is not None else params


def _shows(delta: Delta) -> bool:
    return bool(delta.text or delta.logprobs or delta.finish_reason)
