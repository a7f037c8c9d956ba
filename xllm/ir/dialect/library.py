"""How an operator joins the dialect: one schema, one torch body, one shape function, registered together.

The shape function is also the operator's contract: it refuses arguments that do not fit, and the verifier finds them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "xllm"
_library = torch.library.Library(NAMESPACE, "DEF")
_operators: dict[str, torch._ops.OpOverload] = {}


def operator(schema: str, shape: Callable[..., object]) -> Callable[[Callable[..., object]], torch._ops.OpOverload]:
    """Decorator: registers the body under `schema`; `shape` computes the result on fake tensors."""

    def register(body: Callable[..., object]) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0]
        _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=_library)
        _operators[name] = getattr(torch.ops.xllm, name).default
        return _operators[name]

    return register


def operators() -> dict[str, torch._ops.OpOverload]:
    """Every operator of the dialect by name, in definition order."""
    return dict(_operators)


def require(what: str, found: object, wanted: object) -> None:
    """Raises ValueError unless two sizes, or tuples of them, are equal (of symbols, this is a guard of the capture)."""
    if found != wanted:
        raise ValueError(f"{what} is {found}, expected {wanted}")
