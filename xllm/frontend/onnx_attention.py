"""ONNX's own attention and rotary embedding (opset 23)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch

from xllm.frontend.onnx_build import Builder, Value
from xllm.frontend.onnx_file import refuse
from xllm.frontend.onnx_shapes import Attributes, Inputs, given, permute

aten = torch.ops.aten
xllm = torch.ops.xllm


def _attention(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    """Y, and the present keys and values."""
    q, k, v, mask, past_k, past_v = [*inputs, *[None] * 6][:6]
    q, k, v = given(q), given(k), given(v)
    if (past_k is None) != (past_v is None):
        raise refuse("past keys without past values, or values without keys")
    if (precision := attributes.get("softmax_precision", 1)) not in (0, 1):
        raise refuse(f"softmax_precision {onnx.TensorProto.DataType.Name(precision)}", try_="FLOAT")
    flat = len(q.shape) == 3
    if flat:
        heads, kv_heads = attributes.get("q_num_heads", 0), attributes.get("kv_num_heads", 0)
        q, k, v = _heads(b, q, heads), _heads(b, k, kv_heads), _heads(b, v, kv_heads)
    square = str(q.shape[2]) == str(k.shape[2])
    if past_k is not None and past_v is not None:
        k, v = b.emit(aten.cat.default, [past_k, k], 2), b.emit(aten.cat.default, [past_v, v], 2)
    scale = attributes.get("scale", q.shape[-1] ** -0.5)
    causal = bool(attributes.get("is_causal", 0))
    if causal and not square:
        causal, mask = False, _causal(b, mask, q.shape[2], k.shape[2], past_k.shape[2] if past_k is not None else 0)
    made = b.emit(xllm.sdpa.default, q, k, v, mask, scale, attributes.get("softcap", 0.0), causal, False)
    if flat:
        batch, heads, length, width = made.shape
        made = b.reshape(permute(b, made, [0, 2, 1, 3]), [batch, length, heads * width])
    return [made, k, v]


def _causal(b: Builder, mask: Value | None, length: Any, total: Any, past: Any) -> Value:
    """The mask, and that query i sees keys up to i + past: the operator of ours counts from the last key."""
    device = torch.device("meta")
    rows = b.emit(aten.arange.start, past, past + length, dtype=torch.int64, device=device)
    keys = b.emit(aten.arange.start, 0, total, dtype=torch.int64, device=device)
    seen = b.emit(aten.le.Tensor, keys, b.reshape(rows, [length, 1]))
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else b.emit(aten.logical_and.default, mask, seen)
    return b.emit(aten.where.self, seen, mask, Value(torch.float32, (), known=np.array(-np.inf, np.float32)))


def _heads(b: Builder, x: Value, heads: int) -> Value:
    """[B, L, H D] as [B, H, L, D]."""
    if not heads or x.shape[2] % heads:
        raise refuse(f"{heads} heads of {x.shape[2]} numbers")
    return permute(b, b.reshape(x, [*x.shape[:2], heads, x.shape[2] // heads]), [0, 2, 1, 3])


def _rotary(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    """Rotation of [B, H, L, D], or of [B, L, H D], by half tables [B, L, D/2], or [P, D/2] and positions."""
    x, cos, sin, positions = [*inputs, None][:4]
    x, cos, sin = given(x), given(cos), given(sin)
    flat = len(x.shape) == 3
    source = _heads(b, x, attributes.get("num_heads", 0)) if flat else x
    if positions is not None:
        cos, sin = (b.emit(aten.index.Tensor, table, [positions]) for table in (cos, sin))
    batch, heads, length, width = source.shape
    turned = attributes.get("rotary_embedding_dim", 0) or width
    interleaved = bool(attributes.get("interleaved", 0))
    tables = [_table(b, table, batch, length, turned, interleaved) for table in (cos, sin)]
    rows = b.reshape(permute(b, source, [0, 2, 1, 3]), [batch * length, heads, width])
    made = b.reshape(b.emit(xllm.rope.default, rows, *tables, turned, interleaved), [batch, length, heads, width])
    return [b.reshape(made, x.shape) if flat else permute(b, made, [0, 2, 1, 3])]


def _table(b: Builder, half: Value, batch: object, length: object, turned: int, interleaved: bool) -> Value:
    """[B L, R] with each number of [B, L, R/2] where both of its pair find it."""
    if tuple(map(str, half.shape)) != (str(batch), str(length), str(turned // 2)):
        half = b.emit(aten.expand.default, half, [batch, length, turned // 2])
    whole = (
        b.emit(aten.repeat_interleave.self_int, half, 2, -1)
        if interleaved
        else b.emit(aten.cat.default, [half, half], -1)
    )
    return b.reshape(whole, [batch * length, turned])  # pyright: ignore[reportOperatorIssue]  # sizes, ints or symbols


RULES: Mapping[str, Callable[[Builder, Inputs, Attributes, int], list[Value]]] = {
    "Attention": _attention, "RotaryEmbedding": _rotary,
}  # fmt: skip
