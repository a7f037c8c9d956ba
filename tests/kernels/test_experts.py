"""experts and moe: right to float32 rounding, the same bits whatever rows stand beside a row, safe with any choice."""

import numpy as np
import pytest

from tests.kernels.oracle import ACTIVATIONS, KernelRun, aligned, kind_of, pack, relative_error, rounded, unpacked
from xllm.kernels import cpu

# Error against the weights as they are stored: integer weights take activations of 16 and of 8 bits.
LIMITS = {"float32": 2e-6, "bfloat16": 2e-6, "int8.32": 1e-4, "int8.row": 1e-4, "int4.32": 2e-2, "int4.row": 2e-2}
ACTS = ("silu", "gelu", "gelu_tanh", "relu")
WIDTH, EXPERTS, INNER = 40, 12, 24
ROUTERS = {  # scoring, groups, top_groups, group_top, renormalise
    "softmax": (0, 1, 1, 1, 0),
    "renormalised": (0, 1, 1, 1, 1),
    "sigmoid in groups": (1, 4, 2, 2, 1),
    "softmax in groups": (0, 3, 1, 1, 0),
    "softmax after": (2, 1, 1, 1, 0),
}
FORMS = [
    {"act": 0},
    {"act": 1},
    {"act": 2, "biased": False},
    {"act": 3, "gated": False},
    {"act": 0, "alpha": 1.702, "limit": 0.8, "shift": 1.0},
]
IMPOSSIBLE = [
    ({"top_k": 13}, "top_k"),
    ({"experts": 0}, "experts"),
    ({"act": 4}, "act"),
    ({"inner": 0}, "inner"),
    ({"groups": 5}, "groups"),
    ({"top_groups": 4, "groups": 3}, "top_groups"),
    ({"scoring": 3}, "scoring"),
    ({"group_top": 3}, "group_top"),
    ({"groups": 6, "top_groups": 1, "top_k": 3}, "top_k"),
]


class Experts:
    """Random experts as a kernel wants them, and what they compute in float64."""

    def __init__(self, rng, storage, *, gated=True, biased=True, act=0, alpha=1.0, limit=0.0, shift=0.0):
        name, _, group = storage.partition(".")
        self.suffix = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "int4": "i4"}[name]
        self.kind = kind_of(storage) if group else None
        self.gated, self.act, self.floats = gated, act, (alpha, limit, shift)
        shapes = {"gate": (EXPERTS, INNER, WIDTH), "up": (EXPERTS, INNER, WIDTH), "down": (EXPERTS, WIDTH, INNER)}
        self.args, self.held = {}, {}
        for name, shape in shapes.items():
            weight = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
            bias = rng.standard_normal(shape[:2], np.float32) if biased else np.zeros(shape[:2], np.float32)
            parts = [pack(part, storage) for part in weight]
            stored = [unpacked(part, *shape[1:], storage) for part in parts] if group else rounded(weight, storage)
            self.held[name] = np.asarray(stored, np.float64), bias
            used = gated or name != "gate"
            packed = aligned(sum(part.size for part in parts))
            packed[:] = np.concatenate(parts)
            self.args[name] = packed if used else None
            self.args[f"{name}_bias"] = bias if biased and used else None

    def __call__(self, x, index, weights):
        alpha, limit, shift = self.floats
        out = np.zeros(x.shape)
        for t, row in enumerate(x.astype(np.float64)):
            for e, weight in zip(index[t], weights[t], strict=True):
                if not 0 <= e < EXPERTS:
                    continue
                gate, up = (self.held[name][0][e] @ row + self.held[name][1][e] for name in ("gate", "up"))
                if limit:
                    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                act = {**ACTIVATIONS, "relu": lambda x: np.maximum(x, 0)}[ACTS[self.act]]
                inner = act(alpha * gate) / alpha * (up + shift) if self.gated else act(up)
                out[t] += weight * (self.held["down"][0][e] @ inner + self.held["down"][1][e])
        return out

    def run(self, run, x, index, weights):
        top_k, out = index.shape[1], np.full_like(x, np.nan)
        args = {"x": x, "index": index, "weights": weights, **self.args, "out": out, **self._scratch(len(x), top_k)}
        run(f"experts.{self.suffix}", args, self._ints(top_k), self._floats(), rows=len(x))
        return out

    def route(self, run, x, router, bias, correction, top_k, how, scale=1.0, epsilon=1e-20):
        """Result, chosen experts and their weights."""
        out, logits = np.full_like(x, np.nan), np.full((len(x), EXPERTS), np.nan, np.float32)
        index, weights = np.full((len(x), top_k), -1, np.int32), np.full((len(x), top_k), np.nan, np.float32)
        args = {
            "x": x, "scratch_index": index, "scratch_weights": weights, **self.args, "out": out, "router": router,
            "router_bias": bias, "correction": correction, "scratch_logits": logits, **self._scratch(len(x), top_k),
        }  # fmt: skip
        ints = dict(zip(("scoring", "groups", "top_groups", "group_top", "renormalise"), how, strict=True))
        floats = {**self._floats(), "epsilon": epsilon, "scale": scale}
        run(f"moe.{self.suffix}", args, {**self._ints(top_k), **ints}, floats, rows=len(x))
        return out, index, weights

    def _ints(self, top_k):
        group = {"group": self.kind.group} if self.kind else {}
        return {"width": WIDTH, "experts": EXPERTS, "inner": INNER, "top_k": top_k, "act": self.act, **group}

    def _floats(self):
        return dict(zip(("alpha", "limit", "shift"), self.floats, strict=True))

    def _scratch(self, rows, top_k):
        pairs = rows * top_k
        return {
            "scratch_pairs": np.zeros(2 * pairs + 2 + 2 * EXPERTS, np.int32),
            "scratch_hidden": np.full((pairs, INNER), np.nan, np.float32),
            "scratch_rows": aligned(rows * self.kind.row_bytes(WIDTH)) if self.kind else None,
            "scratch_hidden_rows": aligned(pairs * self.kind.row_bytes(INNER)) if self.kind else None,
        }


