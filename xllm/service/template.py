"""Decides what a chat looks like as text: a Jinja template in an immutable sandbox, with the conventions of
transformers. A budget of steps, time and characters is charged by the template's own code, so that a loop that prints
nothing ends too."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

from xllm.service.errors import ApiError, invalid

MAX_STEPS = 500_000  # loop turns, calls and filters of one rendering
MAX_SECONDS = 0.8
MAX_CHARS = 8 << 20  # of any one string, so also of the output
MAX_NUMBER = 100_000  # repetitions, widths, range lengths
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
# Filters that turn a number into memory and that no chat template needs.
REMOVED_FILTERS = ("batch", "slice", "center", "wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "random")
LARGE_WIDTH = re.compile(r"\d{5,}|\*")


class OverBudget(Exception):
    """A rendering used up its steps, time or characters."""


class _Budget:
    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.thread_time() + MAX_SECONDS  # its own work: a busy machine refuses nobody

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise OverBudget(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self.deadline:
            raise OverBudget(f"it takes longer than {MAX_SECONDS} s")


_budget: ContextVar[_Budget] = ContextVar("budget")


class ChatTemplate:
    """A compiled chat template. Raises ValueError when the source is not a template. `render` may run in any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._knows_developer = "developer" in source
        self._knows_tools = "tools" in source
        try:
            source.encode()  # no tokenizer takes half of a surrogate pair
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, UnicodeEncodeError, SyntaxError) as error:
            raise ValueError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        arguments: Mapping[str, Any],
        open_answer: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt; with `open_answer`, up to where the answer begins.

        Raises ApiError 400 `unsupported_parameter` for tools that the template would not mention, `template_error` when
        it refuses, fails, or uses up its budget.
        """
        for name in arguments:
            if name in RESERVED:
                raise invalid(
                    "invalid_request", f"chat_template_kwargs can't set {name}", f"chat_template_kwargs.{name}"
                )
        if tools and not self._knows_tools:
            raise invalid("unsupported_parameter", "the chat template does not tell the model about tools", "tools")
        if any("tool_calls" in message for message in messages) and self._takes_text:
            messages = [_with_text(message) for message in messages]
        return self._render(messages, arguments, open_answer, tools)

    @cached_property
    def _takes_text(self) -> bool:
        """Whether calls of earlier turns have their arguments as a text, because the template joins them to others.
        Most write an object as JSON, and some look into it."""
        function = {"name": "f", "arguments": {"a": "b"}}
        calls = [{"id": "123456789", "type": "function", "function": function}]
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        messages = [{"role": "user", "content": "a"}, answer]
        try:
            if str(function["arguments"]) not in self._render(messages, {}, False, None):
                return False
        except ApiError:
            pass
        try:
            self._render([_with_text(message) for message in messages], {}, False, None)
        except ApiError:
            return False
        return True

    def _render(
        self,
        messages: list[dict[str, Any]],
        arguments: Mapping[str, Any],
        open_answer: bool,
        tools: list[dict[str, Any]] | None,
    ) -> str:
        if not self._knows_developer:
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        token = _budget.set(_Budget())
        try:
            variables = {"tools": tools, "documents": None, **self._special_tokens, **arguments}
            variables |= {"messages": messages, "add_generation_prompt": open_answer}
            text = self._join(self._template.generate(**variables))
            text.encode()  # an escape in the template can still make half of a surrogate pair
            return text
        except ApiError:
            raise
        except Exception as error:  # whatever the template's code can raise is the template's or its input's fault
            raise invalid("template_error", f"the chat template failed: {_sentence(error)}", "messages") from None
        finally:
            _budget.reset(token)

    def _join(self, pieces: Iterator[str]) -> str:
        result, size = [], 0
        for piece in pieces:
            size += len(piece)
            _check_size(size)
            result.append(piece)
        return "".join(result)


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """The arguments of calls as JSON texts."""
    if "tool_calls" not in message:
        return message
    texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in message["tool_calls"]]
    calls = [
        call | {"function": call["function"] | {"arguments": text}}
        for call, text in zip(message["tool_calls"], texts, strict=True)
    ]
    return message | {"tool_calls": calls}


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        for name in REMOVED_FILTERS:
            del self.filters[name]
        self.filters = {name: _metered(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _tojson, "__loop__": _loop, "__text__": _text}
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": _Namespace,
            "cycler": jinja2.utils.Cycler,
            "joiner": jinja2.utils.Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts the meter into the template: around what a loop runs over and around `~`, which the sandbox lets
        pass."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "__loop__", [], [], None, None, lineno=loop.lineno)
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [
                nodes.Filter(part, "__text__", [], [], None, None, lineno=concat.lineno) for part in concat.nodes
            ]
        tree.set_environment(self)
        return tree

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        if isinstance(function, jinja2.runtime.LoopContext):  # the next level of a recursive loop
            args = tuple(_loop(arg) for arg in args)
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            _check_text_call(owner, name, args, kwargs)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif operator == "**":
            if not (_small(left, MAX_NUMBER) and _small(right, 64)):
                raise OverBudget("it computes too large a power")
        elif operator == "%":
            _check_format(left)
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it only groups."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that reach into Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named parameter: `namespace(self=...)` is valid
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


def _metered(function: Any) -> Any:
    """A filter that is charged, with numbers and texts of bounded size. Jinja's marks for context passing are kept."""

    def filter_(*args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and function.__name__ in ("do_indent", "do_truncate") and not _small(value, 1000):
                raise OverBudget("it asks for too large a width")
        if function.__name__ == "do_replace" and len(args) >= 4:
            _check_text_call(str(args[1]), "replace", tuple(map(str, args[2:4])), {})
        elif function.__name__ == "do_format" and args:
            _check_format(args[0])
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        elif isinstance(result, Iterator):
            return _loop(result)
        return result

    for mark in ("jinja_pass_arg", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(filter_, mark, getattr(function, mark))
    return filter_


def _loop(items: Iterable[Any]) -> Iterable[Any]:
    """The same items, each charged. What has a length keeps it: `loop.length` and `loop.last` need it."""
    if isinstance(items, list | tuple | dict | str | range):
        return _Items(items)
    return _charged(items)


class _Items:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _charged(self._items)


def _charged(items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in items:
        budget.step()
        yield item


def _text(value: Any) -> Any:
    """A part of a `~`: each one is bounded, so strings that double in a loop end soon."""
    _budget.get().step()
    if isinstance(value, str):
        _check_size(2 * len(value))
    return value


def _range(*args: int) -> range:
    result = range(*args)
    if len(result) > MAX_NUMBER:
        raise OverBudget(f"it asks for a range of more than {MAX_NUMBER} numbers")
    return result


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    _budget.get().step()
    if (isinstance(indent, int) and not _small(indent, 100)) or (isinstance(indent, str) and len(indent) > 100):
        raise OverBudget("it asks for too large an indent")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _check_size(len(text))
    return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    _check_format(layout)
    return datetime.now().strftime(layout)


def _check_text_call(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(value, int) and not _small(value, MAX_NUMBER) for value in (*args, *kwargs.values())):
        raise OverBudget("it asks for too large a width")
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_size(len(text) + (text.count(args[0]) if args[0] else len(text) + 1) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(len(text) * len(args[0]))
    elif name == "expandtabs":
        _check_size(len(text) + text.count("\t") * (args[0] if args and isinstance(args[0], int) else 8))
    elif name == "translate":
        raise OverBudget("it uses str.translate")


def _check_format(layout: Any) -> None:
    if isinstance(layout, str) and LARGE_WIDTH.search(layout):
        raise OverBudget("it asks for too large a width")


def _check_repeat(value: Any, times: Any) -> None:
    if isinstance(value, str | list | tuple) and isinstance(times, int):
        _check_size(len(value) * max(times, 0))


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise OverBudget(f"it makes more than {MAX_CHARS} characters")


def _small(value: Any, limit: int) -> bool:
    return isinstance(value, int | float) and abs(value) <= limit


def _sentence(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself too deeply"
    return (str(error) or type(error).__name__)[:500]
