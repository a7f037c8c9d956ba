"""A residual sum and the norm behind it, in one pass over memory.

before:  %s = aten.add(%h, %x)                     after:  %n, %s = xllm.add_rms_norm(%x, %h, @weight, eps=1e-06)
         %n = xllm.rms_norm(%s, @weight, eps=1e-06)

The sum stays available to its other users. Does not fire when the two sides differ in shape or when the norm is over heads.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.verify import type_key
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor

aten = torch.ops.aten
xllm = torch.ops.xllm


@dataclass(frozen=True)
class FuseAddRmsNorm(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for norm in list(program.calls()):
            if norm.target is xllm.rms_norm.default and norm.args[0].target is aten.add.Tensor:  # pyright: ignore
                self._fuse(editor, norm, norm.args[0])  # pyright: ignore[reportArgumentType]
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, norm: fx.Node, total: fx.Node) -> None:
        one, other = total.args[:2]
        if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
            return editor.miss(norm, "the norm's input adds a number, not a residual")
        if type_key(one.meta["val"]) != type_key(other.meta["val"]):
            return editor.miss(norm, f"the sum broadcasts {one.name} and {other.name}")
        branch, residual = (one, other) if one.target is xllm.linear.default else (other, one)
        with editor.before(total):
            pair = editor.emit(xllm.add_rms_norm.default, branch, residual, *norm.args[1:], like=norm)
            normed = editor.emit(operator.getitem, pair, 0, like=norm)
            summed = editor.emit(operator.getitem, pair, 1, like=norm)
        norm.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)
        editor.hit(pair)
