"""The three projections into attention as one product.

before:  %q = xllm.linear(%x, @q_proj, None)       after:  %qkv = xllm.linear(%x, @qkv_proj, None)
         %k = xllm.linear(%x, @k_proj, None)               %q = aten.slice(%qkv, -1, 0, 2048)
         %v = xllm.linear(%x, @v_proj, None)               %k, %v likewise

Found by structure: the linears that attention's query and the KV write's key and value come from. The weight becomes
concat(q, k, v). Does not fire when they read different inputs or when only some have a bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Concat, Program, Weight
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, attention_pairs

aten = torch.ops.aten
xllm = torch.ops.xllm

_ON_THE_WAY: tuple[Callable[..., object], ...] = (
    aten.reshape.default,
    aten.transpose.int,
    xllm.rms_norm.default,
    xllm.rope.default,
)


@dataclass(frozen=True)
class FuseQkv(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for attention, write in attention_pairs(program):
            ends = (attention.args[1], write.args[1], write.args[2])
            self._fuse(editor, attention, [_linear_behind(end) for end in ends])  # pyright: ignore[reportArgumentType]
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, attention: fx.Node, linears: list[fx.Node | None]) -> None:
        found = [linear for linear in linears if linear is not None]
        if len(found) < 3 or len(set(found)) < 3:
            return editor.miss(attention, "query, key and value do not come from three projections")
        if len({linear.args[0] for linear in found}) > 1:
            return editor.miss(attention, "the projections read different inputs: " + ", ".join(n.name for n in found))
        biases = [linear.args[2] for linear in found]
        if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
            return editor.miss(attention, "only some of the projections have a bias")
        fuse_linears(editor, found, "qkv_proj")


def _linear_behind(value: fx.Node) -> fx.Node | None:
    """The projection a value comes from, through views, norms and rope."""
    while value.op == "call_function" and value.target in _ON_THE_WAY:
        value = value.args[0]  # pyright: ignore[reportAssignmentType]
    return value if value.target is xllm.linear.default else None


def fuse_linears(editor: Editor, linears: list[fx.Node], leaf: str) -> fx.Node:
    """Replaces linears of one input by one linear and slices of it; returns the linear. Weights are named after the first."""
    table, first = editor.program.weights, min(linears, key=list(editor.program.graph.nodes).index)
    weight = _joined(editor, [linear.args[1] for linear in linears], leaf)  # pyright: ignore[reportArgumentType]
    bias = None
    if first.args[2] is not None:
        bias = _joined(editor, [linear.args[2] for linear in linears], leaf)  # pyright: ignore[reportArgumentType]
    with editor.before(first):
        fused = editor.emit(xllm.linear.default, first.args[0], weight, bias, like=first)
        fused.meta["custom"]["path"] = str(weight.target).removesuffix(".weight")
        start = 0
        for linear in linears:
            stop = start + table[str(linear.args[1].target)].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
            part = editor.emit(aten.slice.Tensor, fused, -1, start, stop, like=linear)
            linear.replace_all_uses_with(part)
            start = stop
    editor.hit(fused)
    return fused


def _joined(editor: Editor, parts: list[fx.Node], leaf: str) -> fx.Node:
    """A new weight: the parts one after the other. Its name keeps the module path of the first part."""
    held = [editor.program.weights[str(part.target)] for part in parts]
    owner, _, kind = str(parts[0].target).rpartition(".")
    name = f"{owner.rpartition('.')[0]}.{leaf}.{kind}".lstrip(".")
    shape = (sum(weight.shape[0] for weight in held), *held[0].shape[1:])
    return editor.weight(name, Weight(shape, Concat(tuple(weight.rule for weight in held))))
