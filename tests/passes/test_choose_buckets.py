"""Buckets: the dynamic programme finds what trying everything finds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, combinations

from hypothesis import given
from hypothesis import strategies as st

from tests.ir.small import attend, small
from tests.passes.zoo import CONTEXT
from xllm.passes import Context, run_pipeline
from xllm.passes.account import account
from xllm.passes.choose_buckets import Buckets, ChooseBuckets, choose_sizes
from xllm.passes.choose_kernels import ChooseKernels
from xllm.traffic import MAX_SIZES

SIZES = st.lists(st.integers(1, 512), min_size=1, max_size=8, unique=True).map(sorted)


def waste(sizes: Sequence[int], weights: Sequence[float], chosen: Sequence[int]) -> float:
    fit = (next(bucket for bucket in chosen if bucket >= size) for size in sizes)
    return sum(weight * (bucket - size) for size, weight, bucket in zip(sizes, weights, fit, strict=True))


@given(SIZES, st.data(), st.integers(1, 6))
def test_equals_trying_everything(sizes: list[int], data: st.DataObject, count: int) -> None:
    weights = [float(data.draw(st.integers(0, 9))) for _ in sizes]
    chosen = choose_sizes(sizes, weights, float, count)
    assert chosen[-1] == sizes[-1]
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(sizes) and len(chosen) <= count
    tried = [(*some, sizes[-1]) for n in range(count) for some in combinations(sizes[:-1], n)]
    assert waste(sizes, weights, chosen) == min(waste(sizes, weights, some) for some in tried)


@given(SIZES, st.integers(2, 6))
def test_is_no_worse_than_a_ladder(sizes: list[int], count: int) -> None:
    weights = [1.0] * len(sizes)
    ladder = sorted({*sizes[:: max(1, -(-len(sizes) // (count - 1)))], sizes[-1]})
    assert len(ladder) <= count
    assert waste(sizes, weights, choose_sizes(sizes, weights, float, count)) <= waste(sizes, weights, ladder)


def test_equal_waste_takes_fewer_buckets() -> None:
    assert choose_sizes([1, 2, 4], [0.0, 0.0, 1.0], float, 3) == (4,)


def test_as_many_sizes_as_a_file_may_hold_are_chosen_from() -> None:
    sizes = range(1, MAX_SIZES + 1)
    assert choose_sizes(sizes, [0.0] * (MAX_SIZES - 1) + [1.0], float, 5) == (MAX_SIZES,)
    found = choose_sizes(sizes, [1.0] * MAX_SIZES, float, 4)  # alike: at every quarter
    assert found == tuple(MAX_SIZES * part // 4 for part in (1, 2, 3, 4))


def test_the_report_weighs_what_was_chosen_for() -> None:
    program, _ = run_pipeline(small(attend), [ChooseKernels(), ChooseBuckets(7)], CONTEXT)
    told = account(program, CONTEXT)["buckets"]
    assert told["traffic"].startswith("powers of two") and told["padding"] == told["ladder_padding"] == 0.0


def chosen(context: Context, count: int = 5) -> Buckets:
    program, _ = run_pipeline(small(attend), [ChooseBuckets(count)], context)
    return program.plans["buckets"]


def test_buckets_follow_the_traffic() -> None:
    traffic = ((3, 100.0), (48, 50.0), (1000, 1.0))
    program, _ = run_pipeline(
        small(attend), [ChooseKernels(), ChooseBuckets(3)], Context(CONTEXT.target, traffic=traffic)
    )
    # larger steps are cut; rows never exceed their limit
    assert program.plans["buckets"].sizes == ((3, 3), (48, 8), (64, 8))


@given(SIZES, st.data(), st.integers(11, 12))
def test_is_no_worse_than_powers_of_two(sizes: list[int], data: st.DataObject, count: int) -> None:
    """Under any cost that grows with size, at the number of buckets that the ladder has."""
    weights = [float(data.draw(st.integers(0, 9))) for _ in sizes]
    steps = data.draw(st.lists(st.integers(0, 5), min_size=513, max_size=513))
    cost = dict(enumerate(accumulate(steps, initial=1)))
    powers = [1 << bit for bit in range(10)]
    ladder = sum(w * (cost[next(p for p in powers if p >= s)] - cost[s]) for s, w in zip(sizes, weights, strict=True))
    found = choose_sizes(sizes, weights, lambda size: float(cost[size]), count)
    fit = (next(bucket for bucket in found if bucket >= size) for size in sizes)
    ours = sum(w * (cost[bucket] - cost[s]) for s, w, bucket in zip(sizes, weights, fit, strict=True))
    assert ours <= ladder


def test_the_cost_model_weighs_what_a_larger_bucket_costs() -> None:
    sizes, weights = [1, 2, 40, 64], [10.0, 10.0, 1.0, 1.0]
    assert choose_sizes(sizes, weights, lambda size: float(size > 40), 2) == (40, 64)
    assert choose_sizes(sizes, weights, lambda size: 100.0 if size <= 2 else float(100 * size), 2) == (2, 64)


def test_without_traffic_sizes_are_powers_of_two() -> None:
    buckets = chosen(CONTEXT)
    assert len(buckets.sizes) == 5 and buckets.sizes[-1] == (64, 8)
    assert all(size & (size - 1) == 0 for size, _ in buckets.sizes)
    assert buckets.expected_padding == 0.0  # kernels of the CPU take sizes: nothing is padded
