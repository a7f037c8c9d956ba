"""A byte-level tokenizer, an engine without a model, and a service around them."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from xllm.runtime import Batch, EngineStats, KVSpec, Request, RequestRefused, StepError, StepResult, TokenOutput
from xllm.runtime import Limits as ExecutorLimits
from xllm.runtime.beams import Beam, Found
from xllm.runtime.encoding import Encoder
from xllm.runtime.pricing import Prices
from xllm.runtime.request import Matcher
from xllm.runtime.rows import RowEngine
from xllm.service.app import load_service
from xllm.service.dispatch import Dispatcher
from xllm.service.endpoint import Limits, Service
from xllm.service.gate import Access, Keys
from xllm.service.listener import bind, url
from xllm.service.metrics import Front
from xllm.service.sampling import ModelFacts
from xllm.service.server import Server
from xllm.service.sites import origins_of
from xllm.service.tokenizer import TextCodec

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>{% endfor %}"
    "{% for i in range(loops or 0) %}{% for j in range(loops) %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """256 bytes, two special tokens (256 <|start|>, 257 <|end|> = EOS), 512 ids in the model."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    return tokenizer


EOS = 257
VOCAB = 512
MAX_LEN = 2048
TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def shout(request: Request) -> list[int]:
    """The prompt again, as far as it is text; random letters when a temperature and a seed are set."""
    params = request.params
    if params.temperature and params.seed is not None:
        draw = random.Random(f"{params.seed} {request.sample_index}")
        return [*ids("".join(draw.choices("abcdefgh", k=8))), EOS]
    return [*(token for token in request.prompt if token < 256), EOS]


