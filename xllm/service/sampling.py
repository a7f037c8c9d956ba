"""Decides what a request asks the sampler for: ranges of fields, defaults of the model, limits of the context. Pure;
raises ApiError 400 that names the field, the value and the range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from xllm.runtime import RequestRefused, SamplingParams
from xllm.runtime.beams import BeamParams
from xllm.service.body import Sampling
from xllm.service.errors import ApiError, Hint, invalid

MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_ALLOWED_IDS = 1 << 14
INT64 = 2**63
Encode = Callable[[str, bool], list[int]]


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


def sampling_params(
    body: Sampling, facts: ModelFacts, prompt_tokens: int, logprobs: int | None, bad_words: tuple[tuple[int, ...], ...]
) -> SamplingParams:
    """What is asked for of one prompt; it has `prompt_tokens` tokens, which are less than the context holds."""
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
    mode = body.logprobs_mode or "raw"
    if mode not in ("raw", "processed"):
        raise invalid("invalid_request", f"logprobs_mode is {mode[:64]!r}, allowed are raw, processed", "logprobs_mode")
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
        logprobs_mode=cast(Literal["raw", "processed"], mode),
        bad_words=bad_words,
        allowed_token_ids=_allowed(body.allowed_token_ids, facts.vocab),
        prompt_logprobs=body.prompt_logprobs,
    )


def beams_of(body: Sampling, stops: bool) -> BeamParams | None:
    """The beam search that is asked for. What only a draw or a stream has is refused beside it."""
    given = (body.num_return_sequences, body.length_penalty, body.early_stopping)
    names = ("num_return_sequences", "length_penalty", "early_stopping")
    if body.beam_width is None:
        for name, value in zip(names, given, strict=True):
            if value is not None:
                raise invalid("invalid_request", f"{name} needs beam_width", name)
        return None
    asked = {
        "n": body.n not in (None, 1),
        "best_of": body.best_of not in (None, 1),
        "temperature": bool(body.temperature),
        "top_p": body.top_p not in (None, 1),
        "top_k": (body.top_k or 0) > 0,
        "min_p": bool(body.min_p),
        "stop": stops,
        "stream": bool(body.stream),
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise invalid("unsupported_parameter", f"{name} can't be combined with beam_width", name)
    stopping: Any = body.early_stopping or False
    try:
        return BeamParams(body.beam_width, body.num_return_sequences, _or(body.length_penalty, 1.0), stopping)
    except RequestRefused as error:
        raise invalid("invalid_request", error.message, error.message.partition(" ")[0]) from None


def bad_words(given: Sequence[str] | None, encode: Encode) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, as a text may begin with it and as it follows a space."""
    words = given or []
    if len(words) > MAX_BAD_WORDS:
        text = f"bad_words has {len(words)} words, at most {MAX_BAD_WORDS} are allowed"
        raise invalid("invalid_request", text, "bad_words")
    found: dict[tuple[int, ...], None] = {}
    for at, word in enumerate(words):
        if not word.strip() or len(word) > MAX_BAD_WORD_CHARS:
            text = f"bad_words[{at}] must have 1 to {MAX_BAD_WORD_CHARS} characters, and not be blank"
            raise invalid("invalid_request", text, f"bad_words[{at}]")
        forms = (word, f" {word}") if not word[0].isspace() else (word,)
        found |= dict.fromkeys(tuple(encode(form, False)) for form in forms)
    found.pop((), None)
    return tuple(found)


def _allowed(given: Sequence[int] | None, vocab: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not 0 < len(given) <= MAX_ALLOWED_IDS:
        text = f"allowed_token_ids has {len(given)} ids, allowed are 1 to {MAX_ALLOWED_IDS}"
        raise invalid("invalid_request", text, "allowed_token_ids")
    for at, token in enumerate(given):
        within(f"allowed_token_ids[{at}]", token, 0, vocab - 1)
    return tuple(dict.fromkeys(given))


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
        raise invalid("invalid_request", f"{name} is {number(wanted)}, it must be at least 1", name)
    if wanted > left:
        raise too_long(f"the prompt has {prompt_tokens} tokens and {name} is {number(wanted)}", facts, name)
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


def within(name: str, value: float | None, low: float, high: float) -> None:
    """Refuses what is out of range by its name."""
    # Written so that NaN fails too.
    if value is not None and not low <= value <= high:
        raise invalid("invalid_request", f"{name} is {number(value)}, allowed is {low} to {high}", name)


def number(value: float) -> str:
    """For a message."""
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
