"""Sampling where masks leave some tokens only: the row is one of minus infinities. Logprobs of what is left."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.test_sampling import FEATURES, GREEDY, distribution, rows_of, sample
from xllm.kernels.cpu import Runner
from xllm.kernels.cpu.sampling import NOTHING_ALLOWED, Sampler, SamplingError


@pytest.fixture(scope="module")
def runner():
    with Runner(threads=2) as made:
        yield made


@pytest.mark.parametrize("vocab", [7, 160, 1000])
@pytest.mark.parametrize("name", FEATURES)
def test_a_mask_is_a_row_of_minus_infinities(runner, name, vocab):
    """The same draws, the logprobs of the row as it came, and the logits untouched."""
    rng, p = np.random.default_rng(vocab), replace(FEATURES[name], logprobs=2)
    sampler, mask = Sampler(runner, vocab, 2), np.zeros(-(-vocab // 32), np.uint32)
    sampler.attach(0, p, [1, 1, 5], [], 0, (2, 4), mask)
    sampler.attach(1, p, [1, 1, 5], [], 0, (2, 4))
    for row in rows_of(vocab, 12, vocab):
        allowed = rng.random(vocab) < rng.choice([0.01, 0.3, 1.0])
        allowed[rng.choice([0, 1, 3, 5, 6])] = True
        bits = np.packbits(allowed, bitorder="little")
        mask.view(np.uint8)[: len(bits)] = bits
        before, cut = row.copy(), np.where(allowed, row, np.float32(-np.inf))
        masked, expected = sample(sampler, row, [0]), sample(sampler, cut, [1])
        assert masked.tokens == expected.tokens
        assert np.array_equal(row.view(np.int32), before.view(np.int32))
        if masked.tokens[0] == NOTHING_ALLOWED:
            continue
        assert allowed[masked.tokens[0]]
        raw = row - np.log(np.exp(row.astype(np.float64)).sum())
        assert masked.logprobs[0] == pytest.approx(raw[masked.tokens[0]], abs=1e-5)
        assert masked.top_ids[0].tolist() == np.argsort(-row, kind="stable")[:2].tolist()


def test_min_tokens_gives_way_where_the_mask_leaves_nothing_else(runner):
    sampler, mask = Sampler(runner, 40, 1), np.zeros(2, np.uint32)
    sampler.attach(0, replace(GREEDY, min_tokens=9), [], [], 0, (2, 33), mask)
    row = rows_of(1, 1, 40)[0]
    mask[:] = [1 << 2, 1 << 3]
    assert sample(sampler, row, [0]).tokens.tolist() == [35]
    mask[:] = [1 << 2, 1 << 1]
    assert sample(sampler, row, [0]).tokens.tolist() == [max((2, 33), key=lambda token: row[token])]
    mask[:] = 0
    assert sample(sampler, row, [0]).tokens.tolist() == [NOTHING_ALLOWED]
    with pytest.raises(SamplingError, match="mask"):
        sampler.attach(0, GREEDY, [], mask=np.zeros(1, np.uint32))


@pytest.mark.parametrize("vocab", [7, 4000])
@pytest.mark.parametrize("name", FEATURES)
def test_processed_logprobs_are_of_what_is_drawn_from(runner, name, vocab):
    """Of a greedy row: of the edited logits at temperature 1. As many are listed as can be drawn."""
    p = replace(FEATURES[name], logprobs=5, logprobs_mode="processed")
    soft = replace(p, temperature=1.0) if p.temperature == 0 else p
    sampler, generated = Sampler(runner, vocab, 1), []
    sampler.attach(0, p, [1, 1, 5, 6], [], 0, (2, 4))
    for row in rows_of(vocab, 8, vocab):
        result = sample(sampler, row, [0])
        share = distribution(row, soft, [1, 1, 5, 6], generated, (2, 4))
        generated.append(int(result.tokens[0]))
        assert result.logprobs[0] == pytest.approx(math.log(share[generated[-1]]), abs=1e-5)
        count = int((result.top_ids[0] >= 0).sum())
        best = np.argsort(-share, kind="stable")[:count]
        assert count == min(5, (share > 0).sum()) and np.isneginf(result.top_logprobs[0, count:]).all()
        assert result.top_logprobs[0, :count] == pytest.approx(np.log(share[best]), abs=1e-5)
        assert share[result.top_ids[0, :count]] == pytest.approx(share[best], rel=1e-5)
