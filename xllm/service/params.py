"""Decides what a request asks the engine for: prompts as token ids, which have room in the context, and what answers
are made of; sampling has the ranges. Pure; the result is a Job, or an ApiError 400 that names the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xllm.runtime import RequestRefused, SamplingParams
from xllm.runtime.beams import BeamParams
from xllm.runtime.urgency import NAMES, ORDINARY, Urgency, urgency_of
from xllm.service.body import ChatBody, CompletionBody, Message, Sampling
from xllm.service.continued import continued
from xllm.service.errors import invalid
from xllm.service.forms import Form, form_of
from xllm.service.parsers.reading import NO_DIALECT, PLAIN, Dialect, Reading
from xllm.service.sampling import (
    INT64,
    Encode,
    ModelFacts,
    bad_words,
    beams_of,
    number,
    sampling_params,
    too_long,
    within,
)
from xllm.service.tools import call_schema, earlier_calls, offered

MAX_SEQUENCES = 128  # prompts x n of one HTTP request
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 256
# Logprobs held until an answer is sent whole: chosen tokens and alternatives, some hundred bytes each.
MAX_HELD_LOGPROBS = 1 << 20
# Text this much longer than the context in characters is first judged by its beginning, so that megabytes are not
# tokenised to be refused.
CHARS_PER_TOKEN = 8
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Job:
    """One validated HTTP request: prompts x best_of sequences, of which the n likeliest of each prompt are the choices:
    choice index = prompt index * n + its place among them, by order of samples where best_of is n."""

    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]  # one per prompt: what is left of the context differs
    n: int
    best_of: int
    beams: BeamParams | None  # best_of is their width then
    logprobs: bool  # whether they are asked for
    stops: tuple[str, ...]
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    echo: tuple[str, ...] | None  # prompts as text, when they are to be repeated
    reading: Reading = PLAIN
    form: Form | None = None  # that each answer must have
    budget: int | None = None  # tokens of reasoning
    cache_salt: str = ""  # requests of another one share no cached prefix
    asked: Any = None  # what only the format of the answer knows
    urgency: Urgency = ORDINARY


def completion_job(
    body: CompletionBody, facts: ModelFacts, encode: Encode, decode: Callable[[Sequence[int]], str]
) -> Job:
    """Plans POST /v1/completions."""
    prompts = listed(body.prompt, "prompt")
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
    return replace(_job(body, facts, ids, encode, body.logprobs, echo), form=form_of(body))


def chat_job(
    body: ChatBody, facts: ModelFacts, encode: Encode, render: Callable[..., str], dialect: Dialect = NO_DIALECT
) -> Job:
    """Plans POST /v1/chat/completions. `render(messages, template arguments, whether the
    answer is opened, tools=...)` makes the prompt text."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("invalid_request", "top_logprobs needs logprobs: true", "top_logprobs")
    within("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    within("thinking_token_budget", body.thinking_token_budget, 0, INT64 - 1)
    offer = offered(body, dialect)
    shown, goes_on = messages(body.messages), bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        text = "add_generation_prompt begins an answer, continue_final_message goes on with one: leave one out"
        raise invalid("invalid_request", text, "add_generation_prompt")

    def prompt(shown: list[dict[str, Any]]) -> str:
        opens = not goes_on and body.add_generation_prompt is not False
        return render(shown, body.chat_template_kwargs or {}, opens, tools=offer and offer.shown)

    text = continued(shown, prompt) if goes_on else prompt(shown)
    one, call = body.parallel_tool_calls is False, None
    if offer and offer.forced:
        text, dialect = dialect.before_call(text)
        one = one or offer.named
        call = Form("json", call_schema(offer.schemas, one), "tool_choice")
    begun = shown[-1]["content"] if goes_on else None
    offers = {"tools": offer.schemas, "eager": offer.eager} if offer else {}
    reading, form = dialect.reading(text, one_call=one, begun=begun, **offers), form_of(body, call)
    if form and goes_on:
        text = f"{form.param} gives the whole answer a form: it can't be combined with continue_final_message"
        raise invalid("invalid_request", text, form.param)
    budget = body.thinking_token_budget if reading.closing else None  # else there is nothing to bound
    if budget is not None and body.ignore_eos:
        raise invalid("invalid_request", "ignore_eos can't be combined with a budget of reasoning", "ignore_eos")
    if form and reading.inside and dialect.thoughts:
        form = form._replace(after=dialect.thoughts.close)
    # The template writes the special tokens itself: adding them again would double the first one.
    ids = _ids(text, "messages", facts, encode, body.add_special_tokens is True)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return replace(_job(body, facts, (ids,), encode, logprobs), reading=reading, form=form, budget=budget)


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
        text = f"{path}[{at}] is {number(token)}, token ids are 0 to {vocab - 1}"
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
    encode: Encode,
    logprobs: int | None,
    echo: tuple[str, ...] | None = None,
) -> Job:
    if body.stream_options is not None and not body.stream:
        raise invalid("invalid_request", "stream_options needs stream: true", "stream_options")
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > MAX_STOPS:
        raise invalid("invalid_request", f"stop has {len(stops)} strings, at most {MAX_STOPS} are allowed", "stop")
    if any(not stop or len(stop) > MAX_STOP_CHARS for stop in stops):
        raise invalid(
            "invalid_request", f"stop has a string that is empty or longer than {MAX_STOP_CHARS} characters", "stop"
        )
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= MAX_SALT_CHARS:
        raise invalid("invalid_request", f"cache_salt has 1 to {MAX_SALT_CHARS} characters", "cache_salt")
    beams = beams_of(body, bool(stops))
    n, best_of = _samples(body, len(prompts), beams)
    ranked = 0 if logprobs is None and best_of > n else logprobs  # what they are ranked by
    within("prompt_logprobs", body.prompt_logprobs, 0, MAX_LOGPROBS)
    words = bad_words(body.bad_words, encode)
    params = tuple(sampling_params(body, facts, len(prompt), ranked, words) for prompt in prompts)
    if body.prompt_logprobs is not None and (body.stream or beams):
        text = "prompt_logprobs are told in answers that are drawn and sent whole: leave stream and beam_width out"
        raise invalid("unsupported_parameter", text, "prompt_logprobs")
    held = sum(map(len, prompts)) * n * (body.prompt_logprobs + 1) if body.prompt_logprobs is not None else 0
    if logprobs is not None and not body.stream:
        held += best_of * sum(each.max_tokens or 0 for each in params) * (logprobs + 1)
    if held > MAX_HELD_LOGPROBS:
        text = (
            f"the answer may hold {held} logprobs (sequences x tokens x tokens listed), at most {MAX_HELD_LOGPROBS} are"
            " kept for an answer sent whole: lower max_tokens, or set stream: true"
        )
        raise invalid("invalid_request", text, "logprobs" if logprobs is not None else "prompt_logprobs")
    return Job(
        prompts=prompts,
        params=params,
        n=n,
        best_of=best_of,
        beams=beams,
        logprobs=logprobs is not None,
        stops=stops,
        skip_special_tokens=body.skip_special_tokens is not False,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        echo=echo,
        cache_salt=body.cache_salt or "",
        urgency=_urgency(body),
    )


