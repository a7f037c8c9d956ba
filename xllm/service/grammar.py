"""Decides which tokens may come next in an answer of a given form, compiled by llguidance within limits. A grammar that
nobody knows yet is first compiled in a process of its own (see trial)."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from xllm import typed
from xllm.runtime.request import Grammar, Matcher
from xllm.service import trial
from xllm.service.body import StructuredOutputs
from xllm.service.errors import ApiError, invalid
from xllm.service.forms import Form, of_outputs
from xllm.service.tokenizer import TextCodec

MAX_SOURCE_BYTES = 64 << 10
MAX_CACHED = 64
MAX_CACHED_BYTES = 64 << 20
# What a compiled grammar takes, by its source: its rules and lexer, and the states and masks that its first use made.
BYTES_PER_SOURCE_BYTE, BYTES_OF_ANY = 75, 144 << 10
TRIAL_SECONDS = 20.0  # of waiting; what counts is the processor time in trial
# White space as pretty-printed text has it: without an end, a model that gets lost in it fills its answer.
JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\r?\n[ \t]{0,20})", "lenient": False}


class Grammars:
    """Compiles forms for one model; from any thread. The vocabulary is read by the first use: seconds for the largest.
    The grammars used last stay."""

    def __init__(self, codec: TextCodec, vocab: int, eos_ids: Sequence[int]) -> None:
        self._codec, self._vocab, self._eos_ids = codec, vocab, list(eos_ids)
        self._lock = threading.Lock()
        self._made: OrderedDict[str, Compiled] = OrderedDict()
        self._trial = Trial()

    def of(self, outputs: Mapping[str, Any]) -> Grammar:
        """As `compile`, of the value of a structured_outputs field. Raises ApiError 400."""
        try:
            form = of_outputs(typed.convert(outputs, StructuredOutputs))
        except msgspec.ValidationError as error:
            raise invalid("invalid_type", f"structured_outputs: {error}", "structured_outputs") from None
        assert form is not None
        return self.compile(form)

    def compile(self, form: Form) -> Grammar:
        """Raises ApiError 400 with the reason why the form is refused."""
        made = self._compile(form)
        return After(made, form.after, self._codec, self._vocab) if form.after else made

    def _compile(self, form: Form) -> Grammar:
        if not self._eos_ids:
            text = "the model names no end token (eos_token_id): an answer of a given form could not end"
            raise invalid("unsupported_parameter", text, form.param)
        try:
            source = _source(form)
        except ValueError as error:
            raise _rejected(form, str(error)) from None
        with self._lock:
            if source in self._made:
                self._made.move_to_end(source)
                return self._made[source]
        if reason := self._trial.refusal(source):
            raise _rejected(form, reason)
        with self._lock:
            table = self._table
        try:
            made = Compiled(trial.compiled(table, source))
        except ValueError as error:
            raise _rejected(form, str(error)) from None
        with self._lock:
            self._made[source] = made
            while len(self._made) > MAX_CACHED or self.cached_bytes > MAX_CACHED_BYTES:
                self._made.popitem(last=False)
        return made

    @property
    def cached_bytes(self) -> int:
        """What the grammars that are kept take, estimated by the length of their sources."""
        return sum(BYTES_OF_ANY + BYTES_PER_SOURCE_BYTE * len(source) for source in self._made)

    @cached_property
    def _table(self) -> Any:
        import llguidance

        codec = self._codec

        class Vocabulary:
            eos_token_id, bos_token_id = self._eos_ids[0], None
            tokens, special_token_ids = codec.vocabulary(self._vocab), codec.special_ids

            def __call__(self, text: str) -> list[int]:
                return codec.encode(text, False)

        wrapped = llguidance.TokenizerWrapper(Vocabulary())
        return llguidance.LLTokenizer(wrapped, n_vocab=self._vocab, eos_token=self._eos_ids)


class Compiled(Grammar):
    """A grammar of the runtime: `matcher` stays at the beginning."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Position:
        return Position(self._matcher.deep_copy())


class Position:
    """A matcher of the runtime."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def take(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self._matcher.is_stopped():  # complete: what a step too many drew is dropped
                break
            self._matcher.consume_token(token)
        self._check()

    def fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())


class After(Grammar):
    """A grammar of what follows a text; until that is written, anything goes."""

    def __init__(self, grammar: Grammar, text: str, codec: TextCodec, vocab: int) -> None:
        self._grammar, self._text, self._codec = grammar, text, codec
        self._free = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)

    def start(self) -> Later:
        return Later(self._grammar.start(), self._text, self._codec, self._free)


class Later:
    """A matcher that waits for a text."""

    def __init__(self, matcher: Matcher, text: str, codec: TextCodec, free: np.ndarray) -> None:
        self._matcher, self._text, self._codec, self._free = matcher, text, codec, free
        self._last: deque[int] | None = deque(maxlen=2 * len(text.encode()))  # None once the text has come

    def take(self, tokens: Sequence[int]) -> None:
        for at, token in enumerate(tokens):
            if self._last is None:
                return self._matcher.take(tokens[at:])
            self._last.append(token)
            if self._text in self._codec.decode(list(self._last), skip_special_tokens=False):
                self._last = None
        return None

    def fill(self, mask: np.ndarray) -> None:
        if self._last is None:
            self._matcher.fill(mask)
        else:
            mask[:] = self._free


class Trial:
    """The process that compiles a grammar first, started by the first one and again after it ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def refusal(self, grammar: str) -> str:
        """Why the grammar is refused; "" if it is not."""
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    # -P: this folder's names must not hide the standard library's.
                    [sys.executable, "-P", str(Path(trial.__file__))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                process.stdin.flush()
                if select.select([process.stdout], [], [], TRIAL_SECONDS)[0] and (line := process.stdout.readline()):
                    return json.loads(line)
            except BrokenPipeError:
                pass
            self._process = None
            process.kill()
            with process:
                pass
        seconds, size = trial.CPU_SECONDS, trial.MEMORY_BYTES >> 20
        return f"compiling it takes more than {seconds} s or {size} MiB, or its rules nest too deep"


def _source(form: Form) -> str:
    """The form as a grammar of llguidance. Raises ValueError."""
    from llguidance import LLMatcher

    if form.kind == "choice":
        source = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form.source)
    else:
        source = form.source if isinstance(form.source, str) else json.dumps(form.source, ensure_ascii=False)
    size = len(source.encode())
    if size > MAX_SOURCE_BYTES:
        raise ValueError(f"it has {size} bytes, at most {MAX_SOURCE_BYTES} are allowed")
    if form.kind == "json":
        return LLMatcher.grammar_from_json_schema(source, overrides=JSON_OPTIONS)
    return LLMatcher.grammar_from_regex(source) if form.kind == "regex" else LLMatcher.grammar_from_lark(source)


def _rejected(form: Form, reason: str) -> ApiError:
    """The reason may quote what was sent: short, on one line."""
    return invalid("grammar_rejected", f"{form.param} is refused: {' '.join(reason.split())[:500]}", form.param)
