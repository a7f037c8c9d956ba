"""An artifact in this process, for Python: prompts in, completions out, whole or as they grow. Any number of calls from
threads and event loops share one engine; a call that is left takes its requests with it.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm import typed
from xllm.completion import Answer, Completion, bar, raise_failure
from xllm.control import Controlled, EngineControl
from xllm.llm import DISK_CACHE_BYTES, INSTEAD, open_encoder, open_engine, open_model
from xllm.memory import Ledger
from xllm.runtime.beams import BeamParams, Found
from xllm.runtime.encoding import Encoder
from xllm.runtime.engine import Engine
from xllm.runtime.errors import RequestRefused
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.runtime.urgency import ORDINARY, Urgency, take_urgency

if TYPE_CHECKING:
    from xllm.service.generation import Choice
    from xllm.service.grammar import Grammars
    from xllm.service.template import ChatTemplate

# A text, the ids of one, or one of {"prompt": text}, {"prompt_token_ids": ids} and {"messages": a chat}.
Prompt = str | Sequence[int] | Mapping[str, Any]
RETRY_SECONDS = 0.01  # until a full queue is tried again


class LLM(Controlled):
    """An artifact, a folder or a packed file. Use as a context manager, or call `close`; any thread may call.
    require_signature: public key file of who must have signed it. prefix_cache: prompts start on what earlier ones have
    in common with them, where the model allows it; the answers are the same. host_cache, disk_cache and
    disk_cache_size: as of `open_engine`, off unless given. scheduler, order: names of scheduling policies
    (docs/scheduling.md).

    All calls raise RequestRefused for what can never run, and for an artifact of another task.
    """

    def __init__(
        self,
        artifact: str | Path,
        *,
        memory_bytes: int | None = None,
        threads: int | None = None,
        prefix_cache: bool = True,
        host_cache: int = 0,
        disk_cache: str | Path | None = None,
        disk_cache_size: int = DISK_CACHE_BYTES,
        require_signature: str | Path | None = None,
        kernel_modules: Sequence[str] = (),
        scheduler: str = "chunked",
        order: str | None = None,
    ) -> None:
        from xllm.service.tokenizer import TextCodec

        self.artifact = open_model(artifact, require_signature)
        self.codec = TextCodec.from_artifact(self.artifact.tokenizer, self.artifact.path)
        self._routes: dict[str, Callable[[TokenOutput], None]] = {}  # by request
        self._ids = itertools.count()
        self._engine: Engine | None = None
        self._encoder: Encoder | None = None
        self.ledger: Ledger | None = None
        if self.artifact.task == "generate":
            self._engine, self.ledger = open_engine(
                self.artifact,
                self._deliver,
                memory_bytes=memory_bytes,
                threads=threads,
                prefix_cache=prefix_cache,
                host_cache=host_cache,
                disk_cache=disk_cache,
                disk_cache_size=disk_cache_size,
                kernel_modules=kernel_modules,
                scheduler=scheduler,
                order=order,
            )
            self._control = EngineControl(self._engine, self.artifact, require_signature)
        else:
            self._encoder, _ = open_encoder(self.artifact, memory_bytes, threads, kernel_modules)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        stop: str | Sequence[str] = (),
        structured_outputs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Completes each prompt; order is kept. `options` are fields of SamplingParams, beside the defaults of the
        model (`bad_words` as texts); or give `params` whole. With either go fields of Urgency: priority, offline,
        ttft_slo_ms, tpot_slo_ms. stop: texts before which an answer ends.
        structured_outputs: the form each answer must have, one of {"json": schema}, {"json_object": True}, {"regex":
        text}, {"choice": [text, ...]} and {"grammar": Lark's notation}. progress: show a bar on stderr; None does where
        that is a terminal.

        Raises RuntimeError when a request fails; the other prompts then end.
        """
        urgency = take_urgency(options)
        chosen = self._params(params, structured_outputs, options)
        requests = [self._request(prompt, chosen, urgency) for prompt in _listed(prompts)]
        answers = {request.id: Answer(self._choice(stop)) for request in requests}
        with bar(len(requests), progress) as advance, closing(self._outputs(requests)) as outputs:
            for output in outputs:
                answer = answers[output.request_id]
                if not answer.ended:
                    answer.push(output)
                    if answer.ended:
                        advance()
                        if output.finish_reason is None and self._engine is not None:  # a stop text
                            self._engine.cancel(output.request_id)
        return [answers[request.id].whole(request.prompt) for request in requests]

    def chat(
        self, messages: Sequence[Any], params: SamplingParams | None = None, *, template: Any = None, **options: Any
    ) -> list[Completion]:
        """The next message of a chat ({"role": ..., "content": ...} each), or of each of several, as `generate`.
        template: arguments of the model's chat template. The text is as the model wrote it, reasoning included."""
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [{"messages": chat, "template": template} for chat in chats]
        return self.generate(prompts, params, **options)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        beam_width: int,
        max_tokens: int,
        *,
        num_return_sequences: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: Any = False,
        structured_outputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[list[Completion]]:
        """The best answers to each prompt that a search with so many beams finds, the best first, with their `score`
        (see runtime.beams); as many as num_return_sequences, or as there are beams. `options` as in `generate`;
        temperature and what follows it have no effect."""
        beams = BeamParams(beam_width, num_return_sequences, length_penalty, early_stopping)
        urgency = take_urgency(options)
        params = self._params(None, structured_outputs, options | {"max_tokens": max_tokens})
        requests = [replace(self._request(prompt, params, urgency), beams=beams) for prompt in _listed(prompts)]
        ends = {}
        with closing(self._outputs(requests)) as outputs:
            for output in outputs:
                raise_failure(output)
                ends[output.request_id] = output.found
        return [[self._found(found, params.logprobs) for found in ends[request.id]] for request in requests]

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        stop: str | Sequence[str] = (),
        structured_outputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGenerator[Completion, None]:
        """`async for piece in llm.stream(prompt)`: what each step adds, as in `generate`. Leaving the loop ends the
        request."""
        urgency = take_urgency(options)
        request = self._request(prompt, self._params(params, structured_outputs, options), urgency)
        answer, loop = Answer(self._choice(stop)), asyncio.get_running_loop()
        inbox: asyncio.Queue[TokenOutput] = asyncio.Queue()

        def put(output: TokenOutput) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(inbox.put_nowait, output)

        with self._routed([request], put) as engine:
            while not _submitted(engine, request):
                await asyncio.sleep(RETRY_SECONDS)
            while not answer.ended:
                yield answer.push(await inbox.get())

    def embed(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, width]: the embedding of each text (or of its token ids), pooled and normalised as the
        checkpoint says."""
        items: Iterable[Any] = [texts] if isinstance(texts, str) else texts
        return self._rows("embed", items)

    def score(self, texts: str | Sequence[str | tuple[str, str]] | Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, labels]: the logits of each text, pair of texts or list of token ids; `labels` names them.

        Where the model tells the texts of a pair apart by segments, token t of the second is id vocab + t.
        """
        items: Iterable[Any] = [texts] if isinstance(texts, str) else texts
        return self._rows("classify", items)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the columns that `score` gives; empty for other tasks."""
        return tuple(self.artifact.manifest["task"].get("labels", ()))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.stop()
        if self._encoder is not None:
            self._encoder.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests -----------------------------------------------------------------------------------------------------

    def _params(
        self, given: SamplingParams | None, outputs: Mapping[str, Any] | None, options: dict[str, Any]
    ) -> SamplingParams:
        if given is not None and options:
            raise TypeError(f"give params or {', '.join(options)}, not both")
        from xllm.service.sampling import bad_words, default_sampling

        with _refusing():
            if words := options.get("bad_words"):
                options = options | {"bad_words": bad_words(words, self.codec.encode)}
            chosen = given or SamplingParams(**default_sampling(self.artifact.generation) | options)
            return chosen if outputs is None else replace(chosen, grammar=self._grammars.of(outputs))

    def _request(self, prompt: Prompt, params: SamplingParams, urgency: Urgency = ORDINARY) -> Request:
        name, now = f"llm-{next(self._ids)}", time.monotonic()
        return Request(name, self._prompt(prompt), params, arrival=now, urgency=urgency)

    def _prompt(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, Mapping):
            given = {name: value for name, value in prompt.items() if value is not None}
            template = given.pop("template", {})
            if len(given) != 1 or not given.keys() <= {"prompt", "prompt_token_ids", "messages"}:
                names = ", ".join(map(str, given)) or "nothing"
                text = f"a prompt holds {names}, it must be one of prompt, prompt_token_ids and messages"
                raise RequestRefused("invalid_parameter", text)
            [(name, value)] = given.items()
            if name == "messages":
                return tuple(self.codec.encode(self._chat(value, template), False))
            prompt = value
        return tuple(self.codec.encode(prompt, True) if isinstance(prompt, str) else prompt)  # pyright: ignore

    def _chat(self, chat: Sequence[Any], arguments: Mapping[str, Any]) -> str:
        import msgspec

        from xllm.service.body import Message
        from xllm.service.params import messages

        try:
            said = typed.convert(list(chat), list[Message])
        except msgspec.ValidationError as error:
            raise RequestRefused("invalid_parameter", f"messages: {error}") from None
        with _refusing():
            return self._template.render(messages(said), arguments)

    @cached_property
    def _template(self) -> ChatTemplate:
        from xllm.service.template import ChatTemplate

        if self.artifact.chat_template is None:
            raise RequestRefused("no_chat_template", f"{self.artifact.name} has no chat template: call generate")
        return ChatTemplate(self.artifact.chat_template, self.artifact.special_tokens)

    @cached_property
    def _grammars(self) -> Grammars:
        from xllm.service.grammar import Grammars

        model = self.artifact.manifest["model"]
        return Grammars(self.codec, model["vocab"], model["eos_ids"])

    def _choice(self, stop: str | Sequence[str]) -> Choice:
        from xllm.service.generation import Choice

        return Choice(self.codec, (stop,) if isinstance(stop, str) else tuple(stop), skip_special_tokens=True)

    @contextmanager
    def _routed(self, requests: Sequence[Request], put: Callable[[TokenOutput], None]) -> Iterator[Engine]:
        """`put` gets the outputs of the requests; those that still run at the end are given up."""
        if self._engine is None:
            raise self._wrong_task()
        self._routes |= dict.fromkeys((request.id for request in requests), put)
        try:
            yield self._engine
        finally:
            for request in requests:
                del self._routes[request.id]
                self._engine.cancel(request.id)

    def _outputs(self, requests: Sequence[Request]) -> Generator[TokenOutput, None, None]:
        """What comes of them, until all have ended."""
        inbox: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
        with self._routed(requests, inbox.put) as engine:
            waiting, left = deque(requests), len(requests)
            while left:
                while waiting and _submitted(engine, waiting[0]):
                    waiting.popleft()
                with suppress(queue.Empty):
                    output = inbox.get(timeout=RETRY_SECONDS if waiting else None)
                    left -= output.finish_reason is not None
                    yield output

    def _found(self, found: Found, logprobs: int | None) -> Completion:
        answer = Answer(self._choice(()))
        for output in found.outputs(logprobs):
            answer.push(output)
        return replace(answer.whole(), score=found.score)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """On the engine's thread."""
        for output in outputs:
            if put := self._routes.get(output.request_id):
                put(output)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, task: str, items: Iterable[Any]) -> np.ndarray:
        if self._encoder is None or self.artifact.task != task:
            raise self._wrong_task()
        return self._encoder.rows([self._tokens(item) for item in items])

    def _tokens(self, item: Any) -> Sequence[int]:
        """The ids of a text, with the special tokens its tokenizer adds; of a pair of texts; or ids as they are."""
        if isinstance(item, str):
            return self.codec.encode(item, True)
        if isinstance(item, tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            manifest = self.artifact.manifest
            return self.codec.encode_pair(*item, manifest["model"]["vocab"] if manifest["task"]["segments"] > 1 else 0)
        return item

    def _wrong_task(self) -> RequestRefused:
        return RequestRefused("wrong_task", f"{self.artifact.name} {INSTEAD[self.artifact.task]}")


def _listed(prompts: Any) -> list[Any]:
    """One prompt or several: a list of ids is one."""
    one = isinstance(prompts, str | Mapping) or (len(prompts) and isinstance(prompts[0], int | np.integer))
    return [prompts] if one else list(prompts)


@contextmanager
def _refusing() -> Iterator[None]:
    """What the service refuses, as calls in the process do."""
    from xllm.service.errors import ApiError

    try:
        yield
    except ApiError as error:
        raise RequestRefused(error.code, error.message) from None


def _submitted(engine: Engine, request: Request) -> bool:
    """False when the queue is full: the outputs of those in it come first."""
    try:
        engine.submit(request)
    except RequestRefused as refusal:
        if refusal.code != "queue_full":
            raise
        return False
    return True