def _choice(rng, rows, top_k):
    index = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :top_k].astype(np.int64)
    return np.ascontiguousarray(index), rng.random((rows, top_k), np.float32)


@pytest.mark.parametrize("storage", LIMITS)
@pytest.mark.parametrize("form", FORMS)
def test_experts_match_float64(run, rng, storage, form):
    experts = Experts(rng, storage, **form)
    for rows in (1, 7, 230):
        x, (index, weights) = rng.standard_normal((rows, WIDTH), np.float32), _choice(rng, rows, 3)
        assert relative_error(experts.run(run, x, index, weights), experts(x, index, weights)) < LIMITS[storage]


@pytest.mark.parametrize("storage", ["float32", "int8.32", "int4.32"])
@pytest.mark.parametrize("router", ROUTERS)
def test_moe_matches_float64(run, rng, router, storage):
    how = ROUTERS[router]
    experts = Experts(rng, storage)
    weight, bias = rng.standard_normal((EXPERTS, WIDTH), np.float32), rng.standard_normal(EXPERTS, np.float32)
    correction = rng.standard_normal(EXPERTS, np.float32) if how[0] == 1 else None
    packed = pack(weight, "float32")
    for rows in (1, 50):
        x = rng.standard_normal((rows, WIDTH), np.float32)
        out, index, weights = experts.route(run, x, packed, bias, correction, 2, how, scale=2.5)
        wanted = [_route(x[t] @ weight.T.astype(np.float64) + bias, correction, 2, how) for t in range(rows)]
        assert np.array_equal(index, [row for row, _ in wanted])
        assert np.allclose(weights, [2.5 * row for _, row in wanted], rtol=1e-5)
        assert relative_error(out, experts(x, index, weights)) < LIMITS[storage]


