"""ONNX operators with weights: products, convolutions that cut patches, norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from xllm.frontend.onnx_build import Builder, Value
from xllm.frontend.onnx_file import refuse
from xllm.frontend.onnx_shapes import Attributes, Inputs, axis_of, given, permute
from xllm.ir.weight_rules import Permute, Reshape, Source

aten = torch.ops.aten
xllm = torch.ops.xllm


def _matmul(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    """A product with a stored matrix is a linear, whose weight lies the other way round."""
    one, other = (given(value) for value in inputs)
    if other.stored and len(other.shape) == 2 and len(one.shape) >= 2:
        return [b.emit(xllm.linear.default, one, _turned(b, other), None)]
    return [b.emit(aten.matmul.default, one, other)]


def _turned(b: Builder, value: Value) -> Any:
    shape = (value.shape[1], value.shape[0])
    return b.weight(value.stored, shape, Permute(Source((value.stored,)), (1, 0)))


def _gemm(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    one, other = given(inputs[0]), given(inputs[1])
    bias = inputs[2] if len(inputs) > 2 else None
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if attributes.get("transA", 0):
        one = permute(b, one, [1, 0])
    turned, plain = attributes.get("transB", 0), alpha == 1 and beta == 1
    if other.stored and plain and (bias is None or (bias.stored and len(bias.shape) == 1)):
        weight = b.node(other) if turned else _turned(b, other)
        width = other.shape[0] if turned else other.shape[1]
        if bias is None or bias.shape == (width,):
            return [b.emit(xllm.linear.default, one, weight, bias)]
    made = b.emit(
        aten.matmul.default,
        one,
        permute(b, Value(other.dtype, other.shape, b.node(other)), [1, 0]) if turned else other,
    )
    if alpha != 1:
        made = b.emit(aten.mul.Tensor, made, alpha)
    if bias is None:
        return [made]
    return [b.emit(aten.add.Tensor, made, b.emit(aten.mul.Tensor, bias, beta) if beta != 1 else bias)]


def _conv(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, weight, bias = given(inputs[0]), given(inputs[1]), inputs[2] if len(inputs) > 2 else None
    rank = len(x.shape) - 2
    kernel, stride = list(weight.shape[2:]), attributes.get("strides") or [1] * rank
    pads, dilation = attributes.get("pads") or [0] * (2 * rank), attributes.get("dilations") or [1] * rank
    groups, auto = attributes.get("group", 1), attributes.get("auto_pad", "NOTSET")
    if list(attributes.get("kernel_shape", kernel)) != kernel:
        raise refuse(f"kernel_shape {attributes['kernel_shape']} of weights {kernel}")
    if auto not in ("NOTSET", "VALID") or pads[:rank] != pads[rank:]:
        raise refuse(f"a convolution padded {auto if auto != 'NOTSET' else 'by ' + str(pads)}")
    cuts = kernel == list(stride) and not any(pads) and groups == 1 and set(dilation) == {1} and bool(weight.stored)
    if cuts and all(isinstance(size, int) for size in x.shape[1:]) and (bias is None or bias.stored):
        return [_patches(b, x, weight, bias, kernel)]
    return [
        b.emit(
            aten.convolution.default, x, weight, bias, list(stride), pads[:rank], dilation, False, [0] * rank, groups
        )
    ]


def _patches(b: Builder, x: Value, weight: Value, bias: Value | None, kernel: list[int]) -> Value:
    """A convolution whose windows do not overlap is a linear of patches."""
    batch, channels, *size = x.shape
    rank, count = len(kernel), [held // cut for held, cut in zip(size, kernel, strict=True)]
    for axis, (held, cut) in enumerate(zip(size, kernel, strict=True)):
        if held % cut:
            x = b.emit(aten.slice.Tensor, x, axis + 2, 0, held // cut * cut)
    for axis in range(rank - 2, -1, -1):  # one axis after the other: each move is along few, which kernels can do
        above = (
            batch * channels * math.prod(map(math.prod, zip(count[:axis], kernel[:axis], strict=True))) * count[axis]
        )
        inside = [above, kernel[axis], math.prod(count[axis + 1 :]), math.prod(kernel[axis + 1 :])]
        x = permute(b, b.reshape(x, inside), [0, 2, 1, 3])
    ordered = permute(b, b.reshape(x, [batch, channels, math.prod(count), math.prod(kernel)]), [0, 2, 1, 3])
    width, outputs = channels * math.prod(kernel), weight.shape[0]
    rows = b.reshape(ordered, [batch, math.prod(count), width])
    matrix = b.weight(weight.stored, (outputs, width), Reshape(Source((weight.stored,)), (outputs, width)))
    made = b.emit(xllm.linear.default, rows, matrix, bias)
    return b.reshape(permute(b, made, [0, 2, 1]), [batch, outputs, *count])


def _layer_norm(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, weight = given(inputs[0]), given(inputs[1])
    bias = inputs[2] if len(inputs) > 2 else None
    axis, eps = axis_of(attributes.get("axis", -1), len(x.shape)), _epsilon(attributes)
    axes = [at - len(x.shape) for at in range(axis, len(x.shape))]
    made = b.emit(aten.layer_norm.default, x, list(x.shape[axis:]), weight, bias, eps)
    spread = b.emit(aten.add.Tensor, b.emit(aten.var.correction, x, axes, correction=0, keepdim=True), eps)
    return [made, b.emit(aten.mean.dim, x, axes, True), b.emit(aten.rsqrt.default, spread)]


def _epsilon(attributes: Attributes) -> float:
    """What norms add; they are computed in float32, as ONNX does unless told otherwise."""
    if (stash := attributes.get("stash_type", 1)) != 1:
        raise refuse(f"stash_type {stash}", try_="1, float32")
    return attributes.get("epsilon", 1e-5)


def _rms_norm(b: Builder, inputs: Inputs, attributes: Attributes, opset: int) -> list[Value]:
    x, weight = given(inputs[0]), given(inputs[1])
    axis = axis_of(attributes.get("axis", -1), len(x.shape))
    eps = _epsilon(attributes)
    if axis == len(x.shape) - 1 and weight.shape == x.shape[-1:]:
        return [b.emit(xllm.rms_norm.default, x, weight, eps)]
    axes = [at - len(x.shape) for at in range(axis, len(x.shape))]
    mean = b.emit(aten.mean.dim, b.emit(aten.pow.Tensor_Scalar, x, 2), axes, True)
    normed = b.emit(aten.mul.Tensor, x, b.emit(aten.rsqrt.default, b.emit(aten.add.Tensor, mean, eps)))
    return [b.emit(aten.mul.Tensor, normed, weight)]


RULES: Mapping[str, Callable[[Builder, Inputs, Attributes, int], list[Value]]] = {
    "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm,
}  # fmt: skip
