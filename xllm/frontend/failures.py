"""What went wrong inside a capture, said in the model's terms: the module, the statement, and what to try."""

from __future__ import annotations

import linecache
from types import TracebackType

from torch import nn

from xllm.errors import CompileError
from xllm.frontend.hooks import HOOK

_ADVICE = {
    "shape-guard": "a model whose layers treat every number of tokens alike (recurrent and chunked layers do not)",
    "data-dependent": "a model whose shapes and branches do not depend on token values",
    "capture-failed": "a decoder-only model whose attention goes through transformers' attention interface",
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
    return CompileError(
        f"{type(model).__name__} cannot be traced as one step over flattened tokens: {type(error).__name__}: {reason}",
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
    """Path and class of the last module on the stack, and the statement of its forward that failed."""
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
            statement = linecache.getline(frame.f_code.co_filename, trace.tb_lineno).strip() or statement
        trace = trace.tb_next
    return where, statement
