"""Attention spelled out in products and a softmax, as exporters write it, becomes one operator.

before:  %k = aten.mul(aten.permute(%keys, [0, 1, 3, 2]), 0.6)
         %s = aten.matmul(aten.mul(%q, 0.6), %k)
         %w = aten.softmax(aten.add(%s, aten.where(%seen, 0, -inf)), -1)
         %o = aten.matmul(aten.where(aten.isnan(%w), 0, %w), %v)
after:   %o = xllm.sdpa(%q, %keys, %v, %seen, scale=0.36, softcap=0, causal=False, tokens_first=False)

Numbers that queries, keys or scores are multiplied with are its scale, a tanh between two of them its soft-cap; keys
and values repeated for the heads that share them are read where they lie; a mask that shows everything goes, and one
that counts up to the query is `causal`. Where queries, keys, values and result all come and go with tokens first, the
four permutes go too. Without the guard against isnan a query that sees nothing would have been NaN, and is zeros. It
does not fire where scores or weights are read by others too, and where keys are not turned round by a permute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.fx as fx

from xllm.ir import Program
from xllm.ir.program import arguments
from xllm.ir.weight_rules import Constant
from xllm.passes.base import Context, Outcome, Pass
from xllm.passes.fold_indices import counted
from xllm.passes.rewrite import Editor, is_call, is_weight, sizes, unscaled

aten = torch.ops.aten
xllm = torch.ops.xllm
_LOWEST = float(np.finfo(np.float32).min)
_SWAP = [0, 2, 1, 3]  # heads and tokens change places


@dataclass(frozen=True)
class FuseSdpa(Pass):
    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        for node in list(program.calls()):
            if is_call(node, aten.softmax.int):
                self._fuse(editor, node)
        for node in list(program.calls()):
            if is_call(node, xllm.sdpa.default):
                _drop_mask(editor, node)
                _tokens_first(editor, node)
        editor.finish()
        return Outcome(program, tuple(editor.hits), tuple(editor.misses))

    def _fuse(self, editor: Editor, softmax: fx.Node) -> None:
        scores, axis, *_ = arguments(softmax)
        if axis not in (-1, len(sizes(softmax)) - 1):
            return editor.miss(softmax, f"it is along dimension {axis}, not along the keys")
        weights = _guarded(editor.program, softmax)
        if weights is None or len(weights.users) != 1:
            return editor.miss(softmax, "its weights are read by others than one product")
        root = next(iter(weights.users))
        if not is_call(root, aten.matmul.default) or root.args[0] is not weights:
            return editor.miss(softmax, "its weights are not the left side of a product with values")
        mask, product, scale = None, scores, 1.0
        if is_call(scores, aten.add.Tensor) and not scores.kwargs:
            product, mask = _product_first(*arguments(scores))
        product, scale, softcap = _uncapped(product)
        if not is_call(product, aten.matmul.default):
            return editor.miss(softmax, f"its scores are not a product of queries and keys, but %{product}")
        if len(product.users) != 1 or len(scores.users) != 1:
            return editor.miss(softmax, "its scores are read by others too")
        (q, by_query), (turned, by_key) = (unscaled(part) for part in arguments(product))
        keys = _turned(turned)
        if keys is None:
            return editor.miss(softmax, "its keys are not turned round by a permute")
        (k, order), v = keys, arguments(root)[1]
        with editor.before(root):
            if order:
                k = editor.emit(aten.permute.default, k, order, like=root)
            self._replace(editor, root, (q, k, v), mask, (scale * by_query * by_key, softcap))

    def _replace(
        self, editor: Editor, root: fx.Node, given: tuple[fx.Node, ...], mask: Any, how: tuple[float, float]
    ) -> None:
        """`root` becomes one operator on `given` (queries, keys, values), all of them heads first or without heads.

        how: scale and soft-cap.
        """
        q, k, v = given
        ranks = {len(sizes(part)) for part in given}
        if ranks == {3} and mask is None and all(_one_symbol(part) for part in given):
            wide = [editor.emit(aten.reshape.default, part, _with_head(part), like=root) for part in given]
            made = editor.emit(xllm.sdpa.default, *wide, None, *how, False, False, like=root)
            shape = [size if isinstance(size, int) else -1 for size in sizes(root)]
            made = editor.emit(aten.reshape.default, made, shape, like=root)
        elif ranks == {4}:
            near, far = _unrepeated(k), _unrepeated(v)
            if near is not None and far is not None and sizes(near)[:3] == sizes(far)[:3]:
                k, v = near, far
            try:
                made = editor.emit(xllm.sdpa.default, q, k, v, mask, *how, False, False, like=root)
            except Exception as error:  # sizes that broadcast, which the operator does not
                return editor.miss(root, f"its operands do not fit one attention: {error}")
        else:
            return editor.miss(root, f"queries, keys and values have {sorted(ranks)} dimensions")
        root.replace_all_uses_with(made)
        editor.hit(made)


def _guarded(program: Program, softmax: fx.Node) -> fx.Node | None:
    """What is multiplied with the values: the weights, or those where none is NaN."""
    guard = next((user for user in softmax.users if is_call(user, aten.isnan.default)), None)
    if guard is None:
        return softmax
    chosen = next(iter(guard.users))
    if {*softmax.users} != {guard, chosen} or len(guard.users) != 1 or not is_call(chosen, aten.where.self):
        return None
    condition, yes, no = arguments(chosen)
    return chosen if condition is guard and no is softmax and _constant(program, yes) == 0 else None


def _constant(program: Program, node: Any) -> float | None:
    """The one number a constant holds, all of its elements alike; None for anything else."""
    if not is_weight(node) or not isinstance(rule := program.weights[str(node.target)].rule, Constant):
        return None
    held = program.constants[rule.name]
    return float(held.flat[0]) if held.size and (held == held.flat[0]).all() else None


def _product_first(one: Any, other: Any) -> tuple[Any, Any]:
    return (one, other) if is_call(_uncapped(one)[0], aten.matmul.default) else (other, one)


def _uncapped(node: Any) -> tuple[Any, float, float]:
    """A product behind cap * tanh(. / cap), how often it is taken, and the cap; 0 where there is none."""
    value, scale = unscaled(node)
    if not is_call(value, aten.tanh.default) or len(value.users) != 1 or scale <= 0:
        return value, scale, 0.0
    inner, by = unscaled(value.args[0])
    return inner, by * scale, scale


def _turned(node: Any) -> tuple[fx.Node, list[int]] | None:
    """What the keys [B, H, S, D] behind [B, H, D, S] are a permutation of, and which; none if it is empty."""
    rank = len(sizes(node))
    if is_call(node, aten.reshape.default) and rank == 4:
        inner = arguments(node)[0]
        flat = arguments(inner)[0] if is_call(inner, aten.permute.default) and inner.args[1] == [0, 2, 1] else None
        whole = arguments(flat)[0] if is_call(flat, aten.reshape.default) else None
        batch, heads, width, tokens = sizes(node)
        if isinstance(whole, fx.Node) and sizes(whole) == (batch, heads, tokens, width):
            return whole, []
        return None
    if is_call(node, aten.transpose.int) and {axis % rank for axis in arguments(node)[1:]} == {rank - 1, rank - 2}:
        return arguments(node)[0], []
    if not is_call(node, aten.permute.default):
        return None
    source, order = arguments(node)
    straight = [*order[:-2], order[-1], order[-2]]
    return source, [] if straight == sorted(straight) else straight


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """[B, Hkv, S, D] that stands once for each of the heads sharing it in [B, H, S, D]."""
    many = arguments(node)[0] if is_call(node, aten.reshape.default) else None
    if not is_call(many, aten.expand.default) or len(sizes(many)) != 5:
        return None
    one = arguments(many)[0]
    source = arguments(one)[0] if is_call(one, aten.reshape.default) else None
    if not isinstance(source, fx.Node) or len(sizes(source)) != 4:
        return None
    batch, heads, tokens, width = sizes(source)
    spread = (batch, heads, sizes(many)[2], tokens, width)
    fits = sizes(one) == (batch, heads, 1, tokens, width) and sizes(many) == spread
    return source if fits and sizes(node)[2:] == (tokens, width) else None


def _one_symbol(node: fx.Node) -> bool:
    return sum(not isinstance(size, int) for size in sizes(node)) <= 1


def _with_head(node: fx.Node) -> list[int]:
    """[B, 1, L, D], -1 for the size that is a symbol."""
    batch, *rest = (size if isinstance(size, int) else -1 for size in sizes(node))
    return [batch, 1, *rest]


def _drop_mask(editor: Editor, node: fx.Node) -> None:
    """A choice of 0 where something is seen and -inf where not is what is seen; of all being seen, nothing."""
    mask, hidden = node.args[3], -np.inf
    if is_call(mask, aten.where.self) and _constant(editor.program, mask.args[1]) == 0:
        hidden = _constant(editor.program, mask.args[2])
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool or hidden is None:
        return
    rest = _behind_causal(node, mask)
    causal = rest is not mask or node.args[6]
    if _shows_all(editor.program, mask):
        node.update_arg(3, None)
    elif rest is None and hidden <= _LOWEST:  # every query sees itself, so that the lowest number hides like -inf
        node.args = (*node.args[:3], None, *node.args[4:6], causal, node.args[7])
    elif rest is not None and hidden == -np.inf:
        while is_call(rest, aten.expand.default) and len(sizes(rest)) == len(sizes(arguments(rest)[0])):
            rest = arguments(rest)[0]  # the operator repeats what is one
        node.args = (*node.args[:3], rest, *node.args[4:6], causal, node.args[7])


def _behind_causal(node: fx.Node, mask: fx.Node) -> fx.Node | None:
    """What a mask asks beside that query i sees keys up to i + S - L; the mask itself where it does not ask that, None
    where it asks nothing else."""
    if is_call(mask, aten.logical_and.default):
        for one, other in (arguments(mask), arguments(mask)[::-1]):
            if _behind_causal(node, one) is None:
                return other
        return mask
    if not is_call(mask, aten.le.Tensor, aten.ge.Tensor):
        return mask
    low, high = arguments(mask) if mask.target is aten.le.Tensor else arguments(mask)[::-1]
    key, query = counted(low), counted(high)
    tokens = 1 if node.args[7] else 2
    ahead = sizes(node.args[1])[tokens] - sizes(node.args[0])[tokens]  # pyright: ignore[reportArgumentType]
    causal = key and query and (key.axis, key.start, query.axis) == (-1, 0, -2) and str(query.start) == str(ahead)
    return None if causal else mask


def _shows_all(program: Program, mask: Any) -> bool:
    while is_call(mask, aten.expand.default, aten.reshape.default, aten.to.dtype):
        mask = arguments(mask)[0]
    return bool(_constant(program, mask))


def _tokens_first(editor: Editor, node: fx.Node) -> None:
    """Permutes before and after go where all of them swap heads and tokens."""
    q, k, v, *rest, tokens_first = arguments(node)
    if tokens_first or not all(_swaps(part) for part in (q, k, v, *node.users)) or not node.users:
        return
    with editor.before(node):
        sources = [arguments(part)[0] for part in (q, k, v)]
        made = editor.emit(xllm.sdpa.default, *sources, *rest, True, like=node)
    for user in list(node.users):
        user.replace_all_uses_with(made)
    editor.hit(made)


def _swaps(node: Any) -> bool:
    return is_call(node, aten.permute.default) and node.args[1] == _SWAP
