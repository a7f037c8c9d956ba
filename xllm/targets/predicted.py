"""The target of an artifact, with the figures of a machine that it was compiled with, and what steps take by these."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from xllm.artifact import Artifact, ArtifactError
from xllm.runtime.cost import Basis, StepCost
from xllm.targets.base import Cost, Extent, StepSizes
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.tuning import Tuning

TUNING = "tuning.json"
KNOTS = (1, 16, 64, 256)  # tokens of a step at which it is asked, and the most there may be
FAR = 1024  # tokens of context that show what attention takes


def target_of(artifact: Artifact) -> CpuTarget:
    """Predicts times from the artifact's own table, from what is usual where it has none. Raises ArtifactError for a
    table that is none."""
    tuning = None
    if TUNING in artifact.manifest["files"]:
        try:
            tuning = Tuning.from_json(artifact.read(TUNING))
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"{TUNING}: {error}; compile again") from error
    return CpuTarget(artifact.manifest["target"]["level"], tuning=tuning)


def predicted_cost(artifact: Artifact) -> StepCost:
    """What stands in for a fitted model (see fitted.cost_of) until there is one: the same sum of parts, by what the
    artifact's calls cost in a few steps."""
    target, most = target_of(artifact), artifact.plan.buckets[-1].T
    calls = Counter(
        (call.kernel, tuple(call.cost.flops.terms.items()), tuple(call.cost.bytes.terms.items()))
        for call in artifact.plan.calls
    )

    def seconds(tokens: int, past: int, sampled: int = 1) -> float:
        sizes = StepSizes([(tokens, past)], sampled)
        return sum(
            count * target.seconds(Cost(Extent(dict(flops)), Extent(dict(moved))), sizes, kernel)
            for (kernel, flops, moved), count in calls.items()
        )

    knots = (*(knot for knot in KNOTS if knot < most), most)
    both = max(0.0, seconds(1, FAR) - seconds(1, 0)) / FAR  # a key that is read, and a pair that is seen
    wide = max(0.0, seconds(most, FAR) - seconds(most, 0)) / FAR  # one key, and a pair for each token
    pair = max(0.0, wide - both) / (most - 1) if most > 1 else 0.0
    key = max(0.0, both - pair)
    bare = {at: seconds(at, 0) - key * at - pair * at * (at + 1) / 2 for at in knots}
    slopes = [max(0.0, bare[two] - bare[one]) / (two - one) for one, two in pairwise(knots)]
    sampled = max(0.0, seconds(most, 0, 2) - seconds(most, 0, 1))
    constant = max(0.0, bare[knots[0]] - sampled)
    return StepCost(Basis(knots, (1,), (0,)), (constant, 0.0, 0.0, *slopes, sampled, key, pair))
