"""Attention over the KV state, and what stands between a projection and it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from xllm.targets.base import TOKENS, Cost, KVLayout, Lowering, Operation, Refusal, Tensor, within
from xllm.targets.cpu.rules import (
    ELEMENT_BYTES,
    GROUP_TOKENS,
    PLAIN,
    SUFFIX,
    Reach,
    Rule,
    ints,
    kv_bytes,
    kv_place,
    last_dim,
)

# Chunks (of 512 tokens) that a step may hand out as units; with more its rows are computed whole, to the same bits.
_PARTS = 128


def _rope(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["x"]
    if x.kind != "value" or len(x.shape) != 3:
        return Refusal("it does not rotate [T, H, D]")
    heads, head_dim = ints(x.shape[1:])
    return Lowering(
        "rope.f32",
        {"x": x, "cos": op.args["cos"], "sin": op.args["sin"], "out": op.results[0]},
        {
            "heads": heads,
            "head_dim": head_dim,
            "rotary_dim": op.args["rotary_dim"],
            "interleaved": int(op.args["interleaved"]),
        },
        rows=x.rows,
        cost=Cost(x.rows.times(6 * x.width), x.rows.times(8 * x.width)),
    )


def _kv_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    k, v = op.args["k"], op.args["v"]
    (heads, key_dim), value_dim = ints(k.shape[1:]), last_dim(v)
    return Lowering(
        f"kv_write.{SUFFIX[kv.dtype]}",
        {"k": k, "v": v},
        {**kv_place(op, kv), "kv_heads": heads, "key_dim": key_dim, "value_dim": value_dim},
        cost=Cost(bytes=TOKENS.times(4 * heads * (key_dim + value_dim) + _kept(kv, heads, key_dim + value_dim))),
    )


def _latent_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    latent, rope = op.args["latent"], op.args["rope"]
    width = latent.width + rope.width
    return Lowering(
        f"latent_write.{SUFFIX[kv.dtype]}",
        {"latent": latent, "rope": rope},
        {**kv_place(op, kv), "latent_dim": latent.width, "rope_dim": rope.width},
        cost=Cost(bytes=TOKENS.times(4 * width + _kept(kv, 1, width))),
    )


def _qk_norm_rope_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    args, names = op.args, ("q_heads", "kv_heads", "head_dim", "rotary_dim")
    norms = {name: args[name] for name in ("q_norm", "k_norm")}
    width = args["qkv"].width
    return Lowering(
        f"qk_norm_rope_write.{SUFFIX[kv.dtype]}",
        {"qkv": args["qkv"], **norms, "cos": args["cos"], "sin": args["sin"], "q_out": op.results[0]},
        {**kv_place(op, kv), **{name: args[name] for name in names}, "interleaved": int(args["interleaved"])},
        {"eps": args["eps"]},
        layouts={norm.name: PLAIN for norm in norms.values() if norm is not None},
        cost=Cost(TOKENS.times(10 * width), TOKENS.times(8 * width)),
    )


def _attention(op: Operation, kv: KVLayout, weights_dtype: str, rounded: bool = False) -> Lowering | Refusal:
    q, sinks, kv_heads = op.args["q"], op.args["sinks"], op.args["kv_heads"]
    (heads, key_dim), value_dim = ints(q.shape[1:]), op.args["value_dim"]
    return Lowering(
        f"{'attention_rounded' if rounded else 'attention'}.{SUFFIX[kv.dtype]}",
        {"q": q, "sinks": sinks, "out": op.results[0], "scratch_parts": (parts := _parts(op, heads, value_dim))},
        {
            **kv_place(op, kv),
            "q_heads": heads,
            "kv_heads": kv_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "window": op.args["window"],
            "parts": _PARTS,
        },
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        layouts={sinks.name: PLAIN} if sinks is not None else {},
        cost=_attention_cost(op, heads, key_dim + value_dim, _kept(kv, kv_heads, key_dim + value_dim)),
        scratch=(parts,),
    )


def _latent_attention(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    latent, rope = op.args["q_latent"], op.args["q_rope"]
    (heads, value_dim), key_dim = ints(latent.shape[1:]), last_dim(latent) + last_dim(rope)
    return Lowering(
        f"latent_attention.{SUFFIX[kv.dtype]}",
        {
            "q_latent": latent,
            "q_rope": rope,
            "out": op.results[0],
            "scratch_parts": (parts := _parts(op, heads, value_dim)),
        },
        {
            **kv_place(op, kv),
            "q_heads": heads,
            "kv_heads": 1,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "window": op.args["window"],
            "parts": _PARTS,
        },
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        cost=_attention_cost(op, heads, key_dim + value_dim, _kept(kv, 1, key_dim)),
        scratch=(parts,),
    )


def _part_floats(value_dim: int) -> int:
    """Of a query head in a chunk: its values in whole sixteens, maximum, sum, and filling."""
    return -(-value_dim // 16) * 16 + 16


def _parts(op: Operation, heads: int, value_dim: int) -> Tensor:
    return Tensor(f"{op.node}.parts", "value", (_PARTS, heads * _part_floats(value_dim)), "float32")


def _kept(kv: KVLayout, heads: int, width: int) -> int:
    """Bytes of one token of a layer."""
    return kv_bytes(heads, width, ELEMENT_BYTES[kv.dtype]) // GROUP_TOKENS


def _attention_cost(op: Operation, heads: int, pair: int, token: int) -> Cost:
    """pair: multiply-adds of a query head with a token it sees; token: bytes kept of one. Queries and results move
    too."""
    window = op.args["window"]
    moved = within("K", window).times(token).plus(TOKENS.times(4 * heads * pair))
    return Cost(within("P", window).times(2 * heads * pair), moved)


def _rope_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    row, turned = 4 * sizes["heads"] * sizes["head_dim"], 4 * sizes["rotary_dim"]
    return {"x": row, "out": row, "cos": turned, "sin": turned}, {}


def _kv_write_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, key, value = sizes["kv_heads"], sizes["key_dim"], sizes["value_dim"]
    return {"k": 4 * heads * key, "v": 4 * heads * value}, {"state": kv_bytes(heads, key + value, element)}


def _latent_write_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    latent, rope = sizes["latent_dim"], sizes["rope_dim"]
    return {"latent": 4 * latent, "rope": 4 * rope}, {"state": kv_bytes(1, latent + rope, element)}


def _fused_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    head, turned = 4 * sizes["head_dim"], 4 * sizes["rotary_dim"]
    rows = {"qkv": (sizes["q_heads"] + 2 * sizes["kv_heads"]) * head, "q_out": sizes["q_heads"] * head}
    kept = kv_bytes(sizes["kv_heads"], 2 * sizes["head_dim"], element)
    once = {"q_norm": head, "k_norm": head, "state": kept}
    return {**rows, "cos": turned, "sin": turned}, once


def _attention_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, key, value = sizes["q_heads"], sizes["key_dim"], sizes["value_dim"]
    parts = 4 * sizes["parts"] * heads * _part_floats(value)
    once = {"sinks": 4 * heads, "scratch_parts": parts, "state": kv_bytes(sizes["kv_heads"], key + value, element)}
    return {"q": 4 * heads * key, "out": 4 * heads * value}, once


def _latent_attention_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads, key, value = sizes["q_heads"], sizes["key_dim"], sizes["value_dim"]
    rows = {"q_latent": 4 * heads * value, "q_rope": 4 * heads * (key - value), "out": 4 * heads * value}
    parts = 4 * sizes["parts"] * heads * _part_floats(value)
    return rows, {"scratch_parts": parts, "state": kv_bytes(sizes["kv_heads"], key, element)}


RULES: Mapping[str, Rule] = {
    "xllm.rope": _rope,
    "xllm.kv_write": _kv_write,
    "xllm.qk_norm_rope_write": _qk_norm_rope_write,
    "xllm.attention": _attention,
    "xllm.latent_write": _latent_write,
    "xllm.latent_attention": _latent_attention,
}
# Where rows are rounded, queries and the weights of values are to bfloat16.
ROUNDED: Mapping[str, Rule] = {"xllm.attention": partial(_attention, rounded=True)}
REACH: Mapping[str, Reach] = {
    "rope": _rope_reach,
    "kv_write": _kv_write_reach,
    "qk_norm_rope_write": _fused_reach,
    "attention": _attention_reach,
    "attention_rounded": _attention_reach,
    "latent_write": _latent_write_reach,
    "latent_attention": _latent_attention_reach,
}
