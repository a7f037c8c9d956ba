"""attention, and the KV write before it.

Right, blind to what a row must not see, and the same bits under any cut of a prompt.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, aligned, attention, batch, bf16_round, kv_bytes, relative_error, rounded
from xllm.kernels import cpu

LAYER_OFFSET = 256  # bytes: a layer that is not the first
SUFFIXES = ("f32", "bf16", "i8")
# Error against float64; rounded, a weight halfway between two may become either.
KERNELS = {"attention": 1e-6, "attention_rounded": 2e-4}


class Model:
    """One layer's shape, a span per sequence, and the two calls that fill and read it."""

    def __init__(self, run, q_heads, kv_heads, dim, suffix, tokens, spans=1, value_dim=0, **options):
        self.run, self.q_heads, self.kv_heads, self.dim, self.suffix = run, q_heads, kv_heads, dim, suffix
        self.value_dim, self.part_count, self.kernel = value_dim or dim, 64, options.pop("kernel", "attention")
        self.options = {"window": 0, "softcap": 0.0, "sinks": None} | options
        self.scale = 1 / math.sqrt(dim)
        self.group_bytes = LAYER_OFFSET + kv_bytes(kv_heads, dim + self.value_dim, suffix) + 128
        # 0xff everywhere: memory that was never written is NaN, and must not matter.
        self.spans = [aligned(self.group_bytes * (tokens // 16 + 1), 0xFF) for _ in range(spans)]

    def step(self, q, k, v, lengths, starts):
        """Writes k, v [T, Hkv, D] and attends with q [T, Hq, D]; rows of all sequences together."""
        step = batch(lengths, starts, self.spans)
        shape = {"layer_offset": LAYER_OFFSET, "group_bytes": self.group_bytes, "kv_heads": self.kv_heads}
        shape |= {"key_dim": self.dim, "value_dim": self.value_dim}
        out = np.full((*q.shape[:2], self.value_dim), np.nan, np.float32)
        parts = self.parts(self.value_dim)
        self.run(f"kv_write.{self.suffix}", {"k": k, "v": v}, shape, step=step)
        self.run(
            f"{self.kernel}.{self.suffix}",
            {"q": q, "sinks": self.options["sinks"], "out": out, "scratch_parts": parts},
            shape | {"q_heads": self.q_heads, "window": self.options["window"], "parts": len(parts)},
            {"scale": self.scale, "softcap": self.options["softcap"]},
            step=step,
        )
        return out

    def parts(self, value_dim):
        """Room for the chunks of a step of few rows."""
        return np.full((self.part_count, self.q_heads, (value_dim + 15) // 16 * 16 + 16), np.nan, np.float32)

    def oracle(self, q, k, v, start=0):
        k, v = rounded(k, self.suffix), rounded(v, self.suffix)
        if self.kernel == "attention_rounded":
            return self.rounded_oracle(q, k, v, start)
        return attention(q, k, v, range(start, start + len(q)), self.scale, **self.options)

    def rounded_oracle(self, q, k, v, start):
        """Queries, and the weights exp(score - maximum of the block of 64 tokens), rounded to bf16; so are k and v of
        float32. Weights are sums' as they were, those of int8 values meet their scales first."""
        window, softcap, sinks = (self.options[name] for name in ("window", "softcap", "sinks"))
        share, out = self.q_heads // self.kv_heads, np.zeros((*q.shape[:2], self.value_dim))
        q = bf16_round(q * np.float32(self.scale)).astype(np.float64)
        worth = np.ones(v.shape[:2], np.float32)
        if self.suffix == "i8":
            worth = np.abs(v).max(-1).astype(np.float32) / np.float32(127)
            v = np.rint(v / worth[..., None])
        elif self.suffix == "f32":
            k, v = bf16_round(k), bf16_round(v)
        for t, h in np.ndindex(out.shape[:2]):
            p, kv = start + t, h // share
            first = max(0, p - window + 1) if window else 0
            parts: list[Any] = [(sinks[h], 1.0, 0.0)] if sinks is not None else []
            for at in range(first // 64 * 64, p + 1, 64):
                seen = slice(max(first, at), min(p + 1, at + 64))
                scores = k[seen, kv].astype(np.float64) @ q[t, h]
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                weights = np.exp(scores - scores.max())
                met = bf16_round((weights * worth[seen, kv]).astype(np.float32)).astype(np.float64)
                parts.append((scores.max(), weights.sum(), met @ v[seen, kv].astype(np.float64)))
            top = max(part[0] for part in parts)
            total = sum(part[1] * math.exp(part[0] - top) for part in parts)
            out[t, h] = sum(part[2] * math.exp(part[0] - top) for part in parts) / total
        return out


def inputs(rng, tokens, q_heads, kv_heads, dim, value_dim=0):
    shapes = ((tokens, q_heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, value_dim or dim))
    return [rng.standard_normal(s, np.float32) for s in shapes]


SHAPES = [
    pytest.param(4, 4, 64, {}, id="multi-head"),
    pytest.param(4, 2, 128, {}, id="grouped"),
    pytest.param(7, 1, 24, {}, id="one-kv-head-odd-dim"),
    pytest.param(2, 2, 5, {}, id="tiny-dim"),
    pytest.param(4, 2, 48, {"value_dim": 32, "window": 19}, id="values-shorter-than-keys"),
    pytest.param(3, 3, 24, {"value_dim": 72}, id="values-longer-than-keys"),
    pytest.param(2, 2, 20, {"value_dim": 7}, id="odd-values"),
    pytest.param(6, 2, 21, {"value_dim": 32, "window": 33}, id="odd-keys-window-33"),
    pytest.param(6, 2, 21, {"value_dim": 40}, id="odd-keys"),
    pytest.param(4, 2, 32, {"window": 1}, id="window-1"),
    pytest.param(4, 2, 32, {"window": 19}, id="window-19"),
    pytest.param(4, 2, 32, {"window": 100}, id="window-100"),
    pytest.param(4, 2, 32, {"softcap": 3.0}, id="softcap"),
    pytest.param(4, 2, 32, {"sinks": np.array([0.5, -2, 4, 30], np.float32)}, id="sinks"),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim", "options"), SHAPES)
def test_matches_float64_and_bits_do_not_depend_on_the_cut(run, rng, kernel, suffix, q_heads, kv_heads, dim, options):
    tokens = 150
    q, k, v = inputs(rng, tokens, q_heads, kv_heads, dim, options.get("value_dim", 0))
    model = Model(run, q_heads, kv_heads, dim, suffix, tokens, spans=4, kernel=kernel, **options)
    whole = model.step(q, k, v, [tokens], [0])
    assert relative_error(whole, model.oracle(q, k, v)) < KERNELS[kernel]

    model.spans = model.spans[1:]
    cuts = [0, 5, 6, 23, 64, 70, 133, tokens]
    chunks = [model.step(q[a:b].copy(), k[a:b].copy(), v[a:b].copy(), [b - a], [a]) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(chunks), whole)

    model.spans = model.spans[1:]
    alone = KernelRun(cpu.Runner(1, run.runner.level))
    model.run = alone
    rows = [model.step(q[t : t + 1], k[t : t + 1], v[t : t + 1], [1], [t]) for t in range(tokens)]
    alone.runner.close()
    assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sequences_of_a_batch_do_not_meet(run, rng, suffix):
    lengths, starts = [1, 40, 17, 1], [90, 0, 51, 0]
    model = Model(run, 6, 2, 48, suffix, 128, spans=4)
    past = [inputs(rng, start, 6, 2, 48) for start in starts]
    for n, (q, k, v) in enumerate(past):
        if starts[n]:
            model.step(q, k, v, [0] * n + [starts[n]] + [0] * (3 - n), [0] * 4)
    now = [inputs(rng, length, 6, 2, 48) for length in lengths]
    q, k, v = (np.concatenate(parts) for parts in zip(*now, strict=True))
    out = model.step(q, k, v, lengths, starts)
    row = 0
    for n, length in enumerate(lengths):
        k, v = (np.concatenate([past[n][i], now[n][i]]) for i in (1, 2))
        assert relative_error(out[row : row + length], model.oracle(now[n][0], k, v, starts[n])) < 1e-6
        row += length


def test_long_context_with_far_apart_scores(run, rng):
    """Large scores in a late block: the running sums are rescaled, nothing overflows."""
    tokens = 700
    q, k, v = inputs(rng, tokens, 2, 1, 32)
    k[640:] *= 40
    model = Model(run, 2, 1, 32, "f32", tokens)
    got = model.step(q, k, v, [tokens], [0])
    assert np.isfinite(got).all()
    assert relative_error(got, model.oracle(q, k, v)) < 1e-5


LONG = [
    pytest.param({}, id="all"),
    pytest.param({"window": 700}, id="window"),
    pytest.param({"sinks": np.array([0.5, -2], np.float32)}, id="sinks"),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("options", LONG)
def test_chunks_as_units_give_the_same_bits(run, rng, kernel, suffix, options):
    """One row of a long context: its chunks as units, merged after; or in turn by one thread; or within the prompt."""
    tokens = 1600
    q, k, v = inputs(rng, tokens, 2, 1, 32)
    model = Model(run, 2, 1, 32, suffix, tokens, kernel=kernel, **options)
    whole = model.step(q, k, v, [tokens], [0])
    assert relative_error(whole, model.oracle(q, k, v)) < KERNELS[kernel]
    for row in (0, 511, 512, 1023, 1300, tokens - 1):
        for model.part_count in (64, 1):
            one = model.step(q[row : row + 1], k[row : row + 1], v[row : row + 1], [1], [row])
            assert np.array_equal(one[0], whole[row]), (row, model.part_count)


def test_chunks_of_several_sequences_do_not_meet(run, rng):
    starts, tokens = [1500, 3, 700], 1600
    model = Model(run, 4, 1, 16, "bf16", tokens, spans=3)
    past = [inputs(rng, start + 1, 4, 1, 16) for start in starts]
    alone = []
    for n, (q, k, v) in enumerate(past):
        one = Model(run, 4, 1, 16, "bf16", tokens)
        one.spans = model.spans[n : n + 1]
        alone.append(one.step(q, k, v, [len(q)], [0])[-1])
    q, k, v = (np.concatenate([held[i][-1:] for held in past]) for i in range(3))
    assert np.array_equal(model.step(q, k, v, [1, 1, 1], starts), np.array(alone))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("poison", [(np.nan, np.inf), (1.0, -np.inf)], ids=["key and value", "value"])
def test_a_poisoned_token_reaches_only_those_who_see_it(run, rng, kernel, suffix, poison):
    q, k, v = inputs(rng, 80, 4, 2, 32)
    clean = Model(run, 4, 2, 32, suffix, 80, window=30, kernel=kernel).step(q, k, v, [80], [0])
    k[37], v[37] = poison
    spoiled = Model(run, 4, 2, 32, suffix, 80, window=30, kernel=kernel).step(q, k, v, [80], [0])
    sees = np.arange(80)
    sees = (sees >= 37) & (sees < 37 + 30)
    assert np.array_equal(spoiled[~sees], clean[~sees])
    assert not np.isfinite(spoiled[sees]).any()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rounding_is_an_error_of_bf16(run, rng, suffix):
    """Larger than float32's, below half a percent: of weights and queries, and of keys and values of float32."""
    q, k, v = inputs(rng, 200, 4, 2, 128)
    model = Model(run, 4, 2, 128, suffix, 200, kernel="attention_rounded")
    got = model.step(q, k, v, [200], [0])
    model.kernel = "attention"
    assert 1e-4 < relative_error(got, model.oracle(q, k, v)) < 5e-3


class LatentModel(Model):
    """One layer that keeps [latent | rope] as the keys of one head, and no values. k is that key; v goes unused."""

    def __init__(self, run, q_heads, latent, rope, suffix, tokens, spans=1, **options):
        super().__init__(run, q_heads, 1, latent + rope, suffix, tokens, spans, latent, **options)
        self.latent, self.rope = latent, rope
        self.group_bytes = LAYER_OFFSET + kv_bytes(1, self.dim, suffix)
        self.spans = [aligned(self.group_bytes * (tokens // 16 + 1), 0xFF) for _ in range(spans)]

    def step(self, q, k, v, lengths, starts):
        step = batch(lengths, starts, self.spans)
        place = {"layer_offset": LAYER_OFFSET, "group_bytes": self.group_bytes}
        key, parts = k[:, 0], {"latent_dim": self.latent, "rope_dim": self.rope}
        halves = {"latent": key[:, : self.latent].copy(), "rope": key[:, self.latent :].copy()}
        self.run(f"latent_write.{self.suffix}", halves, place | parts, step=step)
        query = {"q_latent": q[..., : self.latent].copy(), "q_rope": q[..., self.latent :].copy()}
        out = np.full((*q.shape[:2], self.latent), np.nan, np.float32)
        shape = {"q_heads": self.q_heads, "kv_heads": 1, "key_dim": self.dim, "value_dim": self.latent}
        self.run(
            f"latent_attention.{self.suffix}",
            query | {"out": out, "scratch_parts": (parts := self.parts(self.latent))},
            place | shape | {"window": self.options["window"], "parts": len(parts)},
            {"scale": self.scale, "softcap": self.options["softcap"]},
            step=step,
        )
        return out

    def oracle(self, q, k, v, start=0):
        k = np.concatenate([rounded(part, self.suffix) for part in np.split(k, [self.latent], axis=-1)], axis=-1)
        return attention(q, k, k[..., : self.latent], range(start, start + len(q)), self.scale, **self.options)


LATENTS = [
    pytest.param(16, 64, 16, {}, id="as in DeepSeek"),
    pytest.param(5, 24, 6, {"window": 21}, id="odd-window"),
    pytest.param(70, 33, 4, {"softcap": 3.0}, id="many-heads-softcap"),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("heads", "latent", "rope", "options"), LATENTS)
def test_latent_keys_give_the_values(run, rng, suffix, heads, latent, rope, options):
    tokens, cuts = 100, [0, 1, 6, 23, 64, 99, 100]
    q, k, _ = inputs(rng, tokens, heads, 1, latent + rope)
    model = LatentModel(run, heads, latent, rope, suffix, tokens, spans=2, **options)
    whole = model.step(q, k, None, [tokens], [0])
    assert relative_error(whole, model.oracle(q, k, None)) < 1e-6
    model.spans = model.spans[1:]
    chunks = [model.step(q[a:b].copy(), k[a:b].copy(), None, [b - a], [a]) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(chunks), whole)


def test_chunks_of_latent_keys_give_the_same_bits(run, rng):
    tokens = 1100
    q, k, _ = inputs(rng, tokens, 16, 1, 40)
    model = LatentModel(run, 16, 32, 8, "bf16", tokens)
    whole = model.step(q, k, None, [tokens], [0])
    for row in (400, 600, tokens - 1):
        one = model.step(q[row : row + 1].copy(), k[row : row + 1].copy(), None, [1], [row])
        assert np.array_equal(one[0], whole[row])


def test_latent_keys_of_sequences_of_a_batch_do_not_meet(run, rng):
    lengths, tokens = [19, 1, 40], 60
    q, k, _ = inputs(rng, tokens, 6, 1, 40)
    model = LatentModel(run, 6, 32, 8, "f32", tokens, spans=3)
    out = model.step(q, k, None, lengths, [0, 0, 0])
    starts = np.cumsum([0, *lengths])
    for begin, end in pairwise(starts):
        part = model.oracle(q[begin:end], k[begin:end], None)
        assert relative_error(out[begin:end], part) < 1e-6
