"""Mixtures of experts: the experts alone, and router, choice and experts as one.

E experts of inner width I work on rows of width W. Gate and up are [E, I, W], down is [E, W, I], biases [E, I] and
[E, W]; without a gate the activation works on up alone.
"""

import torch
from torch import Tensor

from xllm.ir.dialect.activation import ACTIVATIONS
from xllm.ir.dialect.library import operator, require

EXPERT_ACTS = {**ACTIVATIONS, "relu": torch.relu}
SCORINGS = ("softmax", "sigmoid", "logits")
GROUP_SCORES = ("max", "sum2")


def expert_act(gate: Tensor, up: Tensor | None, act: str, alpha: float, limit: float, shift: float) -> Tensor:
    """act(alpha * gate) / alpha * (up + shift), of gate clamped from above and up on both sides by `limit` (0: not).

    With silu and alpha this is gate * sigmoid(alpha * gate). Without up: act(gate).
    """
    if up is None:
        return EXPERT_ACTS[act](gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return EXPERT_ACTS[act](alpha * gate) / alpha * (up + shift)


def _require_experts(
    x: Tensor, gate: Tensor | None, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, act: str, alpha: float,
) -> None:  # fmt: skip
    require("rank of the experts' rows", x.dim(), 2)
    experts, inner, width = up.shape
    require("width of the experts", width, x.shape[1])
    require("down", tuple(down.shape), (experts, width, inner))
    if gate is not None:
        require("gate", tuple(gate.shape), (experts, inner, width))
    for name, bias, size in (("gate", gate_bias, inner), ("up", up_bias, inner), ("down", down_bias, width)):
        if bias is not None:
            require(f"bias of {name}", tuple(bias.shape), (experts, size))
    if act not in EXPERT_ACTS or not alpha > 0 or (gate is None and gate_bias is not None):
        raise ValueError(f"{act} of {alpha} is no activation of experts: one of {', '.join(EXPERT_ACTS)}")


_EXPERTS = "Tensor? gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias"


def _experts_shape(
    x: Tensor, index: Tensor, weights: Tensor, gate: Tensor | None, gate_bias: Tensor | None, up: Tensor,
    up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, act: str, alpha: float, limit: float, shift: float,
) -> Tensor:  # fmt: skip
    _require_experts(x, gate, gate_bias, up, up_bias, down, down_bias, act, alpha)
    require("weights of the choice", tuple(weights.shape), tuple(index.shape))
    require("rows of the choice", index.shape[0], x.shape[0])
    return x.new_empty(x.shape)


@operator(
    f"experts(Tensor x, Tensor index, Tensor weights, {_EXPERTS}, str act, float alpha, float limit, float shift)"
    " -> Tensor",
    shape=_experts_shape,
)
def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    alpha: float,
    limit: float,
    shift: float,
) -> Tensor:
    """x [T, W] through the experts index [T, k] names, each result times its weight [T, k], summed: [T, W].

    An index outside 0..E-1 names no expert and adds nothing.
    """
    total = torch.zeros_like(x)
    linear = torch.nn.functional.linear
    for expert in range(up.shape[0]):
        token, place = torch.where(index == expert)
        rows = x[token]
        lifted = linear(rows, up[expert], None if up_bias is None else up_bias[expert])
        if gate is None:
            inner = expert_act(lifted, None, act, alpha, limit, shift)
        else:
            gated = linear(rows, gate[expert], None if gate_bias is None else gate_bias[expert])
            inner = expert_act(gated, lifted, act, alpha, limit, shift)
        out = linear(inner, down[expert], None if down_bias is None else down_bias[expert])
        total.index_add_(0, token, out * weights[token, place, None])
    return total


def route(
    logits: Tensor, correction: Tensor | None, top_k: int, scoring: str, groups: int, top_groups: int,
    group_score: str, renormalise: bool, epsilon: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The choice of experts for logits [T, E]: index and weights, both [T, k].

    Scores are softmax or sigmoid of the logits, or the logits themselves, whose softmax is then taken over the chosen.
    The choice is by score + correction, among the `top_groups` best of `groups` equal groups (by their largest score,
    or the sum of their two largest). Weights are scores, over their sum + epsilon if renormalised, times scale; an
    epsilon below 0 is a lower bound of the sum, -epsilon, instead.
    """
    scores = {"softmax": logits.softmax, "sigmoid": lambda _: logits.sigmoid(), "logits": lambda _: logits}[scoring](-1)
    choice = scores if correction is None else scores + correction
    if groups > 1:
        grouped = choice.unflatten(-1, (groups, -1))
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    index = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, index)
    if scoring == "logits":
        weights = weights.softmax(-1)
    if renormalise:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=-epsilon) if epsilon < 0 else total + epsilon)
    return index, weights * scale


def _moe_shape(
    x: Tensor, router: Tensor, router_bias: Tensor | None, correction: Tensor | None, gate: Tensor | None,
    gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, top_k: int,
    scoring: str, groups: int, top_groups: int, group_score: str, renormalise: bool, epsilon: float, scale: float,
    act: str, alpha: float, limit: float, shift: float,
) -> Tensor:  # fmt: skip
    _require_experts(x, gate, gate_bias, up, up_bias, down, down_bias, act, alpha)
    count = up.shape[0]
    require("router", tuple(router.shape), (count, x.shape[1]))
    for name, bias in (("router", router_bias), ("choice", correction)):
        if bias is not None:
            require(f"bias of the {name}", tuple(bias.shape), (count,))
    if scoring not in SCORINGS or group_score not in GROUP_SCORES:
        raise ValueError(f"{scoring}, {group_score} is no way to score experts")
    if groups < 1 or count % groups or not 1 <= top_groups <= groups:
        raise ValueError(f"{top_groups} of {groups} groups of {count} experts cannot be chosen")
    if not 1 <= top_k <= top_groups * (count // groups) or (
        groups > 1 and group_score == "sum2" and count < 2 * groups
    ):
        raise ValueError(f"{top_k} of {count} experts cannot be chosen")
    return x.new_empty(x.shape)


@operator(
    f"moe(Tensor x, Tensor router, Tensor? router_bias, Tensor? correction, {_EXPERTS}, int top_k, str scoring,"
    " int groups, int top_groups, str group_score, bool renormalise, float epsilon, float scale, str act, float alpha,"
    " float limit, float shift) -> Tensor",
    shape=_moe_shape,
)
def moe(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    correction: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_score: str,
    renormalise: bool,
    epsilon: float,
    scale: float,
    act: str,
    alpha: float,
    limit: float,
    shift: float,
) -> Tensor:
    """x [T, W] through the experts that its logits, x times router [E, W] plus router_bias [E], choose: see `route`
    and `experts`. scoring is one of SCORINGS, group_score one of GROUP_SCORES; groups 1 means none.
    """
    logits = torch.nn.functional.linear(x, router, router_bias)
    how = (top_k, scoring, groups, top_groups, group_score, renormalise, epsilon, scale)
    index, weights = route(logits, correction, *how)
    held = (gate, gate_bias, up, up_bias, down, down_bias)
    return torch.ops.xllm.experts(x, index, weights, *held, act, alpha, limit, shift)