class FakeEngine:
    """One thread, one token per request and step. `reply` says which tokens, and where a grammar forbids one the least
    that it allows is taken; `tick` seconds lie between steps."""

    def __init__(
        self,
        sink: Callable[[list[TokenOutput]], None],
        reply: Callable[[Request], Sequence[int]] = shout,
        tick: float = 0.0,
        queue_limit: int = 10_000,
    ) -> None:
        self._sink, self._reply, self._tick, self._queue_limit = sink, reply, tick, queue_limit
        self._live: dict[str, tuple[Request, Sequence[int], int]] = {}
        self._matchers: dict[str, Matcher] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self.seen: list[Request] = []
        self.cancelled = 0
        self.generated = 0
        self.paused = False
        self.broken: str | None = None
        self.refusal: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._changed:
            if len(self._live) >= self._queue_limit:
                raise RequestRefused("queue_full", "too many requests wait")
            self.seen.append(request)
            self._live[request.id] = (request, self._reply(request), 0)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if self._live.pop(request_id, None) is not None:
                self.cancelled += 1

    def stats(self) -> EngineStats:
        with self._changed:
            live = len(self._live)
            return EngineStats(
                running=live,
                free_pages=100 - live,
                used_pages=live,
                total_pages=100,
                mapped_pages=7,
                cached_pages=20,
                reusable_pages=3,
                looked_up_tokens=80,
                cached_tokens=20,
                generated_tokens=self.generated,
                refusal=self.refusal,
            )

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or (self._live and not self.paused), 0.05)
                if self._stopped:
                    return
                outputs = [] if self.paused else self._step()
            if outputs:
                self._sink(outputs)
            time.sleep(self._tick)

    def _step(self) -> list[TokenOutput]:
        outputs = []
        for request, reply, at in list(self._live.values()):
            if self.broken is not None:
                outputs.append(TokenOutput(request.id, None, at, finish_reason="error", error=self.broken))
                del self._live[request.id]
                continue
            if request.beams is not None:
                outputs.append(_searched(request, reply))
                del self._live[request.id]
                continue
            token = self._allowed(request, reply[at % len(reply)], at)
            reason = None
            stops = token == EOS or token in request.params.stop_token_ids
            if stops and not request.params.ignore_eos:
                reason = "stop"
            elif request.params.max_tokens is not None and at + 1 >= request.params.max_tokens:
                reason = "length"
            wanted = request.params.logprobs
            outputs.append(
                TokenOutput(
                    request.id,
                    token,
                    at,
                    logprob=None if wanted is None else -0.5,
                    top_logprobs=tuple((index, -1.0 - index) for index in range(wanted or 0)),
                    finish_reason=reason,
                    prompt_tokens=len(request.prompt),
                )
            )
            self.generated += 1
            if reason is None:
                self._live[request.id] = (request, reply, at + 1)
            else:
                del self._live[request.id]
        return outputs

    def _allowed(self, request: Request, token: int, at: int) -> int:
        if request.params.grammar is None:
            return token
        if at == 0:
            self._matchers[request.id] = request.params.grammar.start()
        matcher, mask = self._matchers[request.id], np.zeros(VOCAB // 32, np.uint32)
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = token if token in allowed else int(allowed[0])
        matcher.take([token])
        return token


def _searched(request: Request, reply: Sequence[int]) -> TokenOutput:
    """What a search gives at its end: the reply, as every beam's."""
    assert request.beams is not None
    tokens = tuple(reply[: request.params.max_tokens])
    wanted = request.params.logprobs or 0
    best = tuple((index, -1.0 - index) for index in range(wanted))
    beam = Beam(-0.5 * len(tokens), tokens, (-0.5,) * len(tokens), (best,) * len(tokens))
    found = tuple(Found(-0.5, -serial, beam, "length") for serial in range(request.beams.count))
    return TokenOutput(
        request.id, None, len(tokens), finish_reason="length", prompt_tokens=len(request.prompt), found=found
    )


class Script:
    """A reply for `fake_service`: whatever is asked, the model says `text`."""

    text = ""

    def __call__(self, request: Request) -> list[int]:
        return [*ids(self.text), EOS]


def fake_service(
    tmp_path,
    limits: Limits | None = None,
    template: str | None = CHAT_TEMPLATE,
    name: str = "fake",
    front: Front | None = None,
    prices: Prices | None = None,
    **engine,
) -> Service:
    """A service over a fake engine. It must be bound to a loop before the first request."""
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    dispatcher = Dispatcher()
    facts = ModelFacts(name=name, vocab=VOCAB, max_len=MAX_LEN, defaults={}, eos_ids=(EOS,))
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    engine_ = FakeEngine(dispatcher.sink, **engine)
    codec = TextCodec.from_file(path)
    return load_service(
        facts, codec, template, special, engine_, dispatcher, limits or Limits(), front=front, prices=prices
    )


def fake(service: Service) -> FakeEngine:
    """The engine of a fake service."""
    assert isinstance(service.engine, FakeEngine)
    return service.engine


NAN, FAILS, BREAKS = 509, 510, 511  # tokens that poison their row, fail their step, break the engine


class FakeRows:
    """An executor whose rows are (sum of ids, tokens, last id, 1); `open` lets steps run."""

    def __init__(self, labels: int = 0, max_len: int = 64) -> None:
        self.limits = ExecutorLimits(32, 4, max_len, VOCAB, labels or 4)
        self.kv = KVSpec(group_bytes=64)
        self.open = threading.Event()
        self.open.set()
        self.batches: list[Batch] = []
        self.closed = False
        self._sums: dict[int, int] = {}

    def launch(self, batch: Batch) -> FakeRows:
        self.batches.append(batch)
        return self

    def result(self) -> StepResult:
        self.open.wait(20)
        rows = self.batches[-1].rows
        tokens = [token for row in rows for token in row.tokens]
        assert len(tokens) <= self.limits.max_tokens_per_step
        if BREAKS in tokens:
            raise ValueError("broken")
        if FAILS in tokens:
            raise StepError("device_error", "the step failed")
        given = np.zeros((0, self.limits.width), np.float32)
        for row in rows:
            before = self._sums[row.kv_base] if row.start else 0
            self._sums[row.kv_base] = total = before + sum(row.tokens)
            if row.sample:
                one = [np.nan if NAN in row.tokens else total, row.start + len(row.tokens), row.tokens[-1], 1]
                given = np.vstack([given, np.array(one[: self.limits.width], np.float32)])
        none = np.zeros(0, np.int32)
        return StepResult(none, none, none, none, given, seconds=0.25)

    def attach(self, slot: int, request: Request, generated: Sequence[int]) -> None: ...

    def detach(self, slot: int) -> None: ...

    def close(self) -> None:
        self.closed = True


def rows_service(
    tmp_path,
    labels: tuple[str, ...] = (),
    queue_limit: int = 4096,
    template: str = CHAT_TEMPLATE,
    name: str = "fake",
    front: Front | None = None,
) -> tuple[Service, FakeRows]:
    """A service over FakeRows; with `labels`, of a classifier."""
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    dispatcher, executor = Dispatcher(), FakeRows(len(labels))
    engine = RowEngine(Encoder(executor), dispatcher.sink, queue_limit)
    engine.start()
    task = "classify" if labels else "embed"
    facts = ModelFacts(name, VOCAB, 64, {}, task, executor.limits.width, labels)
    codec = TextCodec.from_file(path)
    return load_service(facts, codec, template, {}, engine, dispatcher, Limits(), front=front), executor


@contextmanager
def running(
    service: Service,
    keys: Keys | None = None,
    admin: Keys | None = None,
    origins: Sequence[str] = (),
    control: socket.socket | None = None,
    others: Sequence[Service] = (),
):
    """A real server on loopback in a thread, of a model or several; yields (base URL, server). control: listens for
    control routes."""
    listener = bind("127.0.0.1", 0)
    listening = threading.Event()
    access = Access(keys, admin, origins_of(origins), control and control.getsockname()[1])
    server = Server([service, *others], access)
    server.on_listening = listening.set
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener, *([control] if control else [])]}, daemon=True
    )
    thread.start()
    listening.wait(20)
    try:
        yield url(listener), server
    finally:
        service.front.draining = server.should_exit = True
        thread.join(20)
        listener.close()
        service.engine.stop()  # type: ignore[attr-defined]
        assert not thread.is_alive()


def wait_for(condition) -> None:
    """Waits for what other threads do; a test fails by its own assertion when it never happens."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()
