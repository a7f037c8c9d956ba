"""The native sampler against a float64 oracle that shares nothing with it but the paper of the random numbers."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from xllm.kernels.cpu import Runner
from xllm.kernels.cpu.sampling import NOTHING_ALLOWED, Sampler, SamplingError


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1234
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int | None = None
    logprobs_mode: str = "raw"
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


GREEDY = Params(temperature=0)
FEATURES = {
    "plain": Params(),
    "hot": Params(temperature=1.7),
    "cold": Params(temperature=0.3),
    "top_k": Params(top_k=5),
    "top_k_of_one": Params(top_k=1),
    "top_k_beyond_the_vocabulary": Params(top_k=10**12),
    "top_p": Params(top_p=0.8),
    "top_p_almost_one": Params(top_p=0.9999),
    "top_p_zero": Params(top_p=0.0),
    "min_p": Params(min_p=0.1),
    "min_p_one": Params(min_p=1.0),
    "presence": Params(presence_penalty=1.5),
    "frequency": Params(frequency_penalty=-0.7),
    "repetition": Params(repetition_penalty=1.9),
    "bias": Params(logit_bias={0: 4.0, 3: -100.0, 6: 2.5}),
    "min_tokens": Params(min_tokens=4),
    "greedy_with_penalties": Params(temperature=0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    "allowed": Params(allowed_token_ids=(0, 2, 4, 5)),
    "bad_words": Params(bad_words=((3,), (1, 0), (0, 0, 0), (5, 2, 6))),
    "everything": Params(0.8, 40, 0.9, 0.02, 2**63 + 7, 0.4, 0.3, 1.3, {1: 3.0, 5: -2.0}, 3, 4, bad_words=((6,),)),
}


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=2) as made:
        yield made


def philox(seed: int, index: int, position: int) -> float:
    counter, key = [position, 0, index, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (counter[1] << 32 | counter[0]) / 2**64


def distribution(row, p, prompt=(), generated=(), suppress=()):
    """What the next token is drawn from: float64[V] summing to 1."""
    x = row.astype(np.float64)
    for token in set(prompt) | set(generated):
        count = list(generated).count(token)
        x[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for word in p.bad_words:
        if list(word[:-1]) == list(generated)[len(generated) + 1 - len(word) :] and len(generated) >= len(word) - 1:
            x[word[-1]] = -np.inf
    if len(generated) < p.min_tokens:
        x[list(suppress)] = -np.inf
    if p.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), p.allowed_token_ids)] = -np.inf
    order = np.argsort(-x, kind="stable")
    keep = np.zeros(len(x), bool)
    if p.temperature == 0:
        keep[order[0]] = True
        return keep.astype(np.float64)
    e = np.exp((x - x.max()) / p.temperature)
    if p.top_k > 0:
        order = order[: p.top_k]
    if p.top_p < 1:
        held = np.cumsum(e[order]) / e[order].sum()
        order = order[: int(np.searchsorted(held, p.top_p)) + 1]
    keep[order] = True
    keep &= e >= p.min_p
    return np.where(keep, e, 0) / e[keep].sum()


def rows_of(seed, rows, vocab, spread=3.0):
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def sample(sampler, logits, slots):
    return sampler.sample(logits.ctypes.data, np.asarray(slots, np.int32))


def generate(sampler, slot, logits, start=0):
    """One token per row of logits [steps, V]; slot must be attached."""
    return [int(sample(sampler, logits[i], [slot]).tokens[0]) for i in range(start, len(logits))]


def test_the_oracle_draws_published_random_numbers():
    assert philox(0, 0, 0) == (0xE169C58D << 32 | 0x6627E8D5) / 2**64  # Random123, kat_vectors


@pytest.mark.parametrize("vocab", [7, 128, 1000])
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_draws_what_the_oracle_draws(runner, name, vocab):
    p, suppress = FEATURES[name], (2, 4)
    sampler = Sampler(runner, vocab, 4)
    prompt = [1, 1, 5, 6]
    for index in range(3):
        sampler.attach(2, p, prompt, [], index, suppress)
        logits, generated = rows_of(vocab + index, 12, vocab), []
        for row in logits:
            before = row.copy()
            token = int(sample(sampler, row, [2]).tokens[0])
            share = distribution(row, p, prompt, generated, suppress)
            u, edge = philox(p.seed, index, len(generated)), np.cumsum(share)
            assert share[token] > 0
            assert edge[token] - share[token] - 1e-5 <= u <= edge[token] + 1e-5 or p.temperature == 0
            assert np.array_equal(row.view(np.int32), before.view(np.int32))
            generated.append(token)


@pytest.mark.parametrize(
    "p",
    [
        Params(top_p=0.9),
        Params(top_p=0.999),
        Params(top_k=50),
        Params(top_k=6000),
        Params(top_k=9000, top_p=0.7),
        Params(min_p=0.001),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [20_011, 151_936])
def test_large_rows_keep_exactly_the_oracles_tokens(runner, p, vocab, spread):
    """Draws from every part of [0, 1) stay inside the kept set and follow its cumulative sum."""
    slots = 64
    sampler, row = Sampler(runner, vocab, slots), rows_of(5, 1, vocab, spread)[0]
    for slot in range(slots):
        sampler.attach(slot, p, [], [], slot)
    tokens = sample(sampler, np.tile(row, (slots, 1)), np.arange(slots)).tokens
    share = distribution(row, p)
    edge = np.cumsum(share)
    for slot, token in enumerate(tokens):
        u = philox(1234, slot, 0)
        assert share[token] > 0 and edge[token] - share[token] - 1e-5 <= u <= edge[token] + 1e-5


@pytest.mark.parametrize("vocab", [300, 20_000])
def test_ties_go_to_the_lowest_ids(runner, vocab):
    sampler, row = Sampler(runner, vocab, 64), np.zeros(vocab, np.float32)
    row[::2] = -0.0
    for p, kept in ((Params(top_k=10), 10), (Params(top_p=0.25), vocab // 4), (Params(top_k=100, top_p=0.5), 50)):
        for slot in range(64):
            sampler.attach(slot, replace(p, seed=slot), [])
        tokens = sample(sampler, np.tile(row, (64, 1)), range(64)).tokens
        assert tokens.max() < kept and tokens.max() > 0.9 * kept - 2
    sampler.attach(0, replace(GREEDY, logprobs=3), [])
    row[[40, 50]] = 1
    result = sample(sampler, row, [0])
    assert result.tokens[0] == 40 and result.top_ids[0].tolist() == [40, 50, 0]


@pytest.mark.parametrize(
    "p", [Params(top_p=1e-9), Params(top_p=0.0), Params(top_k=1), Params(min_p=1.0), Params(temperature=1e-30)]
)
def test_at_least_the_best_token_stays(runner, p):
    sampler, logits = Sampler(runner, 999, 32), rows_of(3, 32, 999)
    for slot in range(32):
        sampler.attach(slot, p, [])
    assert np.array_equal(sample(sampler, logits, range(32)).tokens, logits.argmax(1))


@pytest.mark.parametrize(
    "p",
    [Params(), Params(temperature=0.7, top_p=0.9), Params(top_k=12), Params(min_p=0.05, logit_bias={4: 2.0})],
    ids=str,
)
def test_frequencies_match_the_distribution(runner, p):
    vocab, slots, steps = 40, 256, 80
    sampler, row = Sampler(runner, vocab, slots), rows_of(11, 1, vocab, 1.5)[0]
    for slot in range(slots):
        sampler.attach(slot, replace(p, seed=slot), [])
    counts, logits = np.zeros(vocab), np.tile(row, (slots, 1))
    for _ in range(steps):
        counts += np.bincount(sample(sampler, logits, range(slots)).tokens, minlength=vocab)
    expected = distribution(row, p) * slots * steps
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square, freedom = float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_draw_does_not_know_its_batch(runner):
    """Alone, with others, in any row, on one thread or two: the same tokens and the same logprobs, bit by bit."""
    vocab, count, steps = 3001, 12, 6
    params = [replace(p, logprobs=3) for p in list(FEATURES.values())[-count:]]
    logits = rows_of(21, count * steps, vocab).reshape(steps, count, vocab)

    def attach_all(sampler):
        for slot, p in enumerate(params):
            sampler.attach(slot, replace(p, seed=slot), [slot, 7], [], slot, [9])

    def run(threads, order_of):
        with Runner(threads) as own:
            sampler = Sampler(own, vocab, count)
            attach_all(sampler)
            tokens = np.zeros((steps, count), np.int32)
            chances = np.zeros((steps, count), np.float32)
            for step in range(steps):
                for part in order_of(step):
                    result = sample(sampler, np.ascontiguousarray(logits[step, part]), part)
                    tokens[step, part], chances[step, part] = result.tokens, result.logprobs
            return tokens, chances

    alone = run(1, lambda _: [[slot] for slot in range(count)])
    shuffled = [np.random.default_rng(step).permutation(count) for step in range(steps)]
    together = run(2, lambda _: [range(count)])
    parts = run(2, lambda step: [shuffled[step][:5], shuffled[step][5:]])
    for other in (together, parts, run(1, lambda step: [shuffled[step]])):
        assert np.array_equal(alone[0], other[0])
        assert np.array_equal(alone[1].view(np.int32), other[1].view(np.int32))


def test_seed_index_and_position_each_change_the_draw(runner):
    sampler, row = Sampler(runner, 5000, 1), np.zeros(5000, np.float32)

    def first(seed=1, index=0, generated=()):
        sampler.attach(0, Params(seed=seed), [], generated, index)
        return int(sample(sampler, row, [0]).tokens[0])

    assert first() == first()
    seeds = {first(), first(seed=2), first(seed=2**32 + 1), first(seed=-1)}
    assert len(seeds | {first(index=1), first(generated=[3])}) == 6


@pytest.mark.parametrize("name", ["everything", "frequency", "min_tokens", "greedy_with_penalties", "bad_words"])
def test_resuming_continues_as_if_never_interrupted(runner, name):
    p, prompt, logits = FEATURES[name], [4, 9, 9], rows_of(31, 16, 200)
    sampler = Sampler(runner, 200, 2)
    sampler.attach(0, p, prompt, [], 3, [9])
    whole = generate(sampler, 0, logits)
    for cut in (1, 3, 10):
        sampler.attach(1, p, prompt, whole[:cut], 3, [9])
        assert generate(sampler, 1, logits, cut) == whole[cut:]


def test_penalties_count_every_repeat(runner):
    sampler = Sampler(runner, 4, 1)
    row = np.array([3.0, 2.5, 0.0, -9.0], np.float32)
    sampler.attach(0, replace(GREEDY, frequency_penalty=0.2), [0, 0, 0])
    assert generate(sampler, 0, np.tile(row, (6, 1))) == [0, 0, 0, 1, 0, 1]
    sampler.attach(0, replace(GREEDY, presence_penalty=1.0), [0])
    assert generate(sampler, 0, np.tile(row, (4, 1))) == [0, 1, 0, 0]
    sampler.attach(0, replace(GREEDY, repetition_penalty=2.0), [0])  # the prompt counts: 3 becomes 1.5
    assert generate(sampler, 0, np.tile(row, (3, 1))) == [1, 0, 0]


def test_min_tokens_holds_back_the_stop_ids(runner):
    sampler, row = Sampler(runner, 10, 1), np.arange(10, dtype=np.float32)
    sampler.attach(0, replace(GREEDY, min_tokens=3, logit_bias={9: 50.0}), [], [], 0, [9, 8])
    assert generate(sampler, 0, np.tile(row, (5, 1))) == [7, 7, 7, 9, 9]


def test_poisoned_rows_give_minus_one_and_leave_the_slot_alone(runner):
    vocab = 300
    good = rows_of(41, 1, vocab)[0]
    poisons = [np.full(vocab, -np.inf, np.float32)] + [good.copy() for _ in range(4)]
    for row, (at, value) in zip(poisons[1:], [(0, np.nan), (299, np.nan), (7, np.inf), (128, -np.nan)], strict=True):
        row[at] = value
    sampler = Sampler(runner, vocab, 2)
    p = replace(FEATURES["everything"], logprobs=2)
    for slot in (0, 1):
        sampler.attach(slot, p, [3])
    for row in poisons:
        result = sample(sampler, row, [0])
        assert result.tokens.tolist() == [-1] and np.isnan(result.logprobs[0]) and set(result.top_ids[0]) == {-1}
    assert generate(sampler, 0, np.tile(good, (5, 1))) == generate(sampler, 1, np.tile(good, (5, 1)))


@pytest.mark.parametrize("p", [Params(), Params(top_p=0.9), Params(top_k=50), Params(min_p=0.01), GREEDY], ids=str)
def test_masked_tokens_are_never_drawn(runner, p):
    vocab, slots = 700, 64
    row = np.full(vocab, -np.inf, np.float32)
    row[[5, 130, 699]] = [1.0, 1.2, 0.9]
    sampler = Sampler(runner, vocab, slots)
    for slot in range(slots):
        sampler.attach(slot, replace(p, seed=slot), [])
    assert set(sample(sampler, np.tile(row, (slots, 1)), range(slots)).tokens) <= {5, 130, 699}
    sampler.attach(0, replace(p, min_tokens=1), [], [], 0, [5, 130, 699])
    assert sample(sampler, row, [0]).tokens.tolist() == [NOTHING_ALLOWED]


@pytest.mark.parametrize("vocab", [3, 4000])
def test_logprobs_are_of_the_raw_distribution(runner, vocab):
    """Whatever the penalties, bias and filters; sorted; each row as wide as it asked, cells beyond that are empty."""
    logits = rows_of(51, 4, vocab, 5.0)
    exact = logits.astype(np.float64) - logits.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    p = Params(0.7, 2, 0.9, 0.0, 5, 1.0, 1.0, 1.5, {1: 5.0})
    sampler = Sampler(runner, vocab, 4, max_logprobs=3)
    for slot, wanted in enumerate((None, 0, 2, 3)):
        sampler.attach(slot, replace(p, logprobs=wanted), [0], [2])
    result = sample(sampler, logits, range(4))
    assert result.top_ids.shape == result.top_logprobs.shape == (4, 3)
    assert np.isnan(result.logprobs[0])
    for row, wanted in ((1, 0), (2, 2), (3, 3)):
        best = np.argsort(-logits[row], kind="stable")[:wanted]
        assert result.logprobs[row] == pytest.approx(exact[row, result.tokens[row]], abs=2e-6)
        assert result.top_ids[row].tolist() == [*best, *[-1] * (3 - wanted)]
        assert result.top_logprobs[row, :wanted] == pytest.approx(exact[row, best], abs=2e-6)
        assert np.isneginf(result.top_logprobs[row, wanted:]).all()


@pytest.mark.parametrize(
    ("field_name", "value"),
    [
        *[("temperature", bad) for bad in (math.nan, -0.1, math.inf, 1e300, "1")],
        *[("repetition_penalty", bad) for bad in (math.nan, -0.1, math.inf, 1e300, 0.0, 1e-40)],
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("top_p", 1.1),
        ("min_p", 1.1),
        ("top_k", 1.5),
        ("seed", None),
        ("seed", 2**64),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logit_bias", {50: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("allowed_token_ids", (50,)),
        ("bad_words", ((3, 50),)),
        ("bad_words", ((),)),
    ],
)
def test_attach_refuses_by_field(runner, field_name, value):
    sampler = Sampler(runner, 50, 1)
    with pytest.raises(SamplingError) as caught:
        sampler.attach(0, replace(Params(), **{field_name: value}), [])
    assert caught.value.field == field_name


def test_attach_and_sample_refuse_what_they_cannot_index(runner):
    sampler, logits = Sampler(runner, 50, 4), rows_of(61, 2, 50)
    refused: list[tuple[Any, str]] = [
        ((4, GREEDY, []), "slot"),
        ((0, GREEDY, [50]), "prompt_ids"),
        ((0, GREEDY, [], [-1]), "generated_ids"),
        ((0, GREEDY, [], [], -1), "sample_index"),
        ((0, GREEDY, [], [], 0, [99]), "suppress_ids"),
    ]
    for arguments, name in refused:
        with pytest.raises(SamplingError) as caught:
            sampler.attach(*arguments)
        assert caught.value.field == name
    sampler.attach(1, Params(), [])
    sampler.attach(2, Params(), [])
    sampler.detach(2)
    for slots in ([1, 1], [1, 2], [1, 3], [1, 4], [-1, 1]):
        with pytest.raises(SamplingError, match="slots"):
            sample(sampler, logits, slots)
    sampler.attach(0, Params(), [])
    # A refused step moved no position.
    assert sample(sampler, logits, [0]).tokens == sample(sampler, logits, [1]).tokens
    assert len(sample(sampler, logits, []).tokens) == 0
    sampler.close()
    sampler.close()
    with pytest.raises(ValueError, match="closed"):
        sample(sampler, logits, [0])
