"""Activations spelled out in elementary operators, as exporters write them, become one operator.

before:  %s = aten.sigmoid(%x)                               after:  %a = aten.silu(%x)
         %a = aten.mul(%x, %s)
before:  %e = aten.erf(aten.div(%x, 1.414214))               after:  %a = aten.gelu(%x)
         %a = aten.mul(aten.mul(%x, aten.add(%e, 1)), 0.5)

GELU by tanh, of 0.797885 (x + 0.044715 x^3), likewise. The factors x, 1/2 and 1 + erf may be multiplied in any order.
Does not fire on other numbers, nor where an inner value is read by others too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, is_call, unscaled

aten = torch.ops.aten
_NEAR = 1e-6  # numbers come from files in float32


@dataclass(frozen=True)
class FuseActivation(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if is_call(node, aten.sigmoid.default):
                self._silu(editor, node)
            elif is_call(node, aten.erf.default, aten.tanh.default):
                self._gelu(editor, node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _silu(self, editor: Editor, sigmoid: fx.Node) -> None:
        x, product = sigmoid.args[0], next(iter(sigmoid.users), None)
        if (
            len(sigmoid.users) != 1
            or not is_call(product, aten.mul.Tensor)
            or product.args not in ((x, sigmoid), (sigmoid, x))
        ):
            return editor.miss(sigmoid, "it is not multiplied with what it is of, and nothing else")
        _replace(editor, product, aten.silu.default, x)

    def _gelu(self, editor: Editor, inner: fx.Node) -> None:
        x = _behind_erf(inner) if is_call(inner, aten.erf.default) else _behind_tanh(inner)
        if x is None:
            return editor.miss(inner, "it is not of what GELU takes it of")
        value, factor, times_x = inner, 1.0, 0
        shifted = False
        while not (shifted and times_x == 1 and _near(factor, 0.5)):
            user = next(iter(value.users), None)
            if len(value.users) != 1 or user is None or user.kwargs or len(user.args) != 2:
                return editor.miss(inner, f"%{value.name} is not one factor of x / 2 and 1 + {inner.name}")
            other: Any = user.args[1] if user.args[0] is value else user.args[0]
            number = isinstance(other, int | float)
            base, scale = (None, float(other)) if number else unscaled(other)
            if is_call(user, aten.add.Tensor) and number and other == 1 and not shifted and factor == 1:
                shifted = True
            elif is_call(user, aten.mul.Tensor) and shifted and (number or (base is x and times_x == 0)):
                factor, times_x = factor * scale, times_x + (not number)
            else:
                return editor.miss(inner, f"%{user.name} is no factor of GELU")
            value = user
        how = {} if is_call(inner, aten.erf.default) else {"approximate": "tanh"}
        _replace(editor, value, aten.gelu.default, x, **how)


def _replace(editor: Editor, root: fx.Node, target: Any, x: Any, **how: str) -> None:
    with editor.before(root):
        made = editor.emit(target, x, like=root, **how)
    root.replace_all_uses_with(made)
    editor.hit(made)


def _behind_erf(erf: fx.Node) -> fx.Node | None:
    x, scale = unscaled(erf.args[0])
    return x if _near(scale, math.sqrt(0.5)) else None


def _behind_tanh(tanh: fx.Node) -> fx.Node | None:
    """x where the argument is sqrt(2 / pi) (x + 0.044715 x^3)."""
    total, scale = unscaled(tanh.args[0])
    if not is_call(total, aten.add.Tensor) or total.kwargs or not _near(scale, math.sqrt(2 / math.pi)):
        return None
    for x, cubed in (arguments(total), arguments(total)[::-1]):
        power, factor = unscaled(cubed)
        if is_call(power, aten.pow.Tensor_Scalar) and arguments(power) == (x, 3) and _near(factor, 0.044715):
            return x
    return None


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _NEAR * abs(other)
