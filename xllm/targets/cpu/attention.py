"""Attention over the KV state, and what stands between a projection and it."""

from __future__ import annotations

from collections.abc import Mapping

from xllm.targets.base import TOKENS, Cost, KVLayout, Lowering, Operation, Refusal
from xllm.targets.cpu.rules import ELEMENT_BYTES, PLAIN, SUFFIX, Reach, Rule, every_token, ints, kv_place


def _rope(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    x = op.args["x"]
    if not every_token(x) or len(x.shape) != 3:
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
        cost=Cost(TOKENS.times(6 * x.width), TOKENS.times(8 * x.width)),
    )


def _kv_write(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    k, v = op.args["k"], op.args["v"]
    heads, key_dim = ints(k.shape[1:])
    if v.shape[2] != key_dim:
        return Refusal(f"keys are {key_dim} wide and values {v.shape[2]}")
    return Lowering(
        f"kv_write.{SUFFIX[kv.dtype]}",
        {"k": k, "v": v},
        {**kv_place(op, kv), "kv_heads": heads, "head_dim": key_dim},
        cost=Cost(bytes=TOKENS.times(2 * heads * key_dim * (4 + ELEMENT_BYTES[kv.dtype]))),
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


def _attention(op: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal:
    q, sinks = op.args["q"], op.args["sinks"]
    heads, head_dim = ints(q.shape[1:])
    if op.args["value_dim"] != head_dim:
        return Refusal(f"keys are {head_dim} wide and values {op.args['value_dim']}")
    return Lowering(
        f"attention.{SUFFIX[kv.dtype]}",
        {"q": q, "sinks": sinks, "out": op.results[0]},
        {
            **kv_place(op, kv),
            "q_heads": heads,
            "kv_heads": op.args["kv_heads"],
            "head_dim": head_dim,
            "window": op.args["window"],
        },
        {"scale": op.args["scale"], "softcap": op.args["softcap"]},
        layouts={sinks.name: PLAIN} if sinks is not None else {},
        # At a context of 256 tokens, a middle size: the plan does not know the context of a step.
        cost=Cost(TOKENS.times(4 * heads * head_dim * 256), TOKENS.times(2 * op.args["kv_heads"] * head_dim * 256)),
    )


def _rope_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    row, turned = 4 * sizes["heads"] * sizes["head_dim"], 4 * sizes["rotary_dim"]
    return {"x": row, "out": row, "cos": turned, "sin": turned}, {}


def _kv_write_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    return dict.fromkeys(("k", "v"), 4 * sizes["kv_heads"] * sizes["head_dim"]), {"state": _state_bytes(sizes, element)}


def _fused_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    head, turned = 4 * sizes["head_dim"], 4 * sizes["rotary_dim"]
    rows = {"qkv": (sizes["q_heads"] + 2 * sizes["kv_heads"]) * head, "q_out": sizes["q_heads"] * head}
    once = {"q_norm": head, "k_norm": head, "state": _state_bytes(sizes, element)}
    return {**rows, "cos": turned, "sin": turned}, once


def _attention_reach(sizes: Mapping[str, int], element: int) -> tuple[dict[str, int], dict[str, int]]:
    heads = sizes["q_heads"]
    once = {"sinks": 4 * heads, "state": _state_bytes(sizes, element)}
    return dict.fromkeys(("q", "out"), 4 * heads * sizes["head_dim"]), once


def _state_bytes(sizes: Mapping[str, int], element: int) -> int:
    """Bytes of one group of the layer's keys and values."""
    return 2 * sizes["kv_heads"] * sizes["head_dim"] * 16 * element


RULES: Mapping[str, Rule] = {
    "xllm.rope": _rope,
    "xllm.kv_write": _kv_write,
    "xllm.qk_norm_rope_write": _qk_norm_rope_write,
    "xllm.attention": _attention,
}
REACH: Mapping[str, Reach] = {
    "rope": _rope_reach,
    "kv_write": _kv_write_reach,
    "qk_norm_rope_write": _fused_reach,
    "attention": _attention_reach,
}
