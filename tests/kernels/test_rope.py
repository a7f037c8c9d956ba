"""rope, kv_write and the fused query/key kernel, which must give the bits of its parts."""

import numpy as np
import pytest

from tests.kernels.oracle import aligned, batch, bf16_bits, int8_steps, kv_bytes, relative_error, rms_norm, rope


def angles(rng, rows, rotary, interleaved):
    half = rng.uniform(-3, 3, (rows, rotary // 2)).astype(np.float32)
    full = np.repeat(half, 2, -1) if interleaved else np.concatenate([half, half], -1)
    return np.cos(full), np.sin(full)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("heads", "dim", "rotary"), [(3, 64, 64), (2, 80, 32), (1, 10, 6), (2, 128, 128), (2, 16, 0)])
def test_rope(run, rng, heads, dim, rotary, interleaved):
    x = rng.standard_normal((9, heads, dim), np.float32)
    cos, sin = angles(rng, 9, rotary, interleaved)
    out = np.full_like(x, np.nan)
    ints = {"heads": heads, "head_dim": dim, "rotary_dim": rotary, "interleaved": interleaved}
    cos, sin = (a if rotary else np.zeros((9, 1), np.float32) for a in (cos, sin))
    run("rope.f32", {"x": x, "cos": cos, "sin": sin, "out": out}, ints, rows=9)
    assert relative_error(out, rope(x, cos[:, :rotary], sin[:, :rotary], bool(interleaved))) < 2e-7


def read_span(span, group_bytes, offset, kv_heads, dim, suffix, tokens):
    """[tokens, kv_heads, dim] raw elements of K and V as the layout is documented; of int8, the scale behind them."""
    dtype = {"f32": np.uint32, "bf16": np.uint16, "i8": np.int8}[suffix]
    size, scales = kv_bytes(kv_heads, 2 * dim, suffix), 128 if suffix == "i8" else 0
    keys, values = [], []
    for token in range(tokens):
        begin = token // 16 * group_bytes + offset
        raw = span[begin : begin + size].reshape(kv_heads, -1)
        heads = np.ascontiguousarray(raw[:, scales:]).view(dtype).reshape(kv_heads, 2, dim * 16)
        keys.append(heads[:, 0].reshape(kv_heads, dim, 16)[:, :, token % 16])
        values.append(heads[:, 1].reshape(kv_heads, 16, dim)[:, token % 16])
        if scales:
            worth = np.ascontiguousarray(raw[:, :scales]).view(np.uint32).reshape(kv_heads, 2, 16)[:, :, token % 16]
            for kept, of in ((keys, worth[:, :1]), (values, worth[:, 1:])):
                kept[-1] = np.concatenate([kept[-1], of], axis=-1)
    return np.array(keys), np.array(values)


def bits(x, suffix):
    if suffix == "i8":
        steps, scale = int8_steps(x)
        return np.concatenate([steps, scale.view(np.uint32)], axis=-1)
    return x.view(np.uint32) if suffix == "f32" else bf16_bits(x)


@pytest.mark.parametrize("suffix", ["f32", "bf16", "i8"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("dim", "rotary", "interleaved"), [(64, 64, 0), (24, 12, 0), (32, 16, 1), (16, 0, 0)])
def test_fused_gives_the_bits_of_its_parts(run, rng, suffix, norm, dim, rotary, interleaved):
    q_heads, kv_heads, lengths, starts = 4, 2, [21, 3], [0, 30]
    rows, offset, group_bytes = sum(lengths), 64, 64 + kv_heads * dim * 32 * 4
    qkv = rng.standard_normal((rows, q_heads + 2 * kv_heads, dim), np.float32)
    weights = [rng.standard_normal(dim, np.float32) for _ in range(2)] if norm else [None, None]
    cos, sin = angles(rng, rows, rotary, interleaved) if rotary else (None, None)
    spans = [aligned(group_bytes * 3) for _ in lengths]
    step, q_out = batch(lengths, starts, spans), np.full((rows, q_heads, dim), np.nan, np.float32)
    ints = {"layer_offset": offset, "group_bytes": group_bytes, "q_heads": q_heads, "kv_heads": kv_heads}
    ints |= {"head_dim": dim, "rotary_dim": rotary, "interleaved": interleaved}
    args = {"qkv": qkv, "q_norm": weights[0], "k_norm": weights[1], "cos": cos, "sin": sin, "q_out": q_out}
    run(f"qk_norm_rope_write.{suffix}", args, ints, {"eps": 1e-6}, step=step)

    def parts(x, weight):
        x = np.ascontiguousarray(x)
        if weight is not None:
            flat, out = x.reshape(-1, dim), np.empty_like(x)
            norm_args = {"x": flat, "weight": weight, "out": out}
            run("rms_norm.f32", norm_args, {"width": dim}, {"eps": 1e-6}, rows=len(flat))
            assert relative_error(out, rms_norm(x, weight, 1e-6)) < 3e-7
            x = out
        if rotary:
            out, ints = np.empty_like(x), {"heads": x.shape[1], "head_dim": dim, "rotary_dim": rotary}
            rope_args = {"x": x, "cos": cos, "sin": sin, "out": out}
            run("rope.f32", rope_args, ints | {"interleaved": interleaved}, rows=rows)
            x = out
        return x

    assert np.array_equal(q_out, parts(qkv[:, :q_heads], weights[0]))
    key, value = parts(qkv[:, q_heads : q_heads + kv_heads], weights[1]), qkv[:, q_heads + kv_heads :]
    row = 0
    for span, length, start in zip(spans, lengths, starts, strict=True):
        keys, values = read_span(span, group_bytes, offset, kv_heads, dim, suffix, start + length)
        assert np.array_equal(keys[start:], bits(key[row : row + length], suffix))
        assert np.array_equal(values[start:], bits(value[row : row + length], suffix))
        row += length

    other = [aligned(group_bytes * 3) for _ in lengths]
    write = {"layer_offset": offset, "group_bytes": group_bytes, "kv_heads": kv_heads, "key_dim": dim, "value_dim": dim}
    step = batch(lengths, starts, other)
    run(f"kv_write.{suffix}", {"k": key, "v": np.ascontiguousarray(value)}, write, step=step)
    assert all(np.array_equal(a, b) for a, b in zip(spans, other, strict=True))


@pytest.mark.parametrize("kernel", ["kv_write", "latent_write"])
def test_int8_numbers_of_every_size(run, kernel):
    """Zeros, huge and tiny numbers, ties, and what is not finite: under a scale that is not a number, never hidden."""
    dim, group_bytes = 20, kv_bytes(1, 40, "i8")
    x = np.zeros((9, 1, dim), np.float32)
    x[1, 0, 3], x[2, 0, :2], x[3, 0, 7] = 3e38, (-1e-30, 5e-31), 1e-38
    x[4, 0], x[5, 0, :4] = np.linspace(-3, 3, dim), (127, 2.5, 3.5, -2.5)
    x[6, 0, 19], x[7, 0, 0], x[8, 0, 5] = np.nan, np.inf, -np.inf
    parts = (
        ("k", "v", "kv_heads", "key_dim", "value_dim")
        if kernel == "kv_write"
        else ("latent", "rope", "latent_dim", "rope_dim")
    )
    sizes = {name: 1 if name == "kv_heads" else dim for name in parts[2:]}
    span = aligned(group_bytes, 0xFF)
    place = {"layer_offset": 0, "group_bytes": group_bytes}
    run(f"{kernel}.i8", {parts[0]: x, parts[1]: x[::-1].copy()}, place | sizes, step=batch([9], [0], [span]))
    scales = span[:128].view(np.float32).reshape(2, 16)[:, :9]
    keys, rest = span[128 : 128 + 16 * dim].view(np.int8).reshape(dim, 16).T, span[128 + 16 * dim :].view(np.int8)
    rest = rest.reshape(16, dim) if kernel == "kv_write" else rest.reshape(dim, 16).T
    fine = x[:6, 0].copy()
    fine[3] = 0  # below 2^-100
    steps, worth = int8_steps(fine)
    for held, scale in ((keys[:9], scales[0]), (rest[:9][::-1], scales[1, ::-1])):
        assert np.array_equal(held[:6], steps) and np.array_equal(scale[:6], worth[:, 0])
        assert np.isnan(scale[6:]).all() and not held[6:].any()
    assert list(keys[5, :4]) == [127, 2, 4, -2]
