"""The three projections into attention as one product.

before:  %q = xllm.linear(%x, @q_proj, None)       after:  %qkv = xllm.linear(%x, @qkv_proj, None)
         %k = xllm.linear(%x, @k_proj, None)               %q = aten.slice(%qkv, -1, 0, 2048)
         %v = xllm.linear(%x, @v_proj, None)               %k, %v likewise

Found by structure: the linears that attention's query and the KV write's key and value come from. The weight becomes
concat(q, k, v). Does not fire when they read different inputs, when only some have a bias, or when a weight is
computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from xllm.ir import Concat, Program, Weight
from xllm.ir.program import arguments
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.rewrite import Editor, attention_pairs, is_call, is_weight, sizes

aten = torch.ops.aten
xllm = torch.ops.xllm

_ON_THE_WAY: tuple[Callable[..., object], ...] = (
    aten.reshape.default,
    aten.transpose.int,
    xllm.rms_norm.default,
    xllm.layer_norm.default,
    xllm.rope.default,
)


@dataclass(frozen=True)
class FuseQkv(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for attention, write in attention_pairs(program):
            ends = (attention.args[1], write.args[1], write.args[2])
            self._fuse(editor, attention, [_linear_behind(end) for end in ends])
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, attention: fx.Node, ends: list[fx.Node | None]) -> None:
        linears = [linear for linear in ends if linear is not None]
        if len(linears) < 3 or len(set(linears)) < 3:
            return editor.miss(attention, "query, key and value do not come from three projections")
        if why := mismatch(linears, "the projections"):
            return editor.miss(attention, why)
        fuse_linears(editor, linears, "qkv_proj")


def _linear_behind(value: Any) -> fx.Node | None:
    """The projection a value comes from, through views, norms and rope."""
    while is_call(value, *_ON_THE_WAY):
        value = value.args[0]
    return value if is_call(value, xllm.linear.default) else None


def mismatch(linears: list[fx.Node], who: str) -> str:
    """Why linears are not parts of one product; empty when they are."""
    inputs, weights, biases = zip(*(linear.args for linear in linears), strict=True)
    if any(value is not inputs[0] for value in inputs):
        return f"{who} read different inputs: " + ", ".join(linear.name for linear in linears)
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return f"only some of {who} have a bias"
    if not all(is_weight(value) for value in (*weights, *biases) if value is not None):
        return f"{who} have computed weights"
    return ""


def fuse_linears(editor: Editor, linears: list[fx.Node], leaf: str) -> fx.Node:
    """Replaces linears that `mismatch` accepts by one, and slices of it; weights are named by the first part."""
    first = min(linears, key=list(editor.program.graph.nodes).index)
    source, weights, biases = zip(*(arguments(linear) for linear in linears), strict=True)
    weight = _joined(editor, weights, leaf)
    bias = _joined(editor, biases, leaf) if biases[0] is not None else None
    with editor.before(first):
        fused = editor.emit(xllm.linear.default, source[0], weight, bias, like=first)
        fused.meta["custom"]["path"] = str(weight.target).removesuffix(".weight")
        start = 0
        for linear in linears:
            stop = start + sizes(linear)[-1]
            part = editor.emit(aten.slice.Tensor, fused, -1, start, stop, like=linear)
            linear.replace_all_uses_with(part)
            start = stop
    editor.hit(fused)
    return fused


def _joined(editor: Editor, parts: Sequence[fx.Node], leaf: str) -> fx.Node:
    """A new weight: the parts one after the other. It is called `leaf` in the parent of the first part's module."""
    held = [editor.program.weights[str(part.target)] for part in parts]
    owner, _, kind = str(parts[0].target).rpartition(".")
    # A parameter that is no module's weight or bias stands in its parent already.
    parent = owner.rpartition(".")[0] if kind in ("weight", "bias") else owner
    shape = (sum(weight.shape[0] for weight in held), *held[0].shape[1:])
    rule = Concat(tuple(weight.rule for weight in held))
    return editor.weight(f"{parent}.{leaf}.{kind}".lstrip("."), Weight(shape, rule))
