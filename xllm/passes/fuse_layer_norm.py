"""One operator for layer normalisation that a model spells out, and one weight where it is shifted.

before:  %m = aten.mean(%x, [-1], True)                    after:  %n = xllm.layer_norm(%x, @weight, None, eps=1e-05)
         %v = aten.mean(aten.pow(%x - %m, 2), [-1], True)
         %n = @weight * ((%x - %m) * aten.rsqrt(%v + 1e-05))

and      %n = xllm.layer_norm(%x, @weight + 1, @bias, …)   after:  %n = xllm.layer_norm(%x, @weight+1.0, @bias, …)

Does not fire when a mean runs over other dimensions, when an inner value has another user, when the norm has no weight,
or when its weight is not one number per channel (or per head and channel).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program, Shift, Weight
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, Miss, Num, Op, Param, Var, is_call, is_weight, match, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm
x, weight = Var("x"), Param("weight")

_MEAN = Op((aten.mean.dim,), (x, [-1], True), shared=True)
_CENTRED = Op((aten.sub.Tensor,), (x, _MEAN), shared=True)
_VARIANCE = Op((aten.mean.dim,), (Op((aten.pow.Tensor_Scalar,), (_CENTRED, Num(equals=2))), [-1], True))
_INVERSE = Op((aten.rsqrt.default,), (Op((aten.add.Tensor,), (_VARIANCE, Num("eps")), commutes=True),), name="anchor")
_NORMED = Op((aten.mul.Tensor,), (_CENTRED, _INVERSE), commutes=True)
PATTERN = Op((aten.mul.Tensor,), (weight, _NORMED), commutes=True)


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if is_call(node, aten.rsqrt.default) and _is_variance(node):
                self._fuse(editor, node)
            elif is_call(node, xllm.layer_norm.default):
                self._fold(editor, node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, anchor: fx.Node) -> None:
        miss = Miss()
        for root in [root for user in anchor.users for root in user.users]:
            binds = match(PATTERN, root, miss)
            if binds is not None and binds["anchor"] is anchor:
                return self._replace(editor, root, binds)
        editor.miss(anchor, miss.why or "its result is not scaled by a weight")

    def _replace(self, editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
        scale, value = binds["weight"], binds["x"]
        shape = sizes(scale)
        if len(shape) not in (1, 2) or shape != sizes(value)[-len(shape) :] or len(shape) >= len(sizes(value)):
            return editor.miss(root, f"its weight is {list(shape)}, not one number per channel")
        with editor.before(root):
            fused = editor.emit(xllm.layer_norm.default, value, scale, None, float(binds["eps"]), like=root)
        root.replace_all_uses_with(fused)
        editor.hit(fused)

    def _fold(self, editor: Editor, norm: fx.Node) -> None:
        """A weight that a number is added to is a weight of its own."""
        shifted = norm.args[1]
        if not is_call(shifted, aten.add.Tensor) or shifted.kwargs:
            return
        one, by = arguments(shifted)
        if not is_weight(one) or isinstance(by, bool) or not isinstance(by, int | float):
            return editor.miss(norm, "its weight is computed by more than a sum with a number")
        held = editor.program.weights[str(one.target)]
        moved = editor.weight(f"{one.target}+{float(by)!r}", Weight(held.shape, Shift(held.rule, float(by))))
        norm.update_arg(1, moved)
        editor.hit(norm)


def _is_variance(inverse: fx.Node) -> bool:
    """Whether an inverse root is that of a mean of squared differences; of plain squares it is an rms norm's."""
    total = arguments(inverse)[0]
    mean = next((one for one in total.all_input_nodes if is_call(one, aten.mean.dim)), None)
    square = arguments(mean)[0] if mean is not None else None
    return is_call(square, aten.pow.Tensor_Scalar) and is_call(square.args[0], aten.sub.Tensor)
