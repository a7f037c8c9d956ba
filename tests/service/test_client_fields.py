"""Every field that the official clients can send is honoured or refused by its name; docs/api.md says which.

python -m tests.service.test_client_fields > docs/api.md
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import httpx
import msgspec
import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from xllm.service.anthropic import Messages
from xllm.service.completions import Chat, Completions
from xllm.service.endpoint import Endpoint
from xllm.service.responses import Responses
from xllm.service.rows import Embeddings

CLIENTS = f"the types of openai {version('openai')} and anthropic {version('anthropic')}"
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


class Route(NamedTuple):
    """`least` is a body that is taken; `type` is the client's own of all fields."""

    endpoint: type[Endpoint[Any]]
    type: Any
    least: dict[str, Any]


SAY = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
ROUTES = {
    "/v1/chat/completions": Route(Chat, chat_create_params.CompletionCreateParamsNonStreaming, {"messages": SAY}),
    "/v1/completions": Route(Completions, completion_create_params.CompletionCreateParamsNonStreaming, {"prompt": "a"}),
    "/v1/responses": Route(Responses, response_create_params.ResponseCreateParamsNonStreaming, {"input": "a"}),
    "/v1/messages": Route(
        Messages, message_create_params.MessageCreateParamsNonStreaming, {"messages": SAY, "max_tokens": 5}
    ),
    "/v1/embeddings": Route(Embeddings, embedding_create_params.EmbeddingCreateParams, {"input": "a"}),
}
# What shows that a field is honoured; fields of which the value alone is refused are named below.
SAMPLES: dict[str, Any] = {
    "best_of": 1, "cache_control": {"type": "ephemeral"}, "echo": True, "frequency_penalty": 0.5, "input": "b",
    "instructions": "c", "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 3, "max_output_tokens": 3,
    "max_tokens": 3, "messages": SAY, "metadata": {"user_id": "u"}, "model": "fake", "n": 2,
    "parallel_tool_calls": True, "presence_penalty": 0.5, "prompt": "b", "prompt_cache_key": "k", "reasoning": {},
    "safety_identifier": "s",
    "seed": 1, "stop": "x", "stop_sequences": ["x"], "store": False, "stream": False, "system": "s", "temperature": 0.5,
    "text": {"format": {"type": "text"}}, "thinking": {"type": "disabled"}, "tool_choice": "none", "tools": [],
    "top_k": 3, "top_p": 0.5, "user": "u",
}  # fmt: skip
SAMPLES_OF = {
    ("/v1/completions", "logprobs"): 2,
    ("/v1/messages", "tool_choice"): {"type": "none"},
    ("/v1/responses", "metadata"): {"a": "b"},
}
# Honoured with something else: what they need beside them, or a model that does it.
WITH: dict[str, dict[str, Any]] = {
    "top_logprobs": {"top_logprobs": 1, "logprobs": True},
    "stream_options": {"stream_options": {"include_usage": True}, "stream": True},
}
ELSEWHERE = {"previous_response_id", "response_format"}  # tests of their own have them


def accepted(path: str) -> set[str]:
    body: Any = ROUTES[path].endpoint.body
    return {field.name for field in msgspec.structs.fields(body)}


def fields(path: str) -> dict[str, bool]:
    """The client's fields of a route, and whether they are honoured."""
    known = accepted(path)
    return {name: name in known for name in sorted(get_type_hints(ROUTES[path].type))}


CASES = [(path, name, honoured) for path in ROUTES for name, honoured in fields(path).items()]


@pytest.mark.parametrize(("path", "name", "honoured"), CASES)
def test_a_field_is_honoured_or_refused_by_its_name(served, path, name, honoured):
    if path == "/v1/embeddings" or name in ELSEWHERE:
        pytest.skip("of another kind of model, or a test of its own")
    sample = SAMPLES_OF.get((path, name), SAMPLES.get(name))
    asked = WITH.get(name, {name: sample}) if honoured else {name: {"x": 1}}
    answer = httpx.post(f"{served[0]}{path}", json=ROUTES[path].least | asked)
    if honoured:
        assert answer.status_code == 200, answer.text
        return
    error = answer.json()["error"]
    assert answer.status_code == 400 and f"`{name}`" in error["message"], error
    assert path == "/v1/messages" or error["param"] == name


def written() -> str:
    """The document."""
    lines = [
        "# Fields of the API", "", f"Made by `python -m tests.service.test_client_fields > docs/api.md` from {CLIENTS}",
        "and the bodies that requests are parsed with; a test sends each field. Whatever is not in these tables is",
        "refused as unknown, by its name. Refused fields are taken with the values that ask for nothing (`null`, and",
        "those in brackets). `GET /openapi.json` has every route.", "",
        "Taken without any effect: `user`, `safety_identifier`, `prompt_cache_key` (prefixes are found without),",
        "`metadata` of messages (that of responses is repeated), `cache_control`, `thinking.budget_tokens` (the limit",
        "is `max_tokens`), `is_error` of a tool's result, and the descriptions and names of formats.",
    ]  # fmt: skip
    for path, route in ROUTES.items():
        found = fields(path)
        own = sorted(accepted(path) - found.keys())
        refused = [name + _harmless(route.endpoint.refused.get(name, ())) for name, yes in found.items() if not yes]
        lines += ["", f"## `{path}`", "", "| | fields |", "|---|---|"]
        lines.append(f"| honoured | {', '.join(name for name, yes in found.items() if yes)} |")
        lines.append(f"| beyond the client's | {', '.join(own) or 'none'} |")
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
