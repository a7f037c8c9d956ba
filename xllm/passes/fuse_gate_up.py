"""The two projections of a gated feed-forward block as one product, and the gate behind it.

before:  %g = xllm.linear(%x, @gate_proj, None)       after:  %gu = xllm.linear(%x, @gate_up_proj, None)
         %u = xllm.linear(%x, @up_proj, None)                 %m = xllm.gated_act(%gu, act="silu")
         %m = aten.mul(aten.silu(%g), %u)

A projection that a model keeps as one already, gate before up, needs the gate only. Does not fire when the two read
different inputs, when only one has a bias, when an inner value has another user, when up stands before gate, or when
the activation has no gated form.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.fuse_qkv import fuse_linears, mismatch
from xllm.passes.rewrite import Editor, Maybe, Miss, Num, Op, Param, Var, is_call, match, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm

_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default)
_GATE = Op((xllm.linear.default,), (Var("x"), Param("gate_weight"), Maybe("gate_bias")), name="gate")
_UP = Op((xllm.linear.default,), (Var("x"), Param("up_weight"), Maybe("up_bias")), name="up")
_PACKED_GATE = Op((aten.slice.Tensor,), (Var("packed"), -1, Num(equals=0), Num("half")))
_PACKED_UP = Op((aten.slice.Tensor,), (Var("packed"), -1, Num("half"), Num("end")))


def _gated(gate: Op, up: Op) -> tuple[Op, Op]:
    act = Op(_ACTIVATIONS, (gate,), options=("approximate",))
    squared = Op((aten.square.default,), (Op((aten.relu.default,), (gate,)),))
    return tuple(Op((aten.mul.Tensor,), (one, up), commutes=True) for one in (act, squared))  # pyright: ignore


PATTERNS = _gated(_GATE, _UP)
PACKED = _gated(_PACKED_GATE, _PACKED_UP)


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
        name, last = _spelling(act)
        product = next(iter(last.users), None)
        for pattern in (*PATTERNS, *PACKED):
            binds = match(pattern, product, miss)
            if binds is not None and product is not None:
                return self._replace(editor, act, product, name, binds)
        editor.miss(act, miss.why)

    def _replace(self, editor: Editor, act: fx.Node, product: fx.Node, name: str, binds: dict[str, Any]) -> None:
        fused: Any = binds.get("packed")
        if fused is not None and (2 * binds["half"], binds["end"]) != (sizes(fused)[-1], sizes(fused)[-1]):
            return editor.miss(act, f"gate and up are not the two halves of %{fused.name}")
        if fused is None:
            if why := mismatch([binds["gate"], binds["up"]], "gate and up"):
                return editor.miss(act, why)
            fused = fuse_linears(editor, [binds["gate"], binds["up"]], "gate_up_proj")
        with editor.before(product):
            gated = editor.emit(xllm.gated_act.default, fused, name, like=product)
        product.replace_all_uses_with(gated)
        if "packed" in binds:
            editor.hit(gated)


def _spelling(act: fx.Node) -> tuple[str, fx.Node]:
    """The activation's name in the dialect, and the call that ends it."""
    if act.target is aten.silu.default:
        return "silu", act
    if act.target is aten.relu.default:
        squared = next((user for user in act.users if is_call(user, aten.square.default)), None)
        return ("relu2", squared) if squared is not None else ("relu", act)
    return ("gelu_tanh" if act.kwargs.get("approximate", "none") == "tanh" else "gelu"), act
