"""The delta rule on what its convolution and its projections give, without cutting and scaling between.

before:  %q, %k, %v = parts of %mixed, by heads              after:  %o = xllm.gated_delta_mixed(%fixed, %mixed, %a, %b,
         %decay = -exp(@A_log) * softplus(%a + @dt_bias)                       @A_log, @dt_bias, …)
         %beta = sigmoid(%b) (* 2)
         %o = xllm.gated_delta(%fixed, %q, %k, %v, %decay, %beta, …)

Does not fire when the target lacks the kernel, when query, key and value do not lie in this order in one value, when
decay or beta are made in another way, or when what makes them has another user.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.effects import named_arguments
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, Miss, Num, Op, Param, Var, cut_of, is_call, match, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm

_RATE = Op((aten.neg.default,), (Op((aten.exp.default,), (Param("a_log"),)),))
_STEP = Op((aten.softplus.default,), (Op((aten.add.Tensor,), (Var("a"), Param("dt_bias")), commutes=True),))
DECAY = Op((aten.mul.Tensor,), (_RATE, _STEP), commutes=True)
_GATE = Op((aten.sigmoid.default,), (Var("b"),))
BETAS = (_GATE, Op((aten.mul.Tensor,), (_GATE, Num("beta_scale")), commutes=True))


@dataclass(frozen=True)
class FuseGatedDelta(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if not is_call(node, xllm.gated_delta.default):
                continue
            if "gated_delta_mixed" in context.target.fuses:
                self._fuse(editor, node)
            else:
                editor.miss(node, f"target {context.target.name} has no kernel for the fused form")
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, node: fx.Node) -> None:
        given = named_arguments(node)
        mixed, why = _whole([given[name] for name in ("q", "k", "v")])
        if mixed is None:
            return editor.miss(node, why)
        miss = Miss()
        decay = match(DECAY, given["decay"], miss)
        beta = next((found for pattern in BETAS if (found := match(pattern, given["beta"], miss))), None)
        if decay is None or beta is None:
            return editor.miss(node, miss.why)
        heads = sizes(given["v"])[1:2]
        if any(sizes(value)[-1:] != heads for value in (decay["a"], beta["b"], decay["a_log"], decay["dt_bias"])):
            return editor.miss(node, "decay and beta are not one number per head")
        _, k_heads, key_dim = sizes(given["k"])
        place = (given["positions"], given["slots"], given["layer"], given["offset"])
        numbers = (given["scale"], given["eps"], float(beta.get("beta_scale", 1.0)))
        with editor.before(node):
            fused = editor.emit(
                xllm.gated_delta_mixed.default,
                *(given["fixed"], mixed, decay["a"], beta["b"], decay["a_log"], decay["dt_bias"], *place),
                *(k_heads, key_dim, *numbers),
                like=node,
            )
        node.replace_all_uses_with(fused)
        editor.program.graph.erase_node(node)
        editor.hit(fused)


def _whole(parts: list[Any]) -> tuple[fx.Node | None, str]:
    """The value [T, W] that query, key and value are all of, in this order; or None and why there is none."""
    source: fx.Node | None = None
    end = 0
    for part in parts:
        cut = arguments(part)[0] if is_call(part, aten.reshape.default) else None
        if not is_call(cut, aten.slice.Tensor):
            return None, f"%{part.name} is not a part of one value"
        found = cut_of(cut)
        if found is None or len(sizes(found[0])) != 2 or sizes(part)[1] * sizes(part)[2] != sizes(cut)[1]:
            return None, f"%{cut.name} is not cut along the width of its tokens"
        held, start = found
        if start != end or (source is not None and held is not source):
            return None, "query, key and value do not lie in this order in one value"
        source, end = held, start + sizes(cut)[1]
    if source is None or end != sizes(source)[1]:
        return None, "query, key and value are not all of the value they are parts of"
    return source, ""
