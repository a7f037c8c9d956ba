"""Every field that the official clients can send is honoured, which its effect shows (see effects), or refused by its
name; docs/api.md says which.

python -m tests.service.test_client_fields > docs/api.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec
import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from tokenizers.processors import TemplateProcessing

from tests.service.effects import EFFECTS, IDLE, INSIDE, SAY, START, TEMPLATE, Seen, reply
from tests.service.fakes import byte_tokenizer, fake_service, rows_service, running
from xllm.service.anthropic import Messages
from xllm.service.completions import Chat, Completions
from xllm.service.endpoint import Endpoint
from xllm.service.responses import Responses
from xllm.service.rows import Embeddings
from xllm.service.tokenizer import TextCodec

CLIENTS = f"the types of openai {version('openai')} and anthropic {version('anthropic')}"
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


class Route(NamedTuple):
    """`least` is a body that is taken; `type` is the client's own of all fields."""

    endpoint: type[Endpoint[Any]]
    type: Any
    least: dict[str, Any]


ROUTES = {
    "/v1/chat/completions": Route(Chat, chat_create_params.CompletionCreateParamsNonStreaming, {"messages": SAY}),
    "/v1/completions": Route(Completions, completion_create_params.CompletionCreateParamsNonStreaming, {"prompt": "a"}),
    "/v1/responses": Route(Responses, response_create_params.ResponseCreateParamsNonStreaming, {"input": "a"}),
    "/v1/messages": Route(
        Messages, message_create_params.MessageCreateParamsNonStreaming, {"messages": SAY, "max_tokens": 200}
    ),
    "/v1/embeddings": Route(Embeddings, embedding_create_params.EmbeddingCreateParams, {"input": "a"}),
}


def accepted(path: str) -> set[str]:
    body: Any = ROUTES[path].endpoint.body
    return {field.name for field in msgspec.structs.fields(body)}


def fields(path: str) -> dict[str, bool]:
    """The client's fields of a route, and whether they are honoured."""
    known = accepted(path)
    return {name: name in known for name in sorted(get_type_hints(ROUTES[path].type))}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Of a model that generates, and of one that embeds: (base URL, service). Their tokenizer adds <|start|>."""
    generates = fake_service(tmp_path_factory.mktemp("generates"), template=TEMPLATE, reply=reply)
    embeds, _ = rows_service(tmp_path_factory.mktemp("embeds"), template=TEMPLATE)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", START)])
    generates.codec = embeds.codec = TextCodec(tokenizer)
    with running(generates) as (base, _), running(embeds) as (other, _):
        yield {False: (base, generates), True: (other, embeds)}


def ask(servers: Any, path: str, body: dict[str, Any]) -> Seen:
    base, service = servers[path == "/v1/embeddings"]
    return Seen(base, service, ROUTES[path].endpoint, path, body)


def least(path: str, beside: Mapping[str, Any]) -> dict[str, Any]:
    """A body that is taken, with these fields; of an input and messages there is one."""
    body = {**ROUTES[path].least, **beside}
    return {name: value for name, value in body.items() if name != "input" or "messages" not in beside}


ALL = {path: EFFECTS[path] | INSIDE.get(path, {}) for path in ROUTES}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in ROUTES for name in sorted(ALL[path])])
def test_a_field_has_its_effect(servers, path, name):
    effect = ALL[path][name]
    value = effect.value(servers[False][0]) if callable(effect.value) else effect.value
    without = effect.look(ask(servers, path, least(path, effect.beside)))
    given = ask(servers, path, least(path, {**effect.beside, name.partition(".")[0]: value}))
    assert name == "model" or given.status == 200, given.raw.text
    found = effect.look(given)
    assert found != without, "it changes nothing"
    assert effect.then(found) if callable(effect.then) and not isinstance(effect.then, type) else found == effect.then


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in ROUTES for name in IDLE[path]])
def test_what_is_said_to_have_no_effect_has_none(servers, path, name):
    def shown(**fields: Any) -> tuple[Any, ...]:
        seen = ask(servers, path, least(path, fields))
        answer = {key: value for key, value in seen.answer.items() if key not in ("id", "created")}
        return answer, [(request.prompt, request.params, request.urgency) for request in seen.requests]

    assert shown() == shown(**{name: IDLE[path][name]})


def test_every_field_that_is_taken_is_in_one_of_the_tables():
    for path in ROUTES:
        assert sorted([*EFFECTS[path], *IDLE[path]]) == sorted(accepted(path))
    assert sum(map(len, IDLE.values())) <= 5, "what is taken for nothing stays rare"


REFUSED = [(path, name) for path in ROUTES for name, honoured in fields(path).items() if not honoured]


@pytest.mark.parametrize(("path", "name"), REFUSED)
def test_what_is_not_honoured_is_refused_by_its_name(servers, path, name):
    answer = ask(servers, path, ROUTES[path].least | {name: {"x": 1}})
    error = answer.answer["error"]
    assert answer.status == 400 and f"`{name}`" in error["message"], error
    assert path == "/v1/messages" or error["param"] == name


def written() -> str:
    """The document."""
    lines = [
        "# Fields of the API", "", f"Made by `python -m tests.service.test_client_fields > docs/api.md` from {CLIENTS}",
        "and the bodies that requests are parsed with; a test sends each field and sees what it changes in what the",
        "engine is asked for, or in the answer. Whatever is not in these tables is refused as unknown, by its name.",
        "Refused fields are taken with the values that ask for nothing (`null`, and those in brackets).",
        "`GET /openapi.json` has every route.", "",
        "Fields that are taken without any effect are named so. Inside of others it is these: `is_error` of a tool's",
        "result, and the descriptions and names of formats. `prompt_cache_key`, `safety_identifier` and `user` of",
        "responses are repeated in the answer, and no more. Beyond the clients', `eager_input_streaming` of messages'",
        "tools is taken beside `type` of the tools of chats and of responses ([calls](calls.md)).",
    ]  # fmt: skip
    for path, route in ROUTES.items():
        found = fields(path)
        own = sorted(accepted(path) - found.keys() - IDLE[path].keys())
        refused = [name + _harmless(route.endpoint.refused.get(name, ())) for name, yes in found.items() if not yes]
        lines += ["", f"## `{path}`", "", "| | fields |", "|---|---|"]
        lines.append(
            f"| honoured | {', '.join(name for name, yes in found.items() if yes and name not in IDLE[path])} |"
        )
        lines.append(f"| beyond the client's | {', '.join(own) or 'none'} |")
        if IDLE[path]:
            lines.append(f"| taken without effect | {', '.join(sorted(IDLE[path]))} |")
        lines.append(f"| refused by name | {', '.join(refused)} |")
    return "\n".join(lines) + "\n"


def _harmless(values: tuple[Any, ...]) -> str:
    shown = [msgspec.json.encode(value).decode() for value in values if value is not None]
    return f" ({', '.join(shown)})" if shown else ""


def test_the_document_says_so():
    text = DOCUMENT.read_text(encoding="utf-8")
    if CLIENTS not in text:
        pytest.skip("the document is of other versions of the clients")
    assert text == written()


if __name__ == "__main__":
    sys.stdout.write(written())
