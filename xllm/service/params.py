"""Decides what a request asks the engine for: ranges of every field, defaults of the model, prompts as token ids,
limits of the context. Pure; the result is a Job, or an ApiError 400 that names the field, the value and the range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xllm.runtime import RequestRefused, SamplingParams
from xllm.runtime.urgency import NAMES, ORDINARY, Urgency, urgency_of
from xllm.service.body import ChatBody, CompletionBody, Message, Sampling
from xllm.service.errors import ApiError, Hint, invalid
from xllm.service.forms import Form, form_of
from xllm.service.parsers.reading import NO_DIALECT, PLAIN, Dialect, Reading
from xllm.service.tools import call_schema, earlier_calls, offered

MAX_SEQUENCES = 128  # prompts x n of one HTTP request
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_STOP_IDS = 256
MAX_BIASES = 1024
# Logprobs held until an answer is sent whole: chosen tokens and alternatives, some hundred bytes each.
MAX_HELD_LOGPROBS = 1 << 20
INT64 = 2**63
# Text this much longer than the context in characters is first judged by its beginning, so that megabytes are not
# tokenised to be refused.
CHARS_PER_TOKEN = 8
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ModelFacts:
    """What validation needs to know. max_len: tokens of prompt and answer together. defaults: sampling fields of the
    model. task: "generate", "embed" or "classify"; with a task of rows, their width, the names of their columns, and
    how many kinds of segment the texts of a prompt may be of. eos_ids: tokens that end an answer."""

    name: str
    vocab: int
    max_len: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generate"
    width: int = 0
    labels: tuple[str, ...] = ()
    segments: int = 1
    eos_ids: tuple[int, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether the context must have room for an answer."""
        return self.task == "generate"


@dataclass(frozen=True)
class Job:
    """One validated HTTP request: prompts x n sequences, choice index = prompt index * n + sample index."""

    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]  # one per prompt: what is left of the context differs
    n: int
    stops: tuple[str, ...]
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    echo: tuple[str, ...] | None  # prompts as text, when they are to be repeated
    reading: Reading = PLAIN
    form: Form | None = None  # that each answer must have
    asked: Any = None  # what only the format of the answer knows
    urgency: Urgency = ORDINARY

    @property
    def logprobs(self) -> bool:
        """Whether they are asked for."""
        return self.params[0].logprobs is not None


Encode = Callable[[str, bool], list[int]]


def default_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults from generation_config.json; what it doesn't name falls to OpenAI's defaults (temperature 1).
    Raises ValueError for values no request could have."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: generation[name] for name in names if isinstance(generation.get(name), int | float)}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    if "top_k" in defaults:
        defaults["top_k"] = max(0, int(defaults["top_k"]))  # -1 turns it off as well
    try:
        SamplingParams(**defaults)
    except RequestRefused as error:
        raise ValueError(f"generation_config.json: {error.message}") from None
    return defaults


