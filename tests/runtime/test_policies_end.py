"""Under every policy, order and mix of classes all requests end, with the tokens each would get alone."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.fakes import Rig, assert_as_alone, request
from xllm.runtime.policies import MODIFIERS, PRESETS
from xllm.runtime.policies.orders import ORDERS
from xllm.runtime.urgency import Urgency

SCHEDULERS = [*PRESETS, *(f"{preset}+{modifier}" for preset in PRESETS for modifier in MODIFIERS)]
CLASSES = st.builds(
    Urgency,
    st.sampled_from(["DEFAULT", "HIGH", "NORMAL", "LOW"]),
    st.booleans(),
    st.sampled_from([None, 1, 4000, 60_000]),
    st.sampled_from([None, 1, 1500, 9000]),
)
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 3, 12, 40]),  # turns until it arrives
        st.integers(1, 60),  # prompt
        st.sampled_from([60, 35, 34, 33, 7, 1]),  # max_tokens
        CLASSES,
        st.integers(0, 2),  # which prompts share a beginning
    ),
    min_size=3,
    max_size=9,
)


class Quadratic:
    """0.5 x^2 + 10 x of a prompt, behaviour 10; `scale` makes seconds of it."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def sizes(self, rows) -> tuple[float, ...]:
        return (sum(0.5 * ((a + n) ** 2 - a**2) + 10 * n for a, n in rows),)

    def of(self, sizes) -> float:
        return self.scale * sizes[0]

    def seconds(self, rows) -> float:
        return self.of(self.sizes(rows))


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=ARRIVALS,
    scheduler=st.sampled_from(SCHEDULERS),
    order=st.sampled_from([None, *ORDERS]),
    budget=st.sampled_from([1, 3, 16, 64]),
    max_chunk=st.integers(1, 40),
    max_seqs=st.integers(2, 6),
    pages=st.sampled_from([5, 6, 7, 9, 14, 36]),
    admit_below=st.sampled_from([0.5, 0.95, 1.0]),
    aged=st.sampled_from([0.5, 20.0, 1e6]),
    cost=st.sampled_from([None, Quadratic(1e-6), Quadratic(1e-3), Quadratic(1.0)]),
    overlap=st.booleans(),
)
def test_everything_ends_under_any_policy(
    arrivals, scheduler, order, budget, max_chunk, max_seqs, pages, admit_below, aged, cost, overlap
):
    policy = {"scheduler": scheduler, "order": order, "aged_seconds": aged, "cost": cost}
    rig = Rig(
        max_tokens_per_step=budget, max_chunk=max_chunk, max_seqs=max_seqs, max_len=96, vocab=500, pages=pages,
        group_bytes=4096, async_scheduling=overlap, admit_below=admit_below, policy=policy,
    )  # fmt: skip
    serve_all(rig, arrivals)


def serve_all(rig: Rig, arrivals) -> None:
    accepted = []
    due = sorted((at, n) for n, (at, *_) in enumerate(arrivals))
    while due or rig.busy:
        while due and due[0][0] <= rig.now:
            n = due.pop(0)[1]
            _, prompt, max_tokens, urgency, shared = arrivals[n]
            ids = tuple((7 * shared + i) % rig.vocab if i < 40 else n for i in range(prompt))
            req = request(f"r{n}", ids, min(max_tokens, 79 - prompt), urgency, ignore_eos=True, seed=n)
            if rig.engine.pool.plan.tokens_for(rig.engine.pool.plan.pages) + 1 < prompt + req.params.max_tokens:
                continue
            rig.engine.submit(req)
            accepted.append(req)
        rig.turn()
        assert rig.now < 20_000, f"no end in sight: {rig.engine.why}"
    for req in accepted:
        assert_as_alone(rig, req)
    stats = rig.engine.stats()
    assert stats.finished == len(accepted)
    assert stats.preemptions == sum(count for name, count in vars(stats).items() if "_preempt_" in name)
    rig.assert_baseline()
