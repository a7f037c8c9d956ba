"""What each kernel should compute, in float64 numpy, and how tests hand arrays to a runner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.kernels import cpu
from xllm.kernels.cpu.packing import Quantised


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def bf16_round(x: np.ndarray) -> np.ndarray:
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32)


def int8_steps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row (last axis) under one scale, nearest even: int8 steps, and float32 [..., 1] what a step is worth."""
    scale = np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    with np.errstate(invalid="ignore"):
        return np.where(scale > 0, np.rint(x / scale), 0).astype(np.int8), scale


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of x when it is stored; of int8 with a scale for each row."""
    if dtype == "i8":
        steps, scale = int8_steps(x)
        return steps * scale.astype(np.float64)
    return bf16_round(x) if dtype in ("bf16", "bfloat16") else np.asarray(x, np.float32)


def kv_bytes(heads: int, width: int, dtype: str) -> int:
    """Of a group of tokens: `width` elements of each under every head; two float32 scales too where they are int8."""
    return heads * 16 * {"f32": 4 * width, "bf16": 2 * width, "i8": width + 8}[dtype]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [T, H, D]; cos, sin [T, R]."""
    rotary = cos.shape[-1]
    x = x.astype(np.float64)
    part, out = x[..., :rotary], x.copy()
    turned = np.empty_like(part)
    if interleaved:
        turned[..., 0::2], turned[..., 1::2] = -part[..., 1::2], part[..., 0::2]
    else:
        turned[..., : rotary // 2], turned[..., rotary // 2 :] = -part[..., rotary // 2 :], part[..., : rotary // 2]
    out[..., :rotary] = part * cos[:, None] + turned * sin[:, None]
    return out


def attention(q, k, v, positions, scale, window=0, softcap=0.0, sinks=None) -> np.ndarray:
    """One sequence: q [T, Hq, D]; k [L, Hkv, D] and v [L, Hkv, Dv] by absolute position.

    Row t sees tokens max(0, p - window + 1)..p, where p = positions[t].
    """
    share, out = q.shape[1] // k.shape[1], np.zeros((*q.shape[:2], v.shape[2]))
    for t, p in enumerate(positions):
        first = max(0, p - window + 1) if window else 0
        for h in range(q.shape[1]):
            scores = k[first : p + 1, h // share].astype(np.float64) @ q[t, h].astype(np.float64) * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            top = max(scores.max(), sinks[h] if sinks is not None else -math.inf)
            weights = np.exp(scores - top)
            total = weights.sum() + (math.exp(sinks[h] - top) if sinks is not None else 0.0)
            out[t, h] = weights @ v[first : p + 1, h // share] / total
    return out


_erf = np.vectorize(math.erf)

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "exp": np.exp,
    "erf": _erf,
    "neg": np.negative,
    "abs": np.abs,
    "cube": lambda x: x**3,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


def layer_norm(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return (x if weight is None else x * weight) + (0 if bias is None else bias)


def aligned(size: int, fill: int = 0, align: int = 4096) -> np.ndarray:
    """uint8[size] whose address is a multiple of `align`."""
    raw = np.full(size + align, fill, np.uint8)
    offset = -raw.ctypes.data % align
    return raw[offset : offset + size]


def pack(weight: np.ndarray, dtype: str) -> np.ndarray:
    packed = aligned(cpu.packed_bytes(weight.shape[0], weight.shape[1], dtype))
    return cpu.pack_panels(np.ascontiguousarray(weight, np.float32), dtype, packed)


def kind_of(storage: str) -> Quantised:
    kind = cpu.quantised(storage)
    assert kind is not None
    return kind


def unpacked(packed: np.ndarray, n: int, k: int, storage: str) -> np.ndarray:
    """float32 [n, k] of a packed int weight."""
    return unpacked_and_scales(packed, n, k, storage)[0]


def unpacked_and_scales(packed: np.ndarray, n: int, k: int, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k] of a packed int weight and of the scale of each, by the layout that simd/quantised.h describes."""
    kind = kind_of(storage)
    padded = kind.padded(k)
    group = kind.group or padded
    out, each = np.zeros((2, -(-n // 16) * 16, padded), np.float32)
    for panel, block in enumerate(packed.reshape(-1, kind.panel_bytes(k))):
        for index, part in enumerate(block.reshape(padded // group, -1)):
            scale, steps = part[:32].view(np.float16).astype(np.float32), part[32:]
            if kind.bits == 8:
                values = steps.view(np.int8).reshape(-1, 16, 2).transpose(1, 0, 2)
            else:
                both = steps.reshape(-1, 16, 4).astype(np.int8)
                values = (np.stack([both & 15, both >> 4 & 15], 1) - 8).transpose(2, 0, 1, 3)
            place = slice(panel * 16, panel * 16 + 16), slice(index * group, (index + 1) * group)
            out[place], each[place] = values.reshape(16, group) * scale[:, None], scale[:, None]
    return out[:n, :k], each[:n, :k]


def batch(
    lengths: Sequence[int], starts: Sequence[int] | None = None, spans: Sequence[np.ndarray] = (), ids=None, last=None
):
    """`lengths[n]` tokens of sequence n from absolute position `starts[n]` on."""
    starts = starts or [0] * len(lengths)
    total = sum(lengths)
    where = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    positions = np.concatenate(where).astype(np.int32) if total else np.zeros(0, np.int32)
    seq_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    spans = list(spans)[: len(lengths)] or [aligned(64)] * len(lengths)
    return cpu.Batch(
        np.zeros(total, np.int32) if ids is None else np.asarray(ids, np.int32),
        positions,
        np.arange(total, dtype=np.int32) if last is None else np.asarray(last, np.int32),
        seq_start,
        np.array([s.ctypes.data for s in spans], np.uint64),
    )


@dataclass(frozen=True)
class KernelRun:
    """Runs one kernel as a plan of its own."""

    runner: cpu.Runner

    def __call__(
        self,
        kernel: str,
        args: Mapping[str, np.ndarray | str | None],
        ints: Mapping[str, int],
        floats: Mapping[str, float] | None = None,
        step: cpu.Batch | None = None,
        rows: int | None = None,
        which: tuple[int, int, int] = cpu.TOKENS,
    ) -> None:
        bound = {k: v.ctypes.data if isinstance(v, np.ndarray) else v for k, v in args.items()}
        plan = self.runner.add_plan([cpu.Call(kernel, bound, ints, floats or {}, which)])
        self.runner.run(plan, step or batch([rows or 1]))