def completion_job(
    body: CompletionBody, facts: ModelFacts, encode: Encode, decode: Callable[[Sequence[int]], str]
) -> Job:
    """Plans POST /v1/completions."""
    prompts = listed(body.prompt, "prompt")
    n = _samples(body, len(prompts))
    if body.best_of is not None and body.best_of != n:
        raise invalid(
            "unsupported_parameter", f"best_of is {body.best_of}, only best_of = n ({n}) is supported", "best_of"
        )
    if body.echo and body.logprobs is not None:
        raise invalid(
            "unsupported_parameter", "echo and logprobs can't be combined: prompts have no logprobs", "logprobs"
        )
    within("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    special = body.add_special_tokens is not False
    ids = tuple(
        _ids(prompt, f"prompt[{at}]" if len(prompts) > 1 else "prompt", facts, encode, special)
        for at, prompt in enumerate(prompts)
    )
    echo = tuple(prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts) if body.echo else None
    return replace(_job(body, facts, ids, n, body.logprobs, echo), form=form_of(body))


def chat_job(
    body: ChatBody, facts: ModelFacts, encode: Encode, render: Callable[..., str], dialect: Dialect = NO_DIALECT
) -> Job:
    """Plans POST /v1/chat/completions. `render(messages, template arguments, tools=...)` makes the prompt text."""
    n = _samples(body, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("invalid_request", "top_logprobs needs logprobs: true", "top_logprobs")
    within("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    offer = offered(body, dialect)
    text = render(messages(body.messages), body.chat_template_kwargs or {}, tools=offer and offer.shown)
    one, call = body.parallel_tool_calls is False, None
    if offer and offer.forced:
        dialect, one = replace(dialect, tools="json"), one or offer.named
        call = Form("json", call_schema(offer.schemas, one), "tool_choice")
    reading, form = dialect.reading(text, offer and offer.schemas, one), form_of(body, call)
    if form and reading.inside and dialect.thoughts:
        form = form._replace(after=dialect.thoughts.close)
    # The template writes the special tokens itself: adding them again would double the first one.
    ids = _ids(text, "messages", facts, encode, body.add_special_tokens is True)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return replace(_job(body, facts, (ids,), n, logprobs), reading=reading, form=form)


def messages(given: list[Message]) -> list[dict[str, Any]]:
    """The messages as plain dictionaries for a template; text parts of one message are joined by line ends."""
    if not given:
        raise invalid("invalid_request", "messages is empty, at least one message is needed", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _message(message: Message, path: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise invalid(
            "invalid_request", f"{path}.role is {message.role[:64]!r}, allowed are {', '.join(ROLES)}", f"{path}.role"
        )
    if message.content is None and message.role != "assistant":
        raise invalid("invalid_request", f"{path}.content is missing", f"{path}.content")
    content = message.content or ""
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{path}.content[{index}]") for index, part in enumerate(content))
    result: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        if message.role != "assistant":
            raise invalid("invalid_request", f"{path}.tool_calls needs the role assistant", f"{path}.tool_calls")
        result["tool_calls"] = earlier_calls(message.tool_calls, f"{path}.tool_calls")
    optional = ("name", "reasoning_content", "tool_call_id")
    return result | {name: value for name in optional if (value := getattr(message, name)) is not None}


def _part(part: dict[str, Any], path: str) -> str:
    if part.get("type") != "text":
        raise invalid(
            "unsupported_content",
            f"{path} has type {str(part.get('type'))[:64]!r}, this model reads text only",
            f"{path}.type",
        )
    if extra := sorted(part.keys() - {"type", "text"}):
        raise invalid("unknown_parameter", f"unknown field `{path}.{extra[0][:64]}`", f"{path}.{extra[0][:64]}")
    if not isinstance(part.get("text"), str):
        raise invalid("invalid_type", f"{path}.text must be a string", f"{path}.text")
    return part["text"]


def listed(prompt: str | list[Any], name: str) -> list[str | list[int]]:
    """The prompts of a field that holds a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if kinds in ({str}, {list}):
        return prompt
    if not kinds:
        raise invalid("empty_prompt", f"{name} is empty", name)
    raise invalid(
        "invalid_type",
        f"{name} must be a text, a list of texts, a list of token ids or a list of lists of ids",
        name,
    )


def check_text(text: str, path: str, facts: ModelFacts, encode: Encode) -> None:
    """Refuses a text that is empty, or whose beginning alone is far too long."""
    if not text:
        raise invalid("empty_prompt", f"{path} is empty, at least one token is needed", path)
    limit = CHARS_PER_TOKEN * facts.max_len
    if len(text) > limit and (least := len(encode(text[:limit], True))) > facts.max_len + CHARS_PER_TOKEN:
        raise too_long(f"{path} has more than {least} tokens", facts, path)


def check_ids(ids: Sequence[int], path: str, facts: ModelFacts) -> tuple[int, ...]:
    """The ids of a prompt, which are some, of the vocabulary, and have room in the context."""
    if not ids:
        raise invalid("empty_prompt", f"{path} is empty, at least one token is needed", path)
    check_range(ids, path, facts.vocab * facts.segments)
    if len(ids) > facts.max_len - facts.generates:
        raise too_long(f"{path} has {len(ids)} tokens", facts, path)
    return tuple(ids)


def check_range(ids: Sequence[int], path: str, vocab: int) -> None:
    """Refuses the first id that is not in the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= vocab):
        at, token = next((at, token) for at, token in enumerate(ids) if not 0 <= token < vocab)
        text = f"{path}[{at}] is {_number(token)}, token ids are 0 to {vocab - 1}"
        raise invalid("token_out_of_range", text, f"{path}[{at}]")


def _ids(prompt: str | list[int], path: str, facts: ModelFacts, encode: Encode, special: bool) -> tuple[int, ...]:
    if isinstance(prompt, str):
        check_text(prompt, path, facts, encode)
        prompt = encode(prompt, special)
    return check_ids(prompt, path, facts)


def _job(
    body: Sampling,
    facts: ModelFacts,
    prompts: tuple[tuple[int, ...], ...],
    n: int,
    logprobs: int | None,
    echo: tuple[str, ...] | None = None,
) -> Job:
    if body.stream_options is not None and not body.stream:
        raise invalid("invalid_request", "stream_options needs stream: true", "stream_options")
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > MAX_STOPS:
        raise invalid("invalid_request", f"stop has {len(stops)} strings, at most {MAX_STOPS} are allowed", "stop")
    if any(not stop or len(stop) > MAX_STOP_CHARS for stop in stops):
        raise invalid("invalid_request", f"each stop string has 1 to {MAX_STOP_CHARS} characters", "stop")
    params = tuple(_params(body, facts, len(prompt), logprobs) for prompt in prompts)
    if logprobs is not None and not body.stream:
        _check_held(n * sum(each.max_tokens or 0 for each in params) * (logprobs + 1))
    return Job(
        prompts=prompts,
        params=params,
        n=n,
        stops=stops,
        skip_special_tokens=body.skip_special_tokens is not False,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        echo=echo,
        urgency=_urgency(body),
    )


def _urgency(body: Sampling) -> Urgency:
    try:
        return urgency_of({name: getattr(body, name) for name in NAMES})
    except RequestRefused as refusal:
        raise invalid("invalid_request", refusal.message, refusal.message.partition(" ")[0]) from None


def _check_held(logprobs: int) -> None:
    if logprobs > MAX_HELD_LOGPROBS:
        raise invalid(
            "invalid_request",
            f"the answer may hold {logprobs} logprobs (sequences x max_tokens x tokens listed), at most"
            f" {MAX_HELD_LOGPROBS} are kept for an answer sent whole: lower max_tokens, or set stream: true",
            "logprobs",
        )


def _params(body: Sampling, facts: ModelFacts, prompt_tokens: int, logprobs: int | None) -> SamplingParams:
    defaults = facts.defaults
    max_tokens = _max_tokens(body, facts, prompt_tokens)
    within("min_tokens", body.min_tokens, 0, max_tokens)
    within("seed", body.seed, -INT64, INT64 - 1)
    for name, low, high in (
        ("temperature", 0, 2),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("presence_penalty", -2, 2),
        ("frequency_penalty", -2, 2),
        ("repetition_penalty", 1e-3, 1e3),
        ("top_k", -INT64, INT64 - 1),
    ):
        within(name, getattr(body, name), low, high)
    top_k = body.top_k if body.top_k is not None else defaults.get("top_k", 0)
    stop_ids = body.stop_token_ids or []
    if len(stop_ids) > MAX_STOP_IDS:
        raise invalid(
            "invalid_request",
            f"stop_token_ids has {len(stop_ids)} ids, at most {MAX_STOP_IDS} are allowed",
            "stop_token_ids",
        )
    for at, token in enumerate(stop_ids):
        within(f"stop_token_ids[{at}]", token, 0, facts.vocab - 1)
    return SamplingParams(
        temperature=_or(body.temperature, defaults.get("temperature", 1.0)),
        top_k=min(max(top_k, 0), facts.vocab),
        top_p=_or(body.top_p, defaults.get("top_p", 1.0)),
        min_p=_or(body.min_p, defaults.get("min_p", 0.0)),
        seed=body.seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, defaults.get("repetition_penalty", 1.0)),
        logit_bias=_logit_bias(body.logit_bias or {}, facts.vocab),
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=() if body.ignore_eos else tuple(stop_ids),  # ignore_eos passes both, not stop strings
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def _max_tokens(body: Sampling, facts: ModelFacts, prompt_tokens: int) -> int:
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid(
            "invalid_request", "max_tokens and max_completion_tokens are both given and differ", "max_completion_tokens"
        )
    name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    wanted = getattr(body, name)
    left = facts.max_len - prompt_tokens
    if wanted is None:
        return left
    if wanted < 1:
        raise invalid("invalid_request", f"{name} is {_number(wanted)}, it must be at least 1", name)
    if wanted > left:
        raise too_long(f"the prompt has {prompt_tokens} tokens and {name} is {_number(wanted)}", facts, name)
    return wanted


def _logit_bias(given: Mapping[str, float], vocab: int) -> dict[int, float]:
    if len(given) > MAX_BIASES:
        raise invalid(
            "invalid_request", f"logit_bias has {len(given)} entries, at most {MAX_BIASES} are allowed", "logit_bias"
        )
    result = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab):
            raise invalid(
                "token_out_of_range",
                f"logit_bias has the key {key[:32]!r}, keys are token ids 0 to {vocab - 1}",
                "logit_bias",
            )
        within(f"logit_bias.{key}", bias, -100, 100)
        result[int(key)] = float(bias)
    return result


def _samples(body: Sampling, prompts: int) -> int:
    n = 1 if body.n is None else body.n
    within("n", n, 1, MAX_SEQUENCES)
    if prompts * n > MAX_SEQUENCES:
        raise invalid(
            "invalid_request",
            f"{prompts} prompts x n = {n} are {prompts * n} sequences, at most {MAX_SEQUENCES} are allowed",
            "n",
        )
    return n


def within(name: str, value: float | None, low: float, high: float) -> None:
    # Written so that NaN fails too.
    if value is not None and not low <= value <= high:
        raise invalid("invalid_request", f"{name} is {_number(value)}, allowed is {low} to {high}", name)


def _number(value: float) -> str:
    return str(value) if not isinstance(value, int) or abs(value) < INT64 else "an integer beyond 64 bits"


def _or(value: float | None, default: float) -> float:
    return float(default if value is None else value)


def too_long(what: str, facts: ModelFacts, param: str) -> ApiError:
    """400 `context_length_exceeded`."""
    if facts.generates:
        holds, fix = "tokens for prompt and answer together", "shorten the prompt or lower max_tokens"
        hint = Hint("prompt and answer share the context", "xllm compile --max-len", fix)
    else:
        holds = "tokens of one prompt"
        hint = Hint("a prompt is taken whole", "xllm compile --max-len", "shorten it, or set truncate_prompt_tokens")
    return ApiError(400, "context_length_exceeded", f"{what}, the context holds {facts.max_len} {holds}", param, hint)
