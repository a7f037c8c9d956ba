"""What is exported: a model over one flattened batch, and how its hidden states become the rows of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xllm.errors import CompileError
from xllm.frontend.hooks import Session, StepInputs, with_hidden
from xllm.frontend.layers import Stack
from xllm.frontend.lookups import accepts
from xllm.ir.program import Task


class Step(nn.Module):
    """(ids[T], positions[T], slots[T], last[S], kv, fixed) -> rows [S, N] of the task."""

    def __init__(self, model: nn.Module, session: Session, task: Task) -> None:
        super().__init__()
        self.model = model
        self.__dict__["_session"] = session
        self.__dict__["_task"] = task

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, last: Tensor, kv: Tensor, fixed: Tensor) -> Tensor:
        position_ids = positions.unsqueeze(0)
        inputs = StepInputs(positions, position_ids, slots, last, kv, fixed)
        session = self.__dict__["_session"]
        session.inputs = inputs
        ids = ids.unsqueeze(0)
        offered: dict[str, Any] = {"position_ids": position_ids, "use_cache": False}
        if session.segmented:  # others may read what they are offered by another table: GPT-2 by that of its words
            offered["token_type_ids"] = torch.zeros_like(ids)
        given = {name: value for name, value in offered.items() if accepts(self.model, name)}
        with _Picks():
            return _ROWS[self.__dict__["_task"].kind](
                self.model, self.__dict__["_task"], inputs, {"input_ids": ids, **given}
            )


class _Picks(TorchFunctionMode):
    """x[..., [-2], :] is a cut: torch makes a tensor of a list, on the device of x, where it has no value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(map(_cut, args[1])))
        return func(*args, **(kwargs or {}))


def _cut(index: Any) -> Any:
    one = index[0] if isinstance(index, list) and len(index) == 1 else None
    return slice(one, one + 1 or None) if type(one) is int else index


def _logits(model: nn.Module, task: Task, inputs: StepInputs, given: Mapping[str, Any]) -> Tensor:
    return model(**given).logits.select(0, 0)


def _embeddings(model: nn.Module, task: Task, inputs: StepInputs, given: Mapping[str, Any]) -> Tensor:
    rows = pooled(model(**given).last_hidden_state.select(0, 0), task.pooling, inputs)
    return torch.ops.xllm.l2_normalize(rows, 1e-12) if task.normalize else rows


def _scores(model: nn.Module, task: Task, inputs: StepInputs, given: Mapping[str, Any]) -> Tensor:
    if not is_scored(model):
        return model(**given).logits  # the head reads rows [S, 1, H], see `prepare`
    hidden = _base(model)(**given).last_hidden_state.select(0, 0)
    return model.score(pooled(hidden, task.pooling, inputs))  # pyright: ignore


_ROWS: Mapping[str, Callable[..., Tensor]] = {"generate": _logits, "embed": _embeddings, "classify": _scores}


def prepare(model: nn.Module, session: Session, task: Task, stack: Stack) -> None:
    """Hooks that cut hidden states to the wanted rows before a head computes on all of them.

    Raises CompileError for a model without a body below its head.
    """
    if task.kind == "generate":
        for body in _bodies(model, stack):
            body.register_forward_hook(session.keep_last_rows)
    elif task.kind == "classify" and not is_scored(model):
        owner = model.get_submodule(stack.path.rpartition(".")[0])

        def kept(hidden: Tensor) -> Tensor:
            assert session.inputs is not None
            return pooled(hidden.select(0, 0), task.pooling, session.inputs).unsqueeze(1)

        pooler = getattr(owner, "pooler", None)
        if isinstance(pooler, nn.Module):  # reads the first row of what it is given, beside the layers
            pooler.register_forward_pre_hook(lambda _, args: (kept(args[0]), *args[1:]))
        else:
            owner.register_forward_hook(lambda _, args, output: with_hidden(output, kept(output[0])))


def pooled(hidden: Tensor, pooling: str, inputs: StepInputs) -> Tensor:
    """Of hidden states [T, H], the row of each sequence: [S, H]."""
    if pooling == "last":
        return torch.ops.xllm.rows(hidden, inputs.last)
    row_of = torch.ops.xllm.first_rows if pooling == "cls" else torch.ops.xllm.mean_rows
    return row_of(hidden, inputs.positions, inputs.last)


def is_scored(model: nn.Module) -> bool:
    """Whether the head is one product over the last row of a sequence, as every decoder's is."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def _bodies(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The modules one of which hands hidden states to the head: the body, and the decoder in it that some heads call
    past the body.
    """
    base, decoder = _base(model), getattr(model, "get_decoder", lambda: None)()
    if not isinstance(decoder, nn.Module) or decoder is base or decoder is model:
        return [base]
    holds = any(layer in set(decoder.modules()) for layer in stack.layers[:1])
    return [decoder, base] if holds else [base]


def _base(model: nn.Module) -> nn.Module:
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module):
        raise CompileError(
            f"{type(model).__name__} has no decoder below its output head",
            code="unsupported-model",
            pass_name="capture",
            try_="a checkpoint whose architecture ends in ForCausalLM",
        )
    return base
