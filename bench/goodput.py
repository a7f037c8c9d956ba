"""Goodput of scheduling policies: the highest rate at which 90 % of the requests get the latencies they ask for.

    python -m bench.goodput [--trace FILE.csv ...] [--requests N] [--seeds N] [--quick]
    python -m bench.goodput --real [--minutes M] [--artifact DIR]

The engine's own core runs in virtual time on a machine given by a cost model, whose constants are below; arrivals and
lengths are those of a trace (windows of it, chosen by the seed, with time scaled to the rate), or made up where there
is none. All policies of a table serve the same arrivals. The second table is about memory: a pool that is too small,
and what it costs to admit only what will fit. The third is about a backlog of offline work beside online requests.

--real serves the same traffic with a real engine, in about so many minutes, and says beside it what the simulation
says of this very machine (bench/goodput_real.py).
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.report import RESULTS, ROOT, Spread, footer, percentile, save, table
from xllm.runtime import EngineConfig, Limits
from xllm.runtime.policies.state import STEP_SECONDS, Rows
from xllm.runtime.simulation import Arrival, Machine, Served, simulate
from xllm.runtime.urgency import Urgency

TRACES = ROOT.parent / "shared" / "traces"
ATTAINMENT = 0.9
MARGIN = 0.9  # of the time per token: what steps aim at under policies that don't go by what is asked
BASE = "chunked"
# Scheduler and order by the names in the table.
POLICIES = {
    BASE: ("chunked", None),
    "chunked, urgency_density": ("chunked", "urgency_density"),
    "mix": ("mix", None),
}
STEPS_OF_SEARCH = 8
BACKLOG, ONLINE_RATES = (3000, 1000, 200), {"code": 1.0, "conv": 12.0}  # the third table
GRACE_SECONDS = 50.0  # after the last arrival, for answers of 1000 tokens
TIGHT_BYTES, TIGHT_RATE, TIGHT_SCALES = 1 << 30, 12.0, (0.125, 2.0)  # memory's table: prompts shorter, answers longer


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step: what every step takes, the weights read or all tokens multiplied, whichever is longer, pairs
    of a token and one it sees, and keys and values read."""

    host: float
    weights: float
    token: float
    pair: float
    context: float

    def sizes(self, rows: Rows, /) -> tuple[int, int, int]:
        tokens = pairs = context = 0
        for before, new in rows:
            tokens += new
            pairs += new * (2 * before + new) // 2
            context += before + new
        return tokens, pairs, context

    def of(self, sizes: Sequence[float], /) -> float:
        tokens, pairs, context = sizes
        return self.host + max(self.weights, self.token * tokens) + self.pair * pairs + self.context * context

    def seconds(self, rows: Rows, /) -> float:
        return self.of(self.sizes(rows))


@dataclass(frozen=True)
class Setting:
    """A machine, and what is asked of it. rates: requests a second between which goodput lies."""

    machine: Machine
    urgency: Urgency
    rates: tuple[float, float]
    scale: float = 1.0  # of the trace's lengths


# 8 B parameters in two bytes: 16 GB at 80 % of 4.8 TB/s, 16 GFLOP a token at 60 % of 989 TFLOP/s, 128 KiB of keys and
# values a token at 60 %, attention at 40 % of the multiply peak, 1 ms of host.
GPU = Roofline(host=1e-3, weights=4.2e-3, token=27e-6, pair=1.3e-9, context=46e-9)
# 0.6 B in two bytes on two cores: 1.2 GB at 20 GB/s, 1.2 GFLOP a token at 150 GFLOP/s, 112 KiB a token at 15 GB/s.
CPU = Roofline(host=1e-3, weights=60e-3, token=8e-3, pair=2e-6, context=7.6e-6)
SETTINGS = {
    "H200-like, 8 B": Setting(
        Machine(GPU, Limits(8192, 256, 16_384, 1000), 16 << 17, 40 << 30, 16 << 20),
        Urgency(ttft_slo_ms=1000, tpot_slo_ms=50),
        (1.0, 120.0),
    ),
    "two cores, 0.6 B": Setting(
        Machine(CPU, Limits(512, 64, 4096, 1000), 16 * 112 << 10, 4 << 30, 2 << 20),
        Urgency(ttft_slo_ms=5000, tpot_slo_ms=250),
        (0.02, 8.0),
        scale=1 / 16,
    ),
}


def engine_config(setting: Setting, scheduler: str, order: str | None = None) -> EngineConfig:
    """As `serve` has it. Everybody knows the cost model, and the baseline's steps aim at the time per token too."""
    tokens = setting.machine.limits.max_tokens_per_step
    return EngineConfig(
        kv_bytes=1, max_tokens_per_step=tokens, max_chunk=tokens, premap=False, prefix_cache=False,
        step_seconds=min(MARGIN * setting.urgency.tpot, STEP_SECONDS), scheduler=scheduler, order=order,
        cost=setting.machine.cost,
    )  # fmt: skip


Lengths = Sequence[tuple[float, int, int]]  # seconds, tokens of prompt and of answer


