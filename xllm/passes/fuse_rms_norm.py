"""One operator for root-mean-square normalisation.

before:  %p = aten.pow(%x, 2)            after:  %n = xllm.rms_norm(%x, @weight, eps=1e-06)
         %m = aten.mean(%p, [-1], True)
         %r = aten.rsqrt(%m + 1e-06)
         %n = @weight * (%x * %r)

A scale of `1 + weight` becomes a weight rule. A norm of heads first, `xllm.rms_norm(transpose(%x, 0, 1))`, is the
transpose of the norm: so it stands where norms of tokens first stand. Does not fire when the mean runs over other
dimensions, when an inner value has another user, when the norm has no weight, or when its weight is not one number per
channel.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program, Shift, Weight
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, Miss, Num, Op, Param, Var, is_call, match, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm
x, weight = Var("x"), Param("weight")

_SQUARES = (
    Op((aten.pow.Tensor_Scalar,), (x, Num(equals=2))),
    Op((aten.mul.Tensor,), (x, x)),
    Op((aten.square.default,), (x,)),
)
_SCALES = (weight, Op((aten.add.Tensor,), (weight, Num("shift")), commutes=True, shared=True))


def _patterns() -> list[Any]:
    found = []
    for scale in _SCALES:
        for square in _SQUARES:
            mean = Op((aten.mean.dim,), (square, [-1], True))
            shifted = Op((aten.add.Tensor,), (mean, Num("eps")), commutes=True)
            for inverse in _inverses(shifted):
                normed = Op((aten.mul.Tensor,), (x, inverse), commutes=True)
                found.append(Op((aten.mul.Tensor,), (scale, normed), commutes=True))
    return found


def _inverses(shifted: Any) -> tuple[Op, ...]:
    """One over the root, as an operator of its own or as a power."""
    root, power = (aten.rsqrt.default,), (aten.pow.Tensor_Scalar,)
    return Op(root, (shifted,), name="anchor"), Op(power, (shifted, Num(equals=-0.5)), name="anchor")


PATTERNS = _patterns()


@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if node.target is aten.rsqrt.default or (
                is_call(node, aten.pow.Tensor_Scalar) and arguments(node)[1] == -0.5
            ):
                self._fuse(editor, node)
        for node in list(program.calls()):
            if is_call(node, xllm.rms_norm.default) and is_call(node.args[0], aten.transpose.int):
                _norm_first(editor, node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, anchor: fx.Node) -> None:
        miss = Miss()
        for root in _two_users_up(anchor):
            for pattern in PATTERNS:
                binds = match(pattern, root, miss)
                if binds is not None and binds["anchor"] is anchor:
                    return self._replace(editor, root, binds)
        editor.miss(anchor, miss.why or "its result is not scaled by a weight")

    def _replace(self, editor: Editor, root: fx.Node, binds: dict[str, Any]) -> None:
        scale = binds["weight"]
        if sizes(scale) != sizes(binds["x"])[-1:]:
            return editor.miss(root, f"its weight is {list(sizes(scale))}, not one number per channel")
        if shift := binds.get("shift"):
            name = f"{scale.target}+{shift!r}"
            held = editor.program.weights[scale.target]
            scale = editor.weight(name, Weight(held.shape, Shift(held.rule, float(shift))))
        with editor.before(root):
            fused = editor.emit(xllm.rms_norm.default, binds["x"], scale, float(binds["eps"]), like=root)
        root.replace_all_uses_with(fused)
        editor.hit(fused)


def _norm_first(editor: Editor, norm: fx.Node) -> None:
    """rms_norm(transpose(x)) as transpose(rms_norm(x)), where the transpose leaves the last dimension alone."""
    turned, *rest = arguments(norm)
    source, *axes = arguments(turned)
    rank = len(sizes(norm))
    if rank - 1 in {axis % rank for axis in axes}:
        return editor.miss(norm, "the transpose in front of it moves the normalised dimension")
    with editor.before(norm):
        normed = editor.emit(xllm.rms_norm.default, source, *rest, like=norm)
        norm.replace_all_uses_with(editor.emit(aten.transpose.int, normed, *axes, like=norm))
    editor.hit(normed)


def _two_users_up(node: fx.Node) -> list[fx.Node]:
    return [root for user in node.users for root in user.users]
