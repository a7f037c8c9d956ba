"""Decides what a well-formed request is: strict JSON (UTF-8, no duplicate keys, bounded depth and number of lists,
finite numbers, whole characters), then the fields and types of each route. Everything else is refused here, by the name
of the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from xllm import typed
from xllm.service.errors import ApiError, invalid

MAX_DEPTH = 64
MAX_CONTAINERS = 1 << 16  # lists and objects: three bytes of a body become a hundred of memory
# A string, also one that never ends. Possessive, so that nothing is tried twice.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: the schema is always kept to."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's field; exactly one is given. `grammar` is in Lark's notation."""

    json: dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields both routes share; None means "not given". Ranges are checked in params."""

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs_mode: str | None = None
    prompt_logprobs: int | None = None
    beam_width: int | None = None
    num_return_sequences: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    user: str | None = None
    priority: str | None = None  # these four are an Urgency
    offline: bool | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None


class CompletionBody(Sampling, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions. `prompt`: text, texts, ids, or lists of ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class Function(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """`eager_input_streaming`, a name of Anthropic's: arguments are sent as they are written, before they are known to
    be whole."""

    type: str
    function: Function
    eager_input_streaming: bool | None = None


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str  # a JSON object


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: CalledFunction
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]] | None = None  # parts are checked in params, to name what the model can't read
    name: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatBody(Sampling, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    thinking_token_budget: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class RowsBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that all routes of rows share. truncate_prompt_tokens: what a prompt has at most (its end is cut), -1 for
    what the context holds."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = None


class EmbeddingBody(RowsBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/embeddings. `input`: text, texts, ids, or lists of ids; or `messages` that the chat template makes one
    text of."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankBody(RowsBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/rerank."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None


class ScoreBody(RowsBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/score. One text_1 goes with every text_2; otherwise there are as many of both."""

    text_1: str | list[str]
    text_2: str | list[str]


class ClassifyBody(RowsBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/classify. `input` as in EmbeddingBody."""

    input: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None


class Selector(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    value: str


class SampleBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/sample. `selector` names the slots of the prompt; `logprobs` tokens are listed for each (5)."""

    model: str | None = None
    prompt: str
    selector: Selector
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    user: str | None = None


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: a text, or messages that the chat template makes one of."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


# Fields of the OpenAI API that are not supported, with the values that ask for nothing and are therefore honoured.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "chat_template": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),  # these four became structured_outputs
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "metadata": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "web_search_options": (None,),
}

NOT_SUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
}


class OfModel(Protocol):
    """A body that may name the model."""

    model: str | None


Body = TypeVar("Body", bound=OfModel)
Parsed = TypeVar("Parsed")


def parse(data: bytes, kind: type[Parsed], refused: Mapping[str, tuple[Any, ...]] = NOT_SUPPORTED) -> Parsed:
    """The typed body; `refused` are fields with the values that ask for nothing. Raises ApiError 400: `invalid_json`
    with the position, `unsupported_parameter`, `invalid_request` with the field."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise invalid("invalid_request", "the body must be a JSON object")
    _refuse(value, refused, "")
    if isinstance(messages := value.get("messages"), list):
        for index, message in enumerate(messages):
            if isinstance(message, dict):
                _refuse(message, NOT_SUPPORTED_IN_MESSAGE, f"messages[{index}].")
    try:
        return typed.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None


def parse_json(data: bytes) -> Any:
    """Strict JSON. Raises ApiError 400 `invalid_json`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise invalid("invalid_json", f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    if _brackets(data) > MAX_CONTAINERS and _brackets(STRING.sub(b"", data)) > MAX_CONTAINERS:
        raise invalid("invalid_json", f"the body has more than {MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise invalid("invalid_json", f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise invalid("invalid_json", f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # an integer of thousands of digits
        raise invalid("invalid_json", str(error)) from None
    _check_tree(value, surrogates="\\u" in text)
    return value


def _refuse(value: dict[str, Any], table: Mapping[str, tuple[Any, ...]], path: str) -> None:
    for name in sorted(table.keys() & value.keys()):
        if value.pop(name) not in table[name]:
            raise invalid("unsupported_parameter", f"`{path}{name}` is not supported by this server", path + name)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise invalid("invalid_json", f"the key {_quoted(twice)} appears twice in one object", _printable(twice))
    return result


def _brackets(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{")


class _Place(NamedTuple):
    """Where a value stands; written out only for a message."""

    parent: _Place | None
    key: str | int

    def __str__(self) -> str:
        before = str(self.parent) if self.parent else ""
        if isinstance(self.key, int):
            return f"{before}[{self.key}]"
        return f"{before}.{_printable(self.key)}" if before else _printable(self.key)


def _check_tree(root: Any, surrogates: bool) -> None:
    """What the parser lets pass: depth, NaN and infinity, halves of surrogate pairs. Iterative, as depth is what is
    checked."""
    stack: list[tuple[Any, _Place | None, int]] = [(root, None, 1)]
    while stack:
        value, place, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise invalid("invalid_json", f"the body is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            if surrogates and not all(map(_whole, value)):
                raise invalid("invalid_json", f"a key inside {place or 'the body'} holds half of a surrogate pair")
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        else:
            continue  # a body that is no object is refused as such
        for key, item in items:
            if isinstance(item, dict | list):
                stack.append((item, _Place(place, key), depth + 1))
            elif isinstance(item, float) and not math.isfinite(item):
                name = str(_Place(place, key))
                raise invalid("invalid_request", f"{name} is {item}, it must be a finite number", name)
            elif surrogates and isinstance(item, str) and not _whole(item):
                name = str(_Place(place, key))
                raise invalid("invalid_json", f"{name} holds half of a surrogate pair", name)


def _invalid_field(text: str) -> ApiError:
    what, _, path = text.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    if match := re.search(r"unknown field `(.*)`", what, re.DOTALL):
        name = f"{path}.{match[1]}" if path else match[1]
        return invalid("unknown_parameter", f"unknown field {_quoted(name)}", _printable(name))
    if match := re.search(r"missing required field `(.*)`", what):
        name = f"{path}.{match[1]}" if path else match[1]
        return invalid("missing_parameter", f"the field `{name}` is required", name)
    return invalid("invalid_type", f"{path}: {what}" if path else what, path or None)


def _whole(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _printable(text: str) -> str:
    """Names from the body go into messages and logs: short, without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:64])


def _quoted(text: str) -> str:
    return f"`{_printable(text)}`"
