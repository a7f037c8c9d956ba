"""Decides which routes exist. The gate stands before all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from xllm import __version__
from xllm.runtime.pricing import Prices
from xllm.service import profiling
from xllm.service.anthropic import CountTokens, Messages
from xllm.service.backlog import Backlog
from xllm.service.completions import Chat, Completions
from xllm.service.control import ABORT, ORDERS, Abort, sleeping
from xllm.service.dispatch import Dispatcher, Engine
from xllm.service.endpoint import Endpoint, Limits, Service, addressed, by_name
from xllm.service.errors import ApiError, Hint, draining, from_engine, from_output, invalid
from xllm.service.exposition import expose
from xllm.service.gate import EVERYBODY, PAGE, Access, App, Gate, Receive, Scope, Send, send_data, send_json
from xllm.service.metrics import Front, Recorder
from xllm.service.page import STATE, send_page, state
from xllm.service.parsers.reading import Dialect, choose
from xllm.service.relevance import Classify, Rerank, Score
from xllm.service.responses import PATH as RESPONSES
from xllm.service.responses import Responses, Store, StoredResponses
from xllm.service.rows import Embeddings
from xllm.service.sampling import ModelFacts
from xllm.service.slots import Sample
from xllm.service.tokenizer import TextCodec
from xllm.service.tokens import Detokenize, Tokenize

if TYPE_CHECKING:
    from xllm.service.batches import Batches
    from xllm.service.grammar import Grammars
    from xllm.service.template import ChatTemplate

MODELS = "/v1/models"


def load_service(
    facts: ModelFacts,
    codec: TextCodec,
    chat_template: str | None,
    special_tokens: Mapping[str, str],
    engine: Engine,
    dispatcher: Dispatcher,
    limits: Limits,
    dialect: Dialect | None = None,
    batches: Batches | None = None,
    front: Front | None = None,
    prices: Prices | None = None,
) -> Service:
    """Everything the routes share of one model. The chat template is compiled by its first use; `dialect` is what it
    shows, or what else its answers are read as; `batches` are what is kept on disk, `front` is what it shares with
    other models, whose steps take turns with these; `prices` say what requests take (see Backlog)."""

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

    front = front or Front()
    dispatcher.backlog = Backlog(limits.max_wait, prices, front.backlogs)
    front.backlogs.append(dispatcher.backlog)
    front.names.append(facts.name)
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
        batches=batches,
        front=front,
    )


def build_app(services: Sequence[Service], access: Access = EVERYBODY) -> App:
    """The ASGI application of models that share their front."""
    front = services[0].front

    def model(service: Service) -> dict[str, object]:
        body: dict[str, object] = {
            "id": service.facts.name,
            "object": "model",
            "created": service.created,
            "owned_by": "xllm",
            "max_model_len": service.facts.max_len,
        }
        return body | ({"weights": service.controls.weights} if service.controls is not None else {})

    class Json:
        """A route that answers with a value made per request."""

        def __init__(self, make: Callable[[Scope], object]) -> None:
            self._make = make

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send_json(send, 200, self._make(scope))

    def healthy(scope: Scope) -> dict[str, str]:
        """Alive and able to answer, all of them: what fails here needs a restart."""
        for service in addressed(services, scope):
            if refusal := service.engine.stats().refusal:
                raise from_output(refusal)
        return {"status": "ok"}

    def ready(scope: Scope) -> dict[str, str]:
        if front.draining:
            raise draining()
        for service in addressed(services, scope):
            if sleeping(service)["is_sleeping"]:
                raise from_engine("asleep", "the engine sleeps")
        return healthy(scope) | {"status": "ready"}

    def one_model(scope: Scope) -> dict[str, object]:
        for service in services:
            if scope["path"] == f"{MODELS}/{service.facts.name}":
                return model(service)
        served = ", ".join(front.names)
        raise ApiError(404, "model_not_found", f"this model is not served here; it serves {served}")

    def asleep(scope: Scope) -> object:
        return by_name({service.facts.name: sleeping(service) for service in addressed(services, scope)})

    def route(make: Callable[[Service], Endpoint[Any]]) -> Endpoint[Any]:
        """The endpoints of a route, one for each model: the first takes requests for all."""
        endpoints = [make(service) for service in services]
        for endpoint in endpoints:
            endpoint.among = endpoints
        return endpoints[0]

    async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
        text = expose(front, [(one.recorder, one.engine.stats(), one.dispatcher.backlog) for one in services])
        await send_data(send, 200, text, b"text/plain; version=0.0.4; charset=utf-8")

    alive: dict[str, App] = {
        "/health": Json(healthy),
        "/livez": Json(healthy),
        "/ready": Json(ready),
        "/readyz": Json(ready),
        "/metrics": metrics,
        "/version": Json(lambda scope: {"version": __version__}),
    }
    told: dict[str, App] = {"/is_sleeping": Json(asleep)}
    orders: dict[str, App] = {**{path: route(order) for path, order in ORDERS.items()}, **profiling.routes(services)}
    read: dict[str, App] = {
        **alive,
        MODELS: Json(lambda scope: {"object": "list", "data": [*map(model, services)]}),
        f"{MODELS}/": Json(one_model),
        STATE: Json(lambda scope: state(addressed(services, scope))),
        **dict.fromkeys(PAGE, send_page),
    }
    store = Store()
    asked: dict[str, App] = {
        "/v1/completions": route(Completions),
        "/v1/chat/completions": route(Chat),
        RESPONSES: route(lambda service: Responses(service, store)),
        "/v1/messages": route(Messages),
        "/v1/messages/count_tokens": route(CountTokens),
        "/v1/embeddings": route(Embeddings),
        **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), route(Rerank)),
        **dict.fromkeys(("/v1/score", "/score"), route(Score)),
        **dict.fromkeys(("/v1/classify", "/classify"), route(Classify)),
        "/v1/sample": route(Sample),
        "/tokenize": route(Tokenize),
        "/detokenize": route(Detokenize),
        ABORT: route(Abort),
    }
    if access.control_port is None:
        read, asked = read | told, asked | orders
    kept: dict[str, App] = {f"{RESPONSES}/": StoredResponses(store)}

    stored = _stored(services[0], asked)

    def openapi(scope: Scope) -> object:
        from xllm.service.openapi import document  # few ask for it

        makes = {path: handlers["POST"] for path, handlers in stored.items() if "POST" in handlers}
        return document(asked | makes, read, access.keys is not None)

    read["/openapi.json"] = Json(openapi)
    gate = Gate(Routes(read, asked, kept, stored), front, access)
    if access.control_port is None:
        return gate
    control = Routes(alive | told, orders | {ABORT: asked[ABORT]})
    return ByPort(gate, access.control_port, Gate(control, front, access, control=True))


def _stored(service: Service, asked: Mapping[str, App]) -> dict[str, Mapping[str, App]]:
    """The routes of what is kept on disk, by path and method; without a folder they say so."""
    if service.batches is None:
        paths = (path for name in ("files", "batches") for path in (f"/v1/{name}", f"/v1/{name}/"))
        return {path: dict.fromkeys(("GET", "POST", "DELETE"), _no_folder) for path in paths}
    from xllm.service import batches, files

    service.batches.bind(service, asked)
    create = batches.Create(service, service.batches)
    kept = files.routes(service, service.batches.files, service.batches.in_use)
    return kept | batches.routes(service.batches, create)


async def _no_folder(scope: Scope, receive: Receive, send: Send) -> None:
    hint = Hint("the server was started without one", "xllm serve --state-dir", "start it with a folder for them")
    raise ApiError(404, "no_state_dir", "files and batches are kept in a folder, and this server has none", hint=hint)


class ByPort:
    """What comes by the control port is for one application, all else for the other."""

    def __init__(self, main: App, control_port: int, control: App) -> None:
        self._main, self._port, self._control = main, control_port, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The port of the connection's own end, which no client can choose: never that of a header.
        app = self._control if scope["server"][1] == self._port else self._main
        await app(scope, receive, send)


class ByMethod:
    """A path with a handler for each method."""

    def __init__(self, handlers: Mapping[str, App]) -> None:
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handlers[scope["method"]](scope, receive, send)


class Routes:
    """Paths that are read (GET, HEAD), those that are asked (POST), what is kept (read, or deleted), and what is
    stored, by method. One with a slash at its end has all below it.

    A table is all it takes: a framework's router costs every start a thirtieth of a second of imports.
    """

    def __init__(
        self,
        read: Mapping[str, App],
        asked: Mapping[str, App],
        kept: Mapping[str, App] | None = None,
        stored: Mapping[str, Mapping[str, App]] | None = None,
    ) -> None:
        self.table = {path: (handler, ("GET", "HEAD")) for path, handler in read.items()}
        self.table |= {path: (handler, ("POST",)) for path, handler in asked.items()}
        self.table |= {path: (handler, ("GET", "DELETE")) for path, handler in (kept or {}).items()}
        self.table |= {path: (ByMethod(handlers), tuple(handlers)) for path, handlers in (stored or {}).items()}
        self._below = tuple(path for path in self.table if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        found = next(filter(path.startswith, self._below), path)
        if found not in self.table:
            raise ApiError(404, "unknown_route", "there is no such route")
        handler, methods = self.table[found]
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise ApiError(405, "method_not_allowed", f"this route takes {allowed}", headers={"allow": allowed})
        await handler(scope, receive, send)
