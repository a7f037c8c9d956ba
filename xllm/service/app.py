"""Decides which routes exist. The gate stands before all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from xllm import __version__
from xllm.service.answer import Generate, Limits, Service
from xllm.service.dispatch import Dispatcher, Engine
from xllm.service.errors import ApiError, draining, from_output, invalid
from xllm.service.gate import App, Gate, Keys, Receive, Scope, Send, send_json
from xllm.service.metrics import Recorder
from xllm.service.params import ModelFacts
from xllm.service.parsers.reading import Dialect, choose
from xllm.service.relevance import Classify, Rerank, Score
from xllm.service.rows import Embeddings
from xllm.service.tokenizer import TextCodec
from xllm.service.tokens import Detokenize, Tokenize

if TYPE_CHECKING:
    from xllm.service.grammar import Grammars
    from xllm.service.template import ChatTemplate


def load_service(
    facts: ModelFacts,
    codec: TextCodec,
    chat_template: str | None,
    special_tokens: Mapping[str, str],
    engine: Engine,
    dispatcher: Dispatcher,
    limits: Limits,
    dialect: Dialect | None = None,
) -> Service:
    """Everything the routes share. The chat template is compiled by its first use; `dialect` is what it shows, or
    what else its answers are read as."""

    @cache
    def template() -> ChatTemplate:
        if chat_template is None:
            raise invalid("no_chat_template", "this model has no chat template; use /v1/completions")
        from xllm.service.template import ChatTemplate

        try:
            return ChatTemplate(chat_template, special_tokens)
        except ValueError as error:
            raise invalid("template_error", str(error)) from None

    @cache
    def grammars() -> Grammars:
        from xllm.service.grammar import Grammars

        return Grammars(codec, facts.vocab, facts.eos_ids)

    return Service(
        facts=facts,
        codec=codec,
        chat_template=template,
        grammars=grammars,
        engine=engine,
        dispatcher=dispatcher,
        recorder=Recorder(facts.name),
        limits=limits,
        dialect=dialect or choose(chat_template),
    )


def build_app(service: Service, keys: Keys | None = None) -> App:
    """The ASGI application. `keys` None lets everyone in."""
    model = {
        "id": service.facts.name,
        "object": "model",
        "created": service.created,
        "owned_by": "xllm",
        "max_model_len": service.facts.max_len,
    }

    class Json:
        """A route that answers with a value made per request."""

        def __init__(self, make: Callable[[Scope], object]) -> None:
            self._make = make

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send_json(send, 200, self._make(scope))

    def healthy(scope: Scope) -> dict[str, str]:
        """Alive and able to answer: what fails here needs a restart."""
        if refusal := service.engine.stats().refusal:
            raise from_output(refusal)
        return {"status": "ok"}

    def ready(scope: Scope) -> dict[str, str]:
        if service.draining:
            raise draining()
        return healthy(scope) | {"status": "ready"}

    def one_model(scope: Scope) -> dict[str, object]:
        name = scope["path_params"]["name"]
        if name != service.facts.name:
            raise ApiError(404, "model_not_found", f"this model is not served here; it serves {service.facts.name}")
        return model

    async def metrics(request: Request) -> Response:
        text = service.recorder.expose(service.engine.stats())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        Route("/health", Json(healthy), methods=["GET"]),
        Route("/livez", Json(healthy), methods=["GET"]),
        Route("/ready", Json(ready), methods=["GET"]),
        Route("/readyz", Json(ready), methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/version", Json(lambda scope: {"version": __version__}), methods=["GET"]),
        Route("/v1/models", Json(lambda scope: {"object": "list", "data": [model]}), methods=["GET"]),
        Route("/v1/models/{name:path}", Json(one_model), methods=["GET"]),
        Route("/v1/completions", Generate(service, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Generate(service, chat=True), methods=["POST"]),
        Route("/v1/embeddings", Embeddings(service), methods=["POST"]),
        *(Route(path, Rerank(service), methods=["POST"]) for path in ("/v1/rerank", "/v2/rerank", "/rerank")),
        *(Route(path, Score(service), methods=["POST"]) for path in ("/v1/score", "/score")),
        *(Route(path, Classify(service), methods=["POST"]) for path in ("/v1/classify", "/classify")),
        Route("/tokenize", Tokenize(service), methods=["POST"]),
        Route("/detokenize", Detokenize(service), methods=["POST"]),
    ]
    return Gate(Router(routes, redirect_slashes=False), keys, service.recorder)
