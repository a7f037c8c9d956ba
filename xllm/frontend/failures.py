"""What went wrong inside a capture, said in the model's terms: the module, the statement, and what to try."""

from __future__ import annotations

import linecache
import textwrap
from types import TracebackType

from torch import nn

from xllm.errors import CompileError
from xllm.frontend.hooks import HOOK

_ADVICE = {
    "shape-guard": "a model whose layers treat every number of tokens alike (recurrent and chunked layers do not)",
    "data-dependent": "a model whose shapes and branches do not depend on token values",
    "capture-failed": "a decoder-only model whose attention goes through transformers' attention interface",
    "unsupported-attention": "a model that hands its mask to transformers' attention interface as it is",
}
_SIGNS = (
    ("data-dependent", ("datadependent", "data-dependent", "unbackedsym", "could not guard")),
    ("shape-guard", ("constraint", "guard", "specializ", "symbolic", "symint", "dynamic shape")),
)


def explain(error: Exception, model: nn.Module) -> CompileError:
    """The CompileError for an exception raised while `model` was being traced; refusals of our own pass unchanged."""
    if isinstance(error, CompileError):
        return error
    where, statement = _innermost(error.__traceback__, model)
    if isinstance(error, KeyError) and f"`{HOOK}`" in str(error):  # of a table like the interface, but another
        return no_interface(type(model).__name__, where)
    said = f"{type(error).__name__} {error}".lower()
    code = next((code for code, signs in _SIGNS if any(sign in said for sign in signs)), "capture-failed")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    why = f"cannot be traced as one step over flattened tokens: {type(error).__name__}: {reason}"
    # A plain mask is none, or one of ours that is no tensor: a model that computes with it fails on either.
    if "mask" in statement and ("'NoneType'" in reason or "'Mask'" in reason):
        code, why = "unsupported-attention", "computes with its attention mask, which is no tensor here"
    return CompileError(
        f"{type(model).__name__} {why}",
        code=code,
        pass_name="capture",
        where=where,
        node=statement,
        try_=_ADVICE[code],
    )


def no_interface(who: str, where: str) -> CompileError:
    """Refusal of a model that does not look attention up where ours is registered."""
    return CompileError(
        f"{who} chooses attention from a table of its own, not transformers' attention interface",
        code="no-attention-interface",
        pass_name="capture",
        where=where,
        try_="an architecture whose transformers class uses ALL_ATTENTION_FUNCTIONS",
    )


def _innermost(trace: TracebackType | None, model: nn.Module) -> tuple[str, str]:
    """Path and class of the last module on the stack, and the expression of its forward that failed."""
    paths = {id(module): path for path, module in model.named_modules()}
    where = type(model).__name__
    statement = ""
    inside = False
    while trace is not None:
        frame = trace.tb_frame
        module = frame.f_locals.get("self")
        package = str(frame.f_globals.get("__name__", ""))
        if isinstance(module, nn.Module) and paths.get(id(module)):
            where = f"{paths[id(module)]} ({type(module).__name__})"
            inside = True
        if inside and package.startswith("transformers."):
            statement = _expression(trace) or statement
        trace = trace.tb_next
    return where, statement


def _expression(trace: TracebackType) -> str:
    """The source of what a frame was evaluating, on one line; empty where it is not known."""
    code = trace.tb_frame.f_code
    places = list(code.co_positions())[: trace.tb_lasti // 2 + 1]
    found = _source(code.co_filename, places[-1])
    if found.isidentifier():  # a method: of what was evaluated before it
        before = next((place for place in reversed(places) if place != places[-1]), places[-1])
        found = f"{_source(code.co_filename, before)}.{found}"
    return textwrap.shorten(found, 100, placeholder=" …")


def _source(file: str, place: tuple[int | None, ...]) -> str:
    first, last, begin, end = place
    if first is None or last is None:
        return ""
    lines = [linecache.getline(file, number).encode() for number in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    return b" ".join(lines).decode()
