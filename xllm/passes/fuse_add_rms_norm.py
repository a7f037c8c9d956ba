"""A residual sum and the norm behind it, in one pass over memory.

before:  %s = aten.add(%h, %x)                     after:  %n, %s = xllm.add_rms_norm(%x, %h, @weight, eps=1e-06)
         %n = xllm.rms_norm(%s, @weight, eps=1e-06)

The sum stays available to its other users. Does not fire when the two sides differ in shape, or when one of them is
scaled or a number.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.program import arguments
from xllm.ir.verify import type_key
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True)
class FuseAddRmsNorm(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for norm in list(program.calls()):
            if is_call(norm, xllm.rms_norm.default) and is_call(total := norm.args[0], aten.add.Tensor):
                self._fuse(editor, norm, total)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, norm: fx.Node, total: fx.Node) -> None:
        one, other = arguments(total)
        if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
            return editor.miss(norm, "the norm's input adds a number, not a residual")
        if total.kwargs:
            return editor.miss(norm, f"the sum scales {other.name}")
        if type_key(one.meta["val"]) != type_key(other.meta["val"]):
            return editor.miss(norm, f"the sum broadcasts {one.name} and {other.name}")
        branch, residual = (one, other) if is_call(one, xllm.linear.default) else (other, one)
        # At the first use of the sum, which lies in the layer of the norm even where the sum closes the layer before.
        users = set(total.users)
        with editor.before(next(node for node in editor.program.graph.nodes if node in users)):
            pair = editor.emit(xllm.add_rms_norm.default, branch, residual, *norm.args[1:], like=norm)
            normed = editor.emit(operator.getitem, pair, 0, like=norm)
            summed = editor.emit(operator.getitem, pair, 1, like=norm)
        norm.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)
        editor.hit(pair)
