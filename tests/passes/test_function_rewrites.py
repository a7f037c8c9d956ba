"""Rewrites of functions, on what torch exports to ONNX and on random changes of that: the same results as before."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.frontend.onnx_models import MODELS, exported, feeds
from tests.passes.mutate import mutated
from tests.passes.zoo import CONTEXT
from xllm.frontend.onnx import import_onnx
from xllm.ir import Program
from xllm.ir.interpret import bind, run_function
from xllm.passes import FUNCTION_REWRITES, Record, run_pipeline
from xllm.passes.numerics import difference

DECODER = {
    "fold-indices", "fuse-activation", "fuse-rms-norm", "fuse-add-rms-norm", "fuse-rope", "fuse-sdpa", "fuse-gate-up",
    "fuse-gated-linear",
}  # fmt: skip
# Those that must hit, beside the passes that hit in every model.
HITS = {
    "vit": {"fold-weights", "fuse-activation", "fuse-sdpa"},
    "siglip": {"fold-weights", "fuse-activation", "fuse-sdpa"},
    "bert": {"fold-weights", "fold-indices", "fuse-sdpa"},
    "norms": {"fold-weights", "fuse-layer-norm"},
    "qwen3": DECODER,
    "llama-past": DECODER,
}
TOLERANCE = 1e-4  # of sums in another order, behind changes that may amplify it


@cache
def stages(name: str) -> tuple[tuple[Program, ...], tuple[Record, ...], Mapping[str, Any]]:
    """The program before every rewrite and after the last, the records, and the file's tensors."""
    program, tensors = import_onnx(exported(name), dict.fromkeys(MODELS[name][1], 16))
    found = [program]
    _, records = run_pipeline(
        program, FUNCTION_REWRITES, CONTEXT, lambda step, before, after, record: found.append(after)
    )
    return tuple(found), tuple(records), tensors


def results(program: Program, name: str, *sizes: int) -> dict[str, torch.Tensor]:
    inputs = {key: torch.from_numpy(value) for key, value in feeds(name, *sizes).items()}
    return run_function(program, inputs, bind(program, stages(name)[2]))


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_computes_the_same_and_hits_where_it_should(name: str) -> None:
    programs, records, _ = stages(name)
    assert {record.name for record in records if record.hits} == {"canonicalize", *HITS[name]}
    for sizes in ((2, 5, 3), (1, 1, 1)):
        computed = [results(program, name, *sizes) for program in programs]
        for (before, after), record in zip(pairwise(computed), records, strict=True):
            assert before.keys() == after.keys()
            assert all(difference(before[key], after[key]) <= 1e-5 for key in before), record.name


@pytest.mark.parametrize("name", MODELS)
def test_running_again_only_merges_views(name: str) -> None:
    records = run_pipeline(stages(name)[0][-1], FUNCTION_REWRITES, CONTEXT)[1]
    assert {record.name for record in records if record.hits} <= {"canonicalize"}


@pytest.mark.parametrize("index", range(len(FUNCTION_REWRITES)), ids=[step.name() for step in FUNCTION_REWRITES])
def test_a_rewrite_of_random_functions_changes_nothing_but_the_graph(index: int, graphs: int, seed: int) -> None:
    step, rng = FUNCTION_REWRITES[index], random.Random(seed * 1000 + index)
    served = [name for name in MODELS if stages(name)[1][index].hits]
    tried = hits = 0
    assert served, "no model of these tests has the pattern"
    while tried < graphs:
        name = rng.choice(served)
        program = mutated(stages(name)[0][index], rng, rng.choice((0, 1, 1, 2, 3)))
        if program is None:
            continue
        sizes = (rng.randint(1, 3), rng.randint(1, 6), rng.randint(0, 3))
        wanted = results(program, name, *sizes)
        if not all(value.isfinite().all() for value in wanted.values()):
            continue
        after, (record,) = run_pipeline(program, [step], CONTEXT)
        got = results(after, name, *sizes)
        assert all(difference(wanted[key], got[key]) <= TOLERANCE for key in wanted), (step.name(), name, tried, sizes)
        tried += 1
        hits += record.hits
    assert hits > graphs // 2, "the pattern is hardly ever there"
