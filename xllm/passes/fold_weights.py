"""What is done to weights alone is done once, as they are packed; products and sums with weights are linears.

before:  %w = aten.permute(aten.slice(@in_proj, -2, 0, 32), [1, 0])   after:  %q = xllm.linear(%x, @in_proj[0:32], @b)
         %q = aten.add(aten.matmul(%x, %w), @b)

Cuts, permutes and transposes of a weight become weight rules. A sum behind a linear is its bias where it is one number
for each output, and where nobody else reads the linear. Does not fire on weights that are expanded or computed with,
nor on cuts that depend on a dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Permute, Program, Slice, Weight, WeightRule
from xllm.ir.build import prune
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, is_weight, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True)
class FoldWeights(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for step in (_fold, _product, _bias):
            for node in list(program.calls()):
                step(editor, node)
            prune(program)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))


def _fold(editor: Editor, node: fx.Node) -> None:
    """A weight seen another way is another weight."""
    if not node.args or not is_weight(source := node.args[0]):
        return
    held = editor.program.weights[str(source.target)]
    made = _seen(node, held.rule)
    if made is not None:
        rule, how = made
        node.replace_all_uses_with(editor.weight(f"{source.target}{how}", Weight(sizes(node), rule)))
        editor.hit(node)


def _seen(node: fx.Node, rule: WeightRule) -> tuple[WeightRule, str] | None:
    """The rule of a view of a weight, and what it adds to the weight's name."""
    given, rank = named_arguments(node), len(sizes(node))
    if is_call(node, aten.slice.Tensor):
        axis, step = given.get("dim", 0) % rank, given.get("step", 1)
        start, stop = given.get("start") or 0, given.get("end")
        if all(isinstance(bound, int | None) for bound in (start, stop)):
            first, last, _ = slice(start, stop).indices(sizes(given["self"])[axis])
            return Slice(rule, axis, first, last, step), f"[{':,' * axis}{first}:{last}:{step}]"
    order = list(range(rank))
    if is_call(node, aten.transpose.int):
        one, other = given["dim0"], given["dim1"]
        order[one], order[other] = order[other], order[one]
    elif is_call(node, aten.permute.default):
        order = [axis % rank for axis in given["dims"]]
    else:
        return None
    return Permute(rule, tuple(order)), ".T" if order == [1, 0] else f".{'-'.join(map(str, order))}"


def _product(editor: Editor, node: fx.Node) -> None:
    """x @ w is a linear, whose weight lies the other way round."""
    if not is_call(node, aten.matmul.default, aten.mm.default):
        return
    x, weight = arguments(node)
    if not is_weight(weight) or len(sizes(weight)) != 2 or len(sizes(x)) < 2:
        return
    held = editor.program.weights[str(weight.target)]
    rule = held.rule.of if isinstance(held.rule, Permute) and held.rule.axes == (1, 0) else Permute(held.rule, (1, 0))
    turned = editor.weight(f"{weight.target}.T".removesuffix(".T.T"), Weight(held.shape[::-1], rule))
    with editor.before(node):
        made = editor.emit(xllm.linear.default, x, turned, None, like=node)
    node.replace_all_uses_with(made)
    editor.hit(made)


def _bias(editor: Editor, node: fx.Node) -> None:
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return
    for linear, bias in (node.args, node.args[::-1]):
        if is_call(linear, xllm.linear.default) and is_weight(bias) and sizes(bias) == sizes(linear)[-1:]:
            x, weight, held = arguments(linear)
            if held is not None:
                return editor.miss(node, f"%{linear.name} has a bias already")
            if len(linear.users) > 1:
                return editor.miss(node, f"%{linear.name} is read without the sum too")
            with editor.before(node):
                made = editor.emit(xllm.linear.default, x, weight, bias, like=linear)
            node.replace_all_uses_with(made)
            return editor.hit(made)
