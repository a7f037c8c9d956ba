"""Router, choice and experts of a mixture as one operator.

before:  %l = xllm.linear(%x, @router, None)              after:  %y = xllm.moe(%x, @router, None, None, @gate, …,
         %p = aten.softmax(%l, -1)                                     top_k=8, scoring="softmax", renormalise=True, …)
         %w, %i = aten.topk(%p, 8)
         %n = aten.div(%w, aten.sum(%w, [-1], True))
         %y = xllm.experts(%x, %i, %n, @gate, …)

The choice may be by softmax or sigmoid of the logits, or by the logits with a softmax over the chosen; with a bias that
counts for the choice only; among the best groups of experts; weights may be divided by their sum and scaled. Does not
fire when the router reads another value than the experts, when a value between has another user, or when the choice is
computed in any other way.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program, Reshape, Weight
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, is_weight, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.reshape.default, aten.view.default)
_SPREAD = (aten.expand.default, aten.unsqueeze.default, aten.clone.default, *_CASTS)
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
_NOTS = (aten.bitwise_not.default, aten.logical_not.default)


class _Miss(Exception):
    """What stood in the way."""


@dataclass
class _Choice:
    """What is known so far of how experts are chosen, read from the weights backwards."""

    logits: fx.Node | None = None
    scoring: str = ""
    correction: fx.Node | None = None
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    renormalise: bool = False
    epsilon: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class FuseMoe(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if is_call(node, xllm.experts.default):
                try:
                    self._fuse(editor, node)
                except _Miss as miss:
                    editor.miss(node, str(miss))
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, node: fx.Node) -> None:
        x, index, weights, *rest = arguments(node)
        choice = _Choice()
        topk = _element(index, 1, aten.topk.default, "the chosen experts")
        _read_weights(choice, weights, topk)
        router = choice.logits
        if not is_call(router, xllm.linear.default):
            raise _Miss(f"the logits %{getattr(router, 'name', router)} are not a product with the router's weight")
        rows, weight, bias = arguments(router)
        if rows is not x or not is_weight(weight) or (bias is not None and not is_weight(bias)):
            raise _Miss("the router does not multiply what the experts read by a weight")
        if _row(arguments(topk)[0]) != _row(router):
            raise _Miss(f"%{topk.name} does not choose among all experts")
        how = (_top_k(topk), choice.scoring, choice.groups, choice.top_groups, choice.group_score)
        how = (*how, choice.renormalise, choice.epsilon, choice.scale)
        with editor.before(node):
            args = (x, weight, bias, _one_row(editor, choice.correction), *rest[:6], *how, *rest[6:])
            fused = editor.emit(xllm.moe.default, *args, like=node)
        node.replace_all_uses_with(fused)
        editor.hit(fused)


def _one_row(editor: Editor, correction: fx.Node | None) -> fx.Node | None:
    """A bias [1, E] as [E]."""
    if correction is None or len(sizes(correction)) == 1:
        return correction
    held = editor.program.weights[str(correction.target)]
    row = Weight(held.shape[-1:], Reshape(held.rule, held.shape[-1:]))
    return editor.weight(f"{correction.target}.row", row)


def _top_k(topk: fx.Node) -> int:
    named = named_arguments(topk)
    last = len(sizes(topk.all_input_nodes[0])) - 1
    if named.get("dim", -1) not in (-1, last) or named.get("largest", True) is not True:
        raise _Miss(f"%{topk.name} does not take the largest of a row")
    return int(named["k"])


def _element(node: Any, index: int, target: Any, what: str) -> fx.Node:
    """The call of `target` whose result number `index` a value is."""
    if is_call(node, operator.getitem) and arguments(node)[1] == index and is_call(arguments(node)[0], target):
        return arguments(node)[0]
    raise _Miss(f"{what} are not result {index} of {target}: found {getattr(node, 'target', node)}")


def _read_weights(choice: _Choice, weights: Any, topk: fx.Node) -> None:
    """Scaling, then renormalisation, then the scores themselves."""
    weights = _uncast(weights)
    while is_call(weights, aten.mul.Tensor, aten.mul.Scalar) and isinstance(arguments(weights)[1], int | float):
        _plain(weights)
        choice.scale *= float(arguments(weights)[1])
        weights = _uncast(arguments(weights)[0])
    if is_call(weights, aten.div.Tensor):
        top, total = arguments(_plain(weights))
        if _row(weights) != _row(_uncast(top)):
            raise _Miss(f"%{weights.name} divides the weights under another shape")
        choice.epsilon = _total_of(_uncast(total), _uncast(top))
        choice.renormalise, weights = True, _uncast(top)
    if is_call(weights, *_SOFTMAX):
        _over_rows(weights)
        choice.scoring, choice.logits = "logits", _uncast(arguments(topk)[0])
        _element(arguments(weights)[0], 0, aten.topk.default, "the values under the softmax")
        if arguments(arguments(weights)[0])[0] is not topk:
            raise _Miss("weights and numbers of the chosen experts come from two choices")
        return
    chosen = _uncast(arguments(topk)[0])
    if is_call(weights, aten.gather.default):
        scores, dim, index = arguments(weights)[:3]
        _element(index, 1, aten.topk.default, "the gathered experts")
        if dim not in (1, -1) or _row(scores) != _row(arguments(topk)[0]) or arguments(index)[0] is not topk:
            raise _Miss(f"%{weights.name} does not gather the scores of the chosen experts")
        scores = _uncast(scores)
    else:
        if _element(weights, 0, aten.topk.default, "the weights") is not topk:
            raise _Miss("weights and numbers of the chosen experts come from two choices")
        scores = None  # the values that were chosen by
    _read_choice(choice, chosen, scores)


def _total_of(total: Any, top: Any) -> float:
    """The epsilon in sum(top) + epsilon, 0 without one; below 0 where the sum has a lower bound."""
    epsilon = 0.0
    if is_call(total, aten.clamp.default, aten.clamp_min.default):
        named = named_arguments(total)
        if not isinstance(named["min"], int | float) or named["min"] <= 0 or named.get("max") is not None:
            raise _Miss(f"%{total.name} is no lower bound of the sum alone")
        epsilon, total = -float(named["min"]), _uncast(named["self"])
    elif is_call(total, aten.add.Tensor, aten.add.Scalar) and isinstance(arguments(total)[1], int | float):
        epsilon, total = float(arguments(_plain(total))[1]), _uncast(arguments(total)[0])
    if is_call(total, aten.sum.dim_IntList):
        named = named_arguments(total)
        if named["self"] is top and list(named["dim"]) in ([-1], [1]) and named.get("keepdim"):
            return epsilon
    raise _Miss(f"the weights are divided by {getattr(total, 'target', total)}, not by their sum")


def _read_choice(choice: _Choice, chosen: fx.Node, scores: fx.Node | None) -> None:
    """Groups, then the bias, then the scores: `scores` where weights are gathered from them, else found here."""
    if is_call(chosen, aten.masked_fill.Scalar):
        value, mask, fill = arguments(chosen)
        # Weights that are chosen values are scores, none below 0: 0 is chosen only where all that count are 0.
        if fill not in (0, 0.0, float("-inf")) or (fill == 0 and scores is not None):
            raise _Miss(f"experts outside the chosen groups are given {fill}")
        chosen = _uncast(value)
        if _row(mask) != _row(value):
            raise _Miss("the mask is spread over more than its experts")
        _read_groups(choice, mask, chosen)
    if scores is None:
        scores = chosen
    elif chosen is not scores:
        if not is_call(chosen, aten.add.Tensor) or scores not in map(_uncast, arguments(chosen)):
            raise _Miss(f"the choice is by {chosen.target} of the scores, not by their sum with a bias")
        if _row(_plain(chosen)) != _row(scores):
            raise _Miss(f"%{chosen.name} is not one number for each expert")
        bias = next(_uncast(part) for part in arguments(chosen) if _uncast(part) is not scores)
        if not is_weight(bias) or sizes(bias)[-1] != sizes(scores)[-1] or len(sizes(bias)) > 2:
            raise _Miss("what is added to the scores for the choice is not a weight, one number for each expert")
        if sizes(bias)[:-1] not in ((), (1,)):
            raise _Miss(f"the bias of the choice is {list(sizes(bias))}, not one number for each expert")
        choice.correction = bias
    logits = choice.logits = _uncast(arguments(scores)[0])
    if is_call(scores, *_SOFTMAX):
        _over_rows(scores)
        if _row(scores) != _row(logits):
            raise _Miss(f"%{scores.name} is over parts of the logits, not all experts")
        choice.scoring = "softmax"
    elif is_call(scores, aten.sigmoid.default):
        choice.scoring = "sigmoid"
    else:
        raise _Miss(f"scores are {scores.target} of the logits, neither softmax nor sigmoid")


def _read_groups(choice: _Choice, mask: Any, chosen: fx.Node) -> None:
    """The chain from a mask over experts back to the scores of their groups."""
    kept = _walk(mask, _SPREAD)
    if not is_call(kept, *_NOTS):
        raise _Miss("the mask is not the opposite of the chosen groups")
    seen = _walk(arguments(kept)[0], _SPREAD)
    if not is_call(seen, aten.scatter.value, aten.scatter_.value):
        raise _Miss(f"the groups are kept by {getattr(seen, 'target', seen)}, not by a scatter of the chosen")
    base, dim, index, value = arguments(seen)
    if value != 1 or dim not in (1, -1) or not is_call(base, *_ZEROS):
        raise _Miss(f"%{seen.name} does not mark the chosen groups with 1 among 0")
    topk = _element(index, 1, aten.topk.default, "the chosen groups")
    choice.top_groups = _top_k(topk)
    best = _uncast(arguments(topk)[0])
    groups = choice.groups = int(sizes(best)[-1])
    each = int(sizes(chosen)[-1]) // groups
    if is_call(best, aten.sum.dim_IntList):
        two = _element(arguments(best)[0], 0, aten.topk.default, "the best of a group")
        if _top_k(two) != 2:
            raise _Miss("a group is scored by more than its two best experts")
        choice.group_score, under, reduced = "sum2", arguments(two)[0], best
    elif is_call(best, operator.getitem) and arguments(best)[1] == 0 and is_call(arguments(best)[0], aten.max.dim):
        reduced = arguments(best)[0]
        under = arguments(reduced)[0]
    elif is_call(best, aten.amax.default):
        under, reduced = arguments(best)[0], best
    else:
        raise _Miss(f"groups are scored by {best.target}, neither their best expert nor their two best")
    if _uncast(under) is not chosen:
        raise _Miss("groups are scored by other numbers than the experts in them")
    if _row(under) != (groups, each) or named_arguments(reduced).get("dim") not in (-1, 2, [-1], [2]):
        raise _Miss("groups are not scored by the experts that lie next to each other")
    if {_row(best), _row(arguments(topk)[0]), _row(base), _row(seen)} != {(groups,)}:
        raise _Miss("groups are not chosen by one number for each")
    _check_spread(mask, seen, groups, each)


def _check_spread(mask: Any, seen: fx.Node, groups: int, each: int) -> None:
    """Every value between the marks of groups and the mask holds a group's mark at the group's experts."""
    node = mask
    while node is not seen:
        source = arguments(node)[0]
        if _row(node) not in ((groups,), (groups, 1), (groups, each), (groups * each,)):
            raise _Miss(f"%{node.name} does not give each expert the mark of its group")
        if is_call(node, aten.expand.default) and _row(source) not in ((groups, 1), _row(node)):
            raise _Miss(f"%{node.name} does not give each expert the mark of its group")
        if is_call(node, aten.bitwise_not.default) and source.meta["val"].dtype is not torch.bool:
            raise _Miss(f"%{node.name} inverts the bits of numbers")
        node = source


def _row(node: fx.Node) -> tuple[Any, ...]:
    """What a value holds for each token: its shape without the first axis."""
    return sizes(node)[1:]


def _over_rows(node: fx.Node) -> None:
    if arguments(node)[1] % len(sizes(node)) != len(sizes(node)) - 1:
        raise _Miss(f"%{node.name} is not over the last axis")


def _plain(node: fx.Node) -> fx.Node:
    if node.kwargs:
        raise _Miss(f"%{node.name} is given {', '.join(sorted(node.kwargs))}, which changes what it means")
    return node


def _uncast(node: Any) -> Any:
    """What stands behind casts to float32 (everything is) and views."""
    return _walk(node, _CASTS)


def _walk(node: Any, through: tuple[Any, ...]) -> Any:
    while is_call(node, *through):
        node = arguments(node)[0]
    return node
