"""Experts: what a module of them computes, asked of the module itself, and its weights in one layout for all.

transformers' experts interface says how the weights lie (transposed, gate and up concatenated or interleaved); these
become weight rules. What the gate computes is found by probing it with numbers: no family is known by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from xllm.errors import CompileError
from xllm.frontend.exported import Place
from xllm.ir.dialect.experts import expert_act
from xllm.ir.program import Weight
from xllm.ir.weight_rules import Concat, Either, Permute, Slice, WeightRule

_PROBES = 64  # columns of the gate's test input


@dataclass(frozen=True)
class Form:
    """What stands between the two products of an expert: the last arguments of `xllm::experts`, and whether gate and
    up alternate in the module's own weight.
    """

    act: str
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    interleaved: bool = False


def is_experts(module: nn.Module) -> bool:
    """Whether a module goes through transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def lift_experts(model: nn.Module, place: Place, tensors: dict[str, tuple[str, Weight]]) -> dict[nn.Module, Form]:
    """Gives every module of experts the parameters gate, up and down, [E, I, W], [E, I, W] and [E, W, I] (and biases),
    with their rules in `tensors`; the form of each.
    """
    forms: dict[nn.Module, Form] = {}
    for path, module in list(model.named_modules()):
        if is_experts(module):
            forms[module] = _form(module, path)
            _lift(module, path, forms[module], place, tensors)
    return forms


def experts(forms: Mapping[nn.Module, Form]) -> Callable[..., Tensor]:
    """The function registered with the interface: one `xllm::experts` for each call."""

    def forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        form = forms[module]
        held = [getattr(module, f"{name}{suffix}", None) for name in ("gate", "up", "down") for suffix in ("", "_bias")]
        rest = (form.act, form.alpha, form.limit, form.shift)
        return torch.ops.xllm.experts(hidden_states, top_k_index, top_k_weights, *held, *rest)

    return forward


def _form(module: Any, path: str) -> Form:
    """The form whose numbers are the module's. Raises CompileError where none is."""
    if getattr(module, "has_post_expert_norm", False):
        raise _unsupported(module, path, "a norm behind each expert")
    held = [value for value in vars(module).values() if type(value) in (int, float) and math.isfinite(value)]
    noise = torch.randn(32 + len(held), 2 * _PROBES, generator=torch.Generator().manual_seed(0), device="cpu")
    beyond = noise[32:].sign() * 2 * torch.tensor(held, dtype=torch.float32, device="cpu")[:, None]
    probe = torch.cat([noise[:32] * 6, beyond])  # both sides of every number that could be a clamp's
    with torch.device("cpu"):
        try:
            got = module._apply_gate(probe) if module.has_gate else module.act_fn(probe)
        except Exception as error:
            raise _unsupported(module, path, f"an activation that cannot be tried ({type(error).__name__})") from error
    numbers = {float(value) for value in vars(module).values() if type(value) is float}
    for form in _candidates(module.has_gate, sorted(numbers)):
        gate, up = (probe, None) if not module.has_gate else _halves(probe, form.interleaved)
        want = expert_act(gate, up, form.act, form.alpha, form.limit, form.shift)
        if want.shape == got.shape and torch.allclose(got, want, rtol=1e-5, atol=1e-6):
            return form
    raise _unsupported(module, path, "an activation that is none of the dialect's")


def _candidates(gated: bool, numbers: list[float]) -> list[Form]:
    plain = [Form(act, interleaved=way) for way in (False, True) for act in ("silu", "gelu", "gelu_tanh", "relu")]
    if not gated:
        return plain[:4]
    clamped = [
        Form("silu", alpha, limit, shift, way)
        for alpha, limit, shift, way in product((1.0, *numbers), (0.0, *numbers), (0.0, 1.0), (False, True))
    ]
    return [*plain, *clamped]


def _halves(value: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (value[..., ::2], value[..., 1::2]) if interleaved else value.chunk(2, dim=-1)  # pyright: ignore


def _lift(module: Any, path: str, form: Form, place: Place, tensors: dict[str, tuple[str, Weight]]) -> None:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for suffix in ("", "_bias") if module.has_bias else ("",):
        for name in (first, "down_proj"):
            _, weight = tensors[f"{path}.{name}{suffix}"]
            delattr(module, f"{name}{suffix}")
            if module.is_transposed and not suffix:
                experts, rows, columns = weight.shape
                weight = Weight((experts, columns, rows), Permute(weight.rule, (0, 2, 1)))
            if name == "gate_up_proj":
                for part, target in enumerate(("gate", "up")):
                    _adopt(module, path, target + suffix, _half(weight, part, form.interleaved), place, tensors)
            else:
                _adopt(module, path, name.removesuffix("_proj") + suffix, weight, place, tensors)


def _adopt(
    module: nn.Module, path: str, name: str, weight: Weight, place: Place, tensors: dict[str, tuple[str, Weight]]
) -> None:
    setattr(module, name, nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False))
    tensors[f"{path}.{name}"] = (place.renumber(f"{path}.{name}"), weight)


def _half(weight: Weight, part: int, interleaved: bool) -> Weight:
    """Gate (part 0) or up (part 1) of a weight that holds both along its second axis."""
    experts, both, *rest = weight.shape
    count = both // 2
    return Weight((experts, count, *rest), _half_rule(weight.rule, part, count, interleaved))


def _half_rule(rule: WeightRule, part: int, count: int, interleaved: bool) -> WeightRule:
    match rule:
        case Either(options):
            return Either(tuple(_half_rule(option, part, count, interleaved) for option in options))
        case Concat((_, _) as parts, 1) if not interleaved:  # one tensor for each, joined by transformers' loading
            return parts[part]
    if interleaved:
        return Slice(rule, 1, part, 2 * count, 2)
    return Slice(rule, 1, part * count, (part + 1) * count)


def _unsupported(module: nn.Module, path: str, what: str) -> CompileError:
    return CompileError(
        f"{type(module).__name__} has {what}, which the experts operator cannot express",
        code="unsupported-experts",
        pass_name="capture",
        where=path,
        node="experts",
        try_="a model whose experts are gated (or plain) two-layer networks without a norm behind them",
    )
