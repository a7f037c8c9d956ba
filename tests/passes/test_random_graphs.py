"""Every rewrite on random programs that contain its pattern, near misses of it, escaping and shared values: whatever
it does, the program computes what it did before.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.passes.mutate import mutated
from tests.passes.zoo import CONTEXT, FAMILIES, rewritten
from xllm.ir import Program
from xllm.passes import REWRITES, run_pipeline
from xllm.passes.numerics import random_sources, random_steps, run_steps

# Whatever is computed from positions alone is tabulated, so a change of it is no miss.
NEVER_MISSED = {"tabulate-positions"}
TOLERANCE = 1e-4  # of sums in another order, behind changes that may amplify it


@pytest.mark.parametrize("index", range(len(REWRITES)), ids=[step.name() for step in REWRITES])
def test_a_rewrite_changes_nothing_but_the_graph(index: int, graphs: int, seed: int) -> None:
    step, rng = REWRITES[index], random.Random(seed * 1000 + index)
    served = [family for family in FAMILIES if rewritten(family)[1][index].hits]
    tried = hits = fewer = more = 0
    while tried < graphs:
        family = rng.choice(served)
        before = mutated(rewritten(family)[0][index], rng, rng.choice((0, 1, 1, 2, 2, 3, 4)))
        if before is None:
            continue
        sources = random_sources(rewritten(family)[0][0], seed=rng.randrange(1 << 30))
        wanted = outputs(before, sources)
        if not all(part.isfinite().all() for part in wanted):
            continue
        after, (record,) = run_pipeline(before, [step], CONTEXT)
        for one, other in zip(wanted, outputs(after, sources), strict=True):
            difference = float((one - other).norm() / one.norm().clamp_min(1e-30))
            assert difference <= TOLERANCE, (step.name(), family, tried, difference)
        tried += 1
        hits += record.hits
        usual = rewritten(family)[1][index].hits
        fewer += record.hits < usual
        more += record.hits >= usual
    assert hits > graphs // 2, "the pattern is hardly ever there"
    assert more > graphs // 10, (fewer, more)
    assert fewer > 0 or graphs < 1000 or step.name() in NEVER_MISSED, (fewer, more)  # by chance; by hand: near misses


def outputs(program: Program, sources: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return run_steps(program, sources, random_steps(program, 0))
