"""`bench.goodput --real` on a tiny artifact: the same arrivals served and simulated, by what steps take here."""

import pytest

from bench import goodput_real
from bench.goodput import engine_config, made_up
from bench.goodput_real import BASE, PAIRS, Bench, Still, derive, serve, tight
from tests.models import FAMILIES, build
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.runtime.cost import Basis, StepCost
from xllm.runtime.simulation import Arrival

COST = StepCost(Basis((1,), (1,), (0,)), (2e-3, 0.0, 1e-5, 0.0, 0.0, 0.0))
LENGTHS = made_up(500)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    options = CompileOptions(max_len=256, max_seqs=8, max_batch_tokens=64)
    return Artifact.open(build(tmp_path_factory.mktemp("goodput"), FAMILIES["qwen3"], options=options)[1])


@pytest.mark.parametrize("what", list(PAIRS))
def test_a_pair_serves_what_it_simulates(artifact, monkeypatch, what):
    for name, value in {"RUN_SECONDS": 0.1, "FEWEST": 6, "STILL_SECONDS": 1e9}.items():
        monkeypatch.setattr(goodput_real, name, value)
    bench = Bench(artifact, COST, {"made up": LENGTHS})
    assert [plan[1] for plan in bench.plans] == ["load", "load", "little memory"] and bench.rates["made up"] > 0
    found = bench.pair("made up", what, 0.8, seed=3)
    assert tuple(found) == PAIRS[what] and len(bench.scales) == 1 and bench.scales[0] > 0
    sizes = {tuple(sorted((one.arrival.prompt, one.arrival.output) for one in run.served))
             for pair in found.values() for run in pair}  # fmt: skip
    assert len(sizes) == 1 and len(sizes.pop()) >= 6
    for real, simulated in found.values():
        assert real.factor > 0 and real.plan > 0 and real.kept >= 0 and 0 <= real.attainment <= 1 and real.good >= 0
        assert all(one.arrival.at < one.first <= one.last for one in (*real.served, *simulated.served))


def test_what_is_asked_for_has_the_scale_of_the_machine(artifact):
    slow = StepCost(COST.basis, tuple(2 * each for each in COST.seconds_of))
    one, other = derive(artifact, COST, LENGTHS), derive(artifact, slow, LENGTHS)
    assert other.urgency.tpot == pytest.approx(2 * one.urgency.tpot) and one.urgency.ttft == 20 * one.urgency.tpot
    assert other.rates[1] == pytest.approx(one.rates[1] / 2)
    least, longer = tight(one, LENGTHS)
    machine = least.machine
    assert machine.kv_bytes >= machine.limits.max_len // 16 * machine.group_bytes > machine.kv_bytes - 2 * (1 << 16)
    assert longer[7][2] == 8 * LENGTHS[7][2]


def test_a_run_in_which_the_process_stood_still_is_none(artifact, monkeypatch):
    monkeypatch.setattr(goodput_real, "STILL_SECONDS", -1.0)
    setting = derive(artifact, COST, LENGTHS)
    with pytest.raises(Still):
        serve(artifact, [Arrival(0.0, 5, 5)], setting, engine_config(setting, BASE), 0)