def _urgency(body: Sampling) -> Urgency:
    try:
        return urgency_of({name: getattr(body, name) for name in NAMES})
    except RequestRefused as refusal:
        raise invalid("invalid_request", refusal.message, refusal.message.partition(" ")[0]) from None


def _samples(body: Sampling, prompts: int, beams: BeamParams | None) -> tuple[int, int]:
    """Choices of a prompt, and the sequences that run for them."""
    if beams is not None:
        if prompts * beams.width > MAX_SEQUENCES:
            text = f"{prompts} prompts x beam_width = {beams.width} are more than {MAX_SEQUENCES} sequences"
            raise invalid("invalid_request", text, "beam_width")
        return beams.count, beams.width
    n = 1 if body.n is None else body.n
    within("n", n, 1, MAX_SEQUENCES)
    best_of = n if body.best_of is None else body.best_of
    within("best_of", best_of, n, MAX_SEQUENCES)
    if body.stream and best_of != n:
        text = f"best_of is {best_of} and n is {n}: a stream can't choose among them, it needs best_of = n"
        raise invalid("invalid_request", text, "best_of")
    if prompts * best_of > MAX_SEQUENCES:
        name = "n" if best_of == n else "best_of"
        text = f"{prompts} prompts x {name} = {best_of} are {prompts * best_of} sequences, at most {MAX_SEQUENCES}"
        raise invalid("invalid_request", f"{text} are allowed", name)
    return n, best_of