def read_trace(file: Path) -> Lengths:
    """All rows of a CSV with columns TIMESTAMP, ContextTokens, GeneratedTokens. Raises ValueError for another."""
    rows = []
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                # Seven digits of a second are one more than fromisoformat takes.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                rows.append((at, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
            except KeyError as error:
                raise ValueError(f"{file.name} has no column {error}") from None
    return rows


def made_up(count: int = 20_000) -> Lengths:
    """Bursts of Poisson arrivals with long-tailed lengths, for those without traces."""
    draw, at, rows = random.Random(0), 0.0, []
    for _ in range(count):
        at += draw.expovariate(1.0 if draw.random() < 0.7 else 20.0)
        rows.append((at, int(draw.lognormvariate(6.5, 1.0)) + 1, int(draw.lognormvariate(5.0, 0.8)) + 1))
    return rows


def window(lengths: Lengths, count: int, seed: int, rate: float, setting: Setting) -> list[Arrival]:
    """`count` requests in a row, from a place that the seed chooses, at `rate` requests a second on average."""
    first = random.Random(seed).randrange(max(1, len(lengths) - count))
    held = lengths[first : first + count]
    span, longest = (held[-1][0] - held[0][0]) or 1.0, setting.machine.limits.max_len
    arrivals = []
    for at, prompt, output in held:
        output = min(max(1, round(output * setting.scale)), longest // 2)
        prompt = min(max(1, round(prompt * setting.scale)), longest - output)
        arrivals.append(Arrival((at - held[0][0]) / span * (len(held) - 1) / rate, prompt, output, setting.urgency))
    return arrivals


def attainment(served: Sequence[Served]) -> float:
    """Share of requests that got what they asked for."""
    return sum(one.good for one in served) / len(served)


def goodput(make: Callable[[float], list[Arrival]], setting: Setting, config: EngineConfig) -> float:
    """Requests a second at which the share just holds, by bisection of the rate on a scale of powers; 0 where it does
    not hold at the least of the rates."""

    def holds(rate: float) -> bool:
        return attainment(simulate(make(rate), setting.machine, config)[0]) >= ATTAINMENT

    low, high = setting.rates
    if not holds(low):
        return 0.0
    for _ in range(STEPS_OF_SEARCH):
        rate = (low * high) ** 0.5
        low, high = (rate, high) if holds(rate) else (low, rate)
    return low


def rates(lengths: Lengths, setting: Setting, options: argparse.Namespace) -> dict[str, list[float]]:
    """Goodput of every policy, one for each seed."""
    return {
        name: [
            goodput(
                lambda rate, seed=seed: window(lengths, options.requests, seed, rate, setting),
                setting,
                engine_config(setting, *policy),
            )
            for seed in range(options.seeds)
        ]
        for name, policy in POLICIES.items()
    }


def tight(lengths: Lengths, setting: Setting, scheduler: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """What one policy makes of a pool that is too small, figures by seed. Times in seconds."""
    machine = replace(setting.machine, kv_bytes=TIGHT_BYTES, page_bytes=2 << 20)
    setting = replace(setting, machine=machine)
    prompts, answers = TIGHT_SCALES
    lengths = [(at, round(prompt * prompts), round(output * answers)) for at, prompt, output in lengths]
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        arrivals = window(lengths, options.requests, seed, TIGHT_RATE, setting)
        served, stats = simulate(arrivals, machine, engine_config(setting, scheduler))
        tpot = [one.tpot for one in served]
        for name, value in {
            "tpot": sum(tpot) / len(tpot),
            "tpot_p99": percentile(tpot, 0.99),
            "ttft_p50": percentile([one.ttft for one in served], 0.5),
            "seconds": max(one.last for one in served),
            "preemptions": stats.preemptions,
            "recomputed_tokens": stats.recomputed_tokens,
        }.items():
            found.setdefault(name, []).append(value)
    return found


def main() -> None:
    options = _options()
    out = report.console()
    if options.real:
        from bench import goodput_real

        goodput_real.main(options, _lengths(options), out)
        return
    results: dict[str, Any] = {"goodput": {}, "memory": {}, "offline": {}}
    made = table(
        f"goodput, requests/s with {ATTAINMENT:.0%} in time: {options.requests} requests, {options.seeds} seeds",
        "arrivals, machine", *POLICIES,
        *(f"{name} / {BASE}" for name in POLICIES if name != BASE),
    )  # fmt: skip
    for name, lengths in _lengths(options).items():
        for machine, setting in SETTINGS.items():
            with out.status(f"{name}, {machine}"):
                found = rates(lengths, setting, options)
            results["goodput"][f"{name}, {machine}"] = found
            compared = [ratios(found[policy], found[BASE]) for policy in POLICIES if policy != BASE]
            made.add_row(
                f"{name}, {machine}",
                *(Spread.of(found[policy]).text() for policy in POLICIES),
                *(Spread.of(each).text() for each in compared),
            )
    out.print(made)
    out.print(_memory(options, results, out))
    out.print(_offline(options, results, out))
    footer(out)
    settings = {"requests": options.requests, "seeds": options.seeds, "attainment": ATTAINMENT, "settings": SETTINGS}
    settings |= {"memory": {"bytes": TIGHT_BYTES, "requests_per_second": TIGHT_RATE, "scales": TIGHT_SCALES}}
    settings |= {"offline": {"requests_per_second": ONLINE_RATES, "backlog": BACKLOG}, "policies": POLICIES}
    save(options.out, "goodput", settings, results)


def _memory(options: argparse.Namespace, results: dict[str, Any], out: Console) -> Table:
    machine = next(iter(SETTINGS))
    made = table(
        f"{machine}, {TIGHT_BYTES >> 30} GiB of keys and values, {TIGHT_RATE:g} requests/s, prompts x "
        f"{TIGHT_SCALES[0]:g}, answers x {TIGHT_SCALES[1]:g}",
        "arrivals, policy", "TPOT ms: mean", "p99", "TTFT s: p50", "all done after s", "preemptions", "recomputed",
        "TPOT / chunked",
    )  # fmt: skip
    for name, lengths in _lengths(options).items():
        with out.status(f"{name}, little memory"):
            found = {policy: tight(lengths, SETTINGS[machine], policy, options) for policy in (BASE, "zero-evict")}
        results["memory"][name] = found
        for policy, of in found.items():
            spreads = {figure: Spread.of(values) for figure, values in of.items()}
            made.add_row(
                f"{name}, {policy}",
                spreads["tpot"].text(1e3, 1),
                spreads["tpot_p99"].text(1e3, 1),
                spreads["ttft_p50"].text(1, 1),
                spreads["seconds"].text(1, 0),
                spreads["preemptions"].text(1, 0),
                spreads["recomputed_tokens"].text(1, 0),
                Spread.of(ratios(of["tpot"], found[BASE]["tpot"])).text(),
            )
    return made


def beside_offline(
    lengths: Lengths, rate: float, scheduler: str, backlog: Sequence[Arrival], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Share of online requests in time, and offline tokens a second, beside work that was there before them."""
    setting = next(iter(SETTINGS.values()))
    found: dict[str, list[float]] = {"attainment": [], "tokens_per_second": []}
    for seed in range(min(options.seeds, 3)):
        online = window(lengths, min(options.requests, 150), seed, rate, setting)
        end = online[-1].at + GRACE_SECONDS
        served, _ = simulate([*backlog, *online], setting.machine, engine_config(setting, scheduler), until=end)
        ours = {id(one) for one in online}
        found["attainment"].append(sum(one.good for one in served if id(one.arrival) in ours) / len(online))
        tokens = sum(one.arrival.prompt + one.arrival.output for one in served if id(one.arrival) not in ours)
        found["tokens_per_second"].append(tokens / end)
    return found


def _offline(options: argparse.Namespace, results: dict[str, Any], out: Console) -> Table:
    count, prompt, output = BACKLOG
    made = table(
        f"{next(iter(SETTINGS))}, {count} requests of {prompt} + {output} tokens there from the start",
        "arrivals, policy, the backlog", "online in time %", "backlog, tokens/s",
    )  # fmt: skip
    backlogs = {
        "none": [],
        "as online": [Arrival(0.0, prompt, output)] * count,
        "offline": [Arrival(0.0, prompt, output, Urgency(offline=True))] * count,
    }
    for name, lengths in _lengths(options).items():
        rate = ONLINE_RATES.get(name, 4.0)
        for scheduler in (BASE, "mix"):
            for kind, backlog in backlogs.items():
                with out.status(f"{name}, {scheduler}, backlog {kind}"):
                    found = beside_offline(lengths, rate, scheduler, backlog, options)
                results["offline"][f"{name}, {scheduler}, {kind}"] = found
                made.add_row(
                    f"{name} at {rate:g}/s, {scheduler}, {kind}",
                    Spread.of(found["attainment"]).text(100, 0),
                    Spread.of(found["tokens_per_second"]).text(1, 0),
                )
    return made


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Seed by seed; those where the base has nothing are left out."""
    return [value / other for value, other in zip(values, base, strict=True) if other]


def _lengths(options: argparse.Namespace) -> dict[str, Lengths]:
    files = options.trace if options.trace is not None else sorted(TRACES.glob("azure-*.csv"))
    return {file.stem.removeprefix("azure-llm-2023-"): read_trace(file) for file in files} or {"made up": made_up()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trace", type=Path, nargs="*", metavar="CSV", help="default: those of ../shared/traces; none: made up"
    )
    parser.add_argument("--requests", type=int, help="of a window of the trace (default 400; not of --real)")
    parser.add_argument("--seeds", type=int, default=5, help="windows, at most where --minutes end it")
    parser.add_argument("--quick", action="store_true", help="one small window")
    parser.add_argument("--real", action="store_true", help="serve it, do not simulate")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of --real (default 10)")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="of --real (default: random weights are compiled)")
    parser.add_argument("--out", type=Path, help="default: bench/results/goodput.json, goodput-real.json")
    options = parser.parse_args()
    options.requests = options.requests or 400
    options.out = options.out or RESULTS / ("goodput-real.json" if options.real else "goodput.json")
    if options.quick:
        options.requests, options.seeds = 100, 1
    return options


if __name__ == "__main__":
    main()
