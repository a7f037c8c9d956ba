"""Goodput is the rate at which nine of ten are in time, on arrivals that keep their shape at any rate."""

import pytest

from bench.goodput import GPU, SETTINGS, Setting, attainment, engine_config, goodput, made_up, read_trace, window
from xllm.runtime import Limits
from xllm.runtime.policies.state import TokenCost
from xllm.runtime.simulation import Arrival, Machine, Served
from xllm.runtime.urgency import Urgency

SETTING = Setting(
    Machine(TokenCost(0.001), Limits(1000, 32, 4096, 100), 1000, 4000 * 1000, 4000),
    Urgency(ttft_slo_ms=150),
    (0.1, 100.0),
)


def test_evenly_spaced_prompts_are_in_time_until_they_overlap():
    """Each takes 100 ms, so at 10 a second the next one begins as the last one ends."""

    def make(rate: float) -> list[Arrival]:
        return [Arrival(n / rate, 100, 1, SETTING.urgency) for n in range(100)]

    assert goodput(make, SETTING, engine_config(SETTING, "chunked")) == pytest.approx(10, rel=0.1)
    late = Setting(SETTING.machine, Urgency(ttft_slo_ms=50), SETTING.rates)
    assert goodput(lambda rate: [Arrival(0.0, 100, 1, late.urgency)], late, engine_config(late, "mix")) == 0


def test_a_window_keeps_lengths_and_the_shape_of_time(tmp_path):
    setting = SETTINGS["H200-like, 8 B"]
    slow, fast = (window(made_up(500), 50, 3, rate, setting) for rate in (1.0, 4.0))
    assert [a.prompt for a in slow] == [a.prompt for a in fast] and slow[0].at == 0
    assert [a.at for a in slow] == pytest.approx([4 * a.at for a in fast])
    assert slow[-1].at == pytest.approx(49)
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert [row[1:] for row in read_trace(file)] == [(4808, 10)]
    file.write_text("when\n1\n")
    with pytest.raises(ValueError, match="TIMESTAMP"):
        read_trace(file)


def test_a_step_costs_reading_or_multiplying():
    few, many = GPU.seconds(((0, 1),)), GPU.seconds(((0, 4096),))
    assert GPU.seconds(()) == GPU.host + GPU.weights and few == pytest.approx(GPU.host + GPU.weights, rel=0.01)
    assert many > 4096 * GPU.token


def test_attainment_is_the_share_in_time():
    asked = Arrival(1.0, 5, 3, Urgency(ttft_slo_ms=1000, tpot_slo_ms=100))
    assert attainment([Served(asked, 1.5, 1.6), Served(asked, 2.5, 2.6), Served(asked, 1.5, 1.8)]) == pytest.approx(
        1 / 3
    )
