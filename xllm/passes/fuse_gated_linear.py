"""The product of a gate and the factor beside it, and the gate behind them, as one operator.

before:  %gu = xllm.linear(%x, @gate_up_proj, None)    after:  %m = xllm.gated_linear(%x, @gate_up_proj, None, "silu")
         %m = xllm.gated_act(%gu, "silu")

Of all columns of the product only half is written. Does not fire when the target lacks the kernel, when a kernel module
has one for either part, when the product has another user, or when its weight is computed.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, is_weight

xllm = torch.ops.xllm


@dataclass(frozen=True)
class FuseGatedLinear(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for gate in list(program.calls()):
            if not is_call(gate, xllm.gated_act.default):
                continue
            if why := _missing(context) or _mismatch(gate):
                editor.miss(gate, why)
                continue
            product, act = arguments(gate)
            with editor.before(gate):
                fused = editor.emit(xllm.gated_linear.default, *arguments(product), act, like=gate)
            gate.replace_all_uses_with(fused)
            editor.hit(fused)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))


def _missing(context: Context) -> str:
    if "gated_linear" not in context.target.fuses:
        return f"target {context.target.name} has no kernel for the fused form"
    parts = {"xllm.linear", "xllm.gated_act"}
    own = next((provider.name for provider in context.providers if parts & provider.rules.keys()), "")
    return own and f"kernel module {own} has a kernel for one of the two"


def _mismatch(gate: fx.Node) -> str:
    product = arguments(gate)[0]
    if not is_call(product, xllm.linear.default):
        return "it is not of a product"
    if len(product.users) > 1:
        return f"%{product.name} has {len(product.users)} users, so it cannot be fused away"
    weights = (tensor for tensor in arguments(product)[1:] if tensor is not None)
    return "" if all(map(is_weight, weights)) else f"the weight of %{product.name} is computed"
