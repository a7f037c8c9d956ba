"""The two projections of a gated feed-forward block as one product, and the gate behind it.

before:  %g = xllm.linear(%x, @gate_proj, None)       after:  %gu = xllm.linear(%x, @gate_up_proj, None)
         %u = xllm.linear(%x, @up_proj, None)                 %m = xllm.gated_act(%gu, act="silu")
         %m = aten.mul(aten.silu(%g), %u)

Does not fire when the two read different inputs, when only one has a bias, when an inner value has another user, or
when the activation has no gated form.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.fuse_qkv import fuse_linears, mismatch
from xllm.passes.rewrite import Editor, Maybe, Miss, Op, Param, Var, match

aten = torch.ops.aten
xllm = torch.ops.xllm

_ACTIVATIONS = (aten.silu.default, aten.gelu.default)
_GATE = Op((xllm.linear.default,), (Var("x"), Param("gate_weight"), Maybe("gate_bias")), name="gate")
_UP = Op((xllm.linear.default,), (Var("x"), Param("up_weight"), Maybe("up_bias")), name="up")
PATTERN = Op((aten.mul.Tensor,), (Op(_ACTIVATIONS, (_GATE,), options=("approximate",)), _UP), commutes=True)


@dataclass(frozen=True)
class FuseGateUp(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if node.target in _ACTIVATIONS:
                self._fuse(editor, node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, act: fx.Node) -> None:
        miss = Miss()
        product = next(iter(act.users), None)
        binds = match(PATTERN, product, miss)
        if binds is None or product is None:
            return editor.miss(act, miss.why)
        if why := mismatch([binds["gate"], binds["up"]], "gate and up"):
            return editor.miss(act, why)
        fused = fuse_linears(editor, [binds["gate"], binds["up"]], "gate_up_proj")
        with editor.before(product):
            gated = editor.emit(xllm.gated_act.default, fused, _spelling(act), like=product)
        product.replace_all_uses_with(gated)


def _spelling(act: fx.Node) -> str:
    """The activation's name in the dialect."""
    if act.target is aten.silu.default:
        return "silu"
    return "gelu_tanh" if act.kwargs.get("approximate", "none") == "tanh" else "gelu"