def test_an_epsilon_below_zero_bounds_the_sum(run, rng):
    experts, x = Experts(rng, "float32"), rng.standard_normal((20, WIDTH), np.float32)
    router, how = pack(rng.standard_normal((EXPERTS, WIDTH), np.float32), "float32"), ROUTERS["softmax"]
    plain = experts.route(run, x, router, None, None, 2, how)[2]
    got = experts.route(run, x, router, None, None, 2, (*how[:-1], 1), epsilon=-0.9)[2]
    sums = plain.sum(1, keepdims=True)
    assert (sums < 0.9).any() and (sums > 0.9).any()
    assert np.allclose(got, plain / np.maximum(sums, 0.9), rtol=1e-6)


def _route(logits, correction, top_k, how):
    scoring, groups, top_groups, group_top, renormalise = how
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    scores = (softmax, 1 / (1 + np.exp(-logits)), logits)[scoring]
    choice = scores + (0 if correction is None else correction)
    grouped = choice.reshape(groups, -1)
    best = np.argsort(-np.sort(grouped)[:, -group_top:].sum(1))[:top_groups]
    allowed = np.isin(np.arange(groups), best)[:, None].repeat(grouped.shape[1], 1).reshape(-1)
    index = np.argsort(-np.where(allowed, choice, -np.inf), kind="stable")[:top_k]
    weights = scores[index]
    if scoring == 2:
        weights = np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
    return index, weights / weights.sum() if renormalise else weights


@pytest.mark.parametrize("storage", LIMITS)
def test_bits_do_not_depend_on_rows_or_threads(run, rng, storage):
    experts = Experts(rng, storage)
    router, x = (
        pack(rng.standard_normal((EXPERTS, WIDTH), np.float32), "float32"),
        rng.standard_normal((210, WIDTH), np.float32),
    )
    whole, _, _ = experts.route(run, x, router, None, None, 3, ROUTERS["renormalised"])
    for rows in (1, 2, 13, 100):
        part, _, _ = experts.route(run, np.ascontiguousarray(x[-rows:]), router, None, None, 3, ROUTERS["renormalised"])
        assert np.array_equal(part, whole[-rows:])
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(
            experts.route(KernelRun(alone), x, router, None, None, 3, ROUTERS["renormalised"])[0], whole
        )


def test_equal_scores_choose_the_first(run, rng):
    experts, x = Experts(rng, "float32"), rng.standard_normal((3, WIDTH), np.float32)
    _, index, _ = experts.route(run, x, pack(np.zeros((EXPERTS, WIDTH)), "float32"), None, None, 3, ROUTERS["softmax"])
    assert index.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("router", ROUTERS)
def test_a_poisoned_row_stays_alone(run, rng, router):
    experts, x = Experts(rng, "float32"), rng.standard_normal((9, WIDTH), np.float32)
    packed = pack(rng.standard_normal((EXPERTS, WIDTH), np.float32), "float32")
    clean, _, _ = experts.route(run, x, packed, None, None, 2, ROUTERS[router])
    x[4] = np.nan
    spoiled, index, _ = experts.route(run, x, packed, None, None, 2, ROUTERS[router])
    assert np.isnan(spoiled[4]).all() and ((index >= 0) & (index < EXPERTS)).all()
    assert np.array_equal(np.delete(spoiled, 4, 0), np.delete(clean, 4, 0))


def test_a_choice_of_no_expert_adds_nothing(run, rng):
    experts, x = Experts(rng, "float32"), rng.standard_normal((4, WIDTH), np.float32)
    index, weights = _choice(rng, 4, 2)
    index[0], index[1, 0], index[2, 1] = EXPERTS, -1, 1 << 40
    got = experts.run(run, x, index, weights)
    assert relative_error(got, experts(x, index, weights)) < 2e-6 and not got[0].any()


@pytest.mark.parametrize(("changed", "why"), IMPOSSIBLE)
def test_impossible_sizes_are_refused(run, changed, why):
    ints = {"width": 8, "experts": 12, "inner": 8, "top_k": 2, "act": 0, "scoring": 0, "groups": 1, "top_groups": 1}
    info = cpu.kernels()["moe.f32"]
    args = {arg.name: aligned(64) for arg in info.args}
    with pytest.raises(cpu.KernelError, match=why):
        run("moe.f32", args, {**ints, "group_top": 1, "renormalise": 0, **changed}, dict.fromkeys(info.floats, 1.0))
