"""The same policies on a real engine: `python -m bench.goodput --real`. See bench/goodput.py for the simulated ones.

An artifact of random weights is computed with. What its steps take is fitted first, and again before each pair of runs
it is found out how many times as long they take at present, because others use the machine too: latencies that are
asked for, rates and the simulation have that scale. Policies take turns (A B A B) on the same arrivals. A pair in which
this process stood still is made again.
"""

from __future__ import annotations

import argparse
import queue
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.goodput import BASE, Lengths, Setting, engine_config, goodput, ratios, window
from bench.report import Spread, footer, percentile, save, table
from bench.subject import checkpoint
from xllm.artifact import Artifact
from xllm.measure.fit import fit_artifact
from xllm.measure.machine import thread_times
from xllm.runtime import EngineConfig
from xllm.runtime.engine import Engine
from xllm.runtime.executor import Batch, Executor, Handle, StepResult
from xllm.runtime.policies.state import Scaled, StepCost
from xllm.runtime.request import Request, SamplingParams, TokenOutput
from xllm.runtime.simulation import Arrival, Machine, Served, simulate
from xllm.runtime.urgency import Urgency
from xllm.targets import host
from xllm.targets.base import USUAL_CONTEXT
from xllm.targets.cpu.executor import CpuExecutor, limits_of

SHAPE, LIMITS = "qwen3-60m", ("--max-len", "1024", "--max-seqs", "64", "--max-batch-tokens", "512")
TPOT_STEPS, TTFT_TPOTS = 4, 20  # asked for: so many lone decodes a token, and a first one after so many times that
SCALE = 1 / 16  # of the traces' lengths; all this as the simulation of two cores has it
LOADS = (0.8, 1.2)  # times the rate that `mix` just holds in the simulation
RUN_SECONDS, FEWEST = 6.0, 16  # of arrivals, and how many there are at least
FIT_SECONDS = 15.0
TIGHT_LOAD, TIGHT_ANSWERS = 0.5, 8  # a pool for the longest request alone; rate, and how much longer answers are
KV_BYTES, PAGE_BYTES = 512 << 20, 64 << 10
STILL_SECONDS, TICK_SECONDS = 0.5, 0.005
PAIRS = {"load": (BASE, "mix"), "little memory": (BASE, "zero-evict")}
WARM = [Arrival(0.0, 64, 24)] * 8  # a burst that says how fast steps are at present


@dataclass
class Steps:
    """What the steps of a run took: seconds predicted and measured of each."""

    cost: StepCost
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Noted:
    """A step on its way."""

    handle: Handle
    steps: Steps
    predicted: float

    def result(self) -> StepResult:
        found = self.handle.result()
        self.steps.predicted.append(self.predicted)
        self.steps.measured.append(found.seconds)
        return found


class Noting:
    """An executor, and what its steps take beside what is predicted."""

    def __init__(self, executor: Executor, steps: Steps) -> None:
        self._executor, self._steps = executor, steps
        self.limits, self.kv = executor.limits, executor.kv
        self.attach, self.detach, self.close = executor.attach, executor.detach, executor.close

    def launch(self, batch: Batch) -> Handle:
        rows = [(row.start, len(row.tokens)) for row in batch.rows]
        predicted = self._steps.cost.seconds(rows)
        return Noted(self._executor.launch(batch), self._steps, predicted)


@dataclass(frozen=True)
class Run:
    """One policy on one window. factor: seconds of its steps by those predicted. gap: share of the time in which there
    were requests, but no step ran. kept: share of the time that compute threads waited for a core that others had.
    plan: seconds that a step's decision takes, the median. The last four are of a real run."""

    served: Sequence[Served]
    preemptions: int
    factor: float = 1.0
    gap: float = 0.0
    kept: float = 0.0
    plan: float = 0.0

    @property
    def attainment(self) -> float:
        return sum(one.good for one in self.served) / len(self.served)

    @property
    def good(self) -> float:
        """Requests in time, a second, from the first arrival to the last token."""
        return sum(one.good for one in self.served) / max(one.last for one in self.served)

    @property
    def tpot(self) -> float:
        return statistics.fmean(one.tpot for one in self.served)


Pair = Mapping[str, tuple[Run, Run]]  # by policy: real and simulated


def serve(artifact: Artifact, arrivals: Sequence[Arrival], setting: Setting, config: EngineConfig, seed: int) -> Run:
    """Serves the arrivals when they are due. Raises Still."""
    machine, threads = setting.machine, host.threads(None).count
    outputs: queue.SimpleQueue[tuple[float, list[TokenOutput]]] = queue.SimpleQueue()
    steps, plans = Steps(machine.cost), list[float]()
    config = replace(config, kv_bytes=machine.kv_bytes, page_bytes=machine.page_bytes, premap=True)
    executor = Noting(CpuExecutor(artifact, threads), steps)
    engine = Engine(executor, config, lambda found: outputs.put((time.monotonic(), found)))
    engine._core.plan = _timed(engine._core.plan, plans)
    engine.start()
    try:
        begin = time.monotonic() + 0.1
        requests = [
            _request(f"{at}", one, machine.limits.vocab, begin + one.at, f"{seed}-{at}")
            for at, one in enumerate(arrivals)
        ]
        waited = _waited()
        served = _exchange(engine, outputs, requests, arrivals, begin)
        kept = (_waited() - waited) / threads / (time.monotonic() - begin)
    finally:
        engine.stop()
    measured = sum(steps.measured)
    gap = 1 - measured / _covered([(one.arrival.at, one.last) for one in served])
    factor = measured / sum(steps.predicted)
    return Run(served, engine.stats().preemptions, factor, gap, kept, statistics.median(plans))


class Still(RuntimeError):
    """This process was stopped for a while."""


def _exchange(
    engine: Engine,
    outputs: queue.SimpleQueue[tuple[float, list[TokenOutput]]],
    requests: Sequence[Request],
    arrivals: Sequence[Arrival],
    begin: float,
) -> list[Served]:
    """Submits each when it is due, and notes when its first and its last token came."""
    firsts: dict[str, float] = {}
    served: list[Served] = []
    submitted, last = 0, time.monotonic()
    while len(served) < len(arrivals):
        while submitted < len(requests) and requests[submitted].arrival <= last:
            engine.submit(requests[submitted])
            submitted += 1
        try:
            now, found = outputs.get(timeout=TICK_SECONDS)
        except queue.Empty:
            found, now = [], last
        for output in found:
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} ended with {output.error}")
            first = firsts.setdefault(output.request_id, now - begin)
            if output.finish_reason is not None:
                served.append(Served(arrivals[int(output.request_id)], first, now - begin))
        before, last = last, time.monotonic()
        if last - before > STILL_SECONDS:
            raise Still
    return served


@contextmanager
def _subject(options: argparse.Namespace, out: Console) -> Iterator[Path]:
    """The artifact; where none is given, one of random weights is made for the time of the block."""
    if options.artifact is not None:
        yield options.artifact
        return
    with (
        checkpoint(argparse.Namespace(shape=SHAPE, checkpoint=None), out) as (folder, scratch),
        out.status("compiling"),
    ):
        made = scratch / f"{SHAPE}.xllm"
        command = [sys.executable, "-m", "xllm.cli", "compile", folder, "-o", made, *LIMITS, "--quiet"]
        subprocess.run(command, check=True)
        yield made


def derive(artifact: Artifact, cost: StepCost, lengths: Lengths) -> Setting:
    """The latencies that are asked for, and rates between which goodput must lie, by what steps take."""
    machine = Machine(cost, limits_of(artifact), artifact.plan.kv.group_bytes, KV_BYTES, PAGE_BYTES)
    tpot = TPOT_STEPS * cost.seconds([(USUAL_CONTEXT, 1)])
    prompt = statistics.fmean(prompt for _, prompt, _ in lengths) * SCALE
    capacity = 1 / cost.seconds([(0, max(1, round(prompt)))])  # requests a second, if they had no answers
    urgency = Urgency(ttft_slo_ms=1e3 * TTFT_TPOTS * tpot, tpot_slo_ms=1e3 * tpot)
    return Setting(machine, urgency, (capacity / 100, capacity), SCALE)


def tight(setting: Setting, lengths: Lengths) -> tuple[Setting, Lengths]:
    """The same with a pool that just holds the longest request, and longer answers."""
    machine = setting.machine
    size = -(-machine.limits.max_len // 16) * machine.group_bytes + PAGE_BYTES
    longer = [(at, prompt, TIGHT_ANSWERS * output) for at, prompt, output in lengths]
    return replace(setting, machine=replace(machine, kv_bytes=size)), longer


class Bench:
    """An artifact on this machine, and the traffic it gets."""

    def __init__(self, artifact: Artifact, cost: StepCost, traces: Mapping[str, Lengths]) -> None:
        self.artifact, self.cost, self.traces = artifact, cost, traces
        self.again = 0  # pairs of runs that were made again
        self.scales: list[float] = []
        self.rates = {}
        for name, lengths in traces.items():
            setting = derive(artifact, cost, lengths)
            found = [
                goodput(_arrivals(lengths, setting, 100, seed), setting, engine_config(setting, "mix"))
                for seed in range(3)
            ]
            self.rates[name] = statistics.median(found) or setting.rates[1] / 10

    @property
    def plans(self) -> list[tuple[str, str, float]]:
        """(trace, what, load) of each pair of runs. Memory is little where answers are long."""
        longest = max(self.traces, key=lambda name: statistics.fmean(output for _, _, output in self.traces[name]))
        loads = [(name, "load", load) for name in self.traces for load in LOADS]
        return [*loads, (longest, "little memory", TIGHT_LOAD)]

    def pair(self, name: str, what: str, load: float, seed: int) -> Pair:
        """Both policies on one window. Raises Still."""
        lengths, setting = self.traces[name], derive(self.artifact, self.cost, self.traces[name])
        scale = serve(self.artifact, WARM, setting, engine_config(setting, BASE), seed).factor
        self.scales.append(scale)
        setting, rate = derive(self.artifact, Scaled(self.cost, scale), lengths), load * self.rates[name] / scale
        if what == "little memory":
            setting, lengths = tight(setting, lengths)
        count = max(FEWEST, round(RUN_SECONDS * rate))
        arrivals, found = window(lengths, count, seed, rate, setting), {}
        for policy in PAIRS[what]:
            config = engine_config(setting, policy)
            served, stats = simulate(arrivals, setting.machine, config)
            found[policy] = serve(self.artifact, arrivals, setting, config, seed), Run(served, stats.preemptions)
        return found


def main(options: argparse.Namespace, traces: Mapping[str, Lengths], out: Console) -> None:
    """Measures for `options.minutes`, and prints and keeps what was found until then."""
    end = time.monotonic() + 60 * options.minutes
    with _subject(options, out) as path:
        artifact = Artifact.open(path)
        with out.status("fitting what steps take"):
            fitted = fit_artifact(artifact, None, FIT_SECONDS, lambda _: None)
        bench = Bench(artifact, fitted.cost, traces)
        found: dict[tuple[str, str, float], list[Pair]] = {plan: [] for plan in bench.plans}
        for seed in range(options.seeds):
            for plan, pairs in found.items():
                while len(pairs) <= seed and time.monotonic() < end:
                    try:
                        with out.status(f"round {seed + 1}: {', '.join(map(str, plan))}"):
                            pairs.append(bench.pair(*plan, seed))
                        out.print(_line(seed, plan, pairs[-1]), highlight=False)
                    except Still:
                        bench.again += 1
    found = {plan: pairs for plan, pairs in found.items() if pairs}
    if not found:
        raise SystemExit(f"nothing was measured in {options.minutes:g} minutes: this machine is too busy")
    out.print(_good(artifact.name, {plan: pairs for plan, pairs in found.items() if plan[1] == "load"}))
    out.print(_tight({plan: pairs for plan, pairs in found.items() if plan[1] != "load"}))
    real = [run for pairs in found.values() for pair in pairs for run, _ in pair.values()]
    spread = {name: Spread.of(getattr(run, name) for run in real) for name in ("factor", "gap", "kept", "plan")}
    spread["scale"] = Spread.of(bench.scales)
    asked = derive(artifact, fitted.cost, next(iter(traces.values()))).urgency
    out.print(
        f"asked for: a first token after {asked.ttft:.3g} s and {asked.tpot * 1e3:.3g} ms a token, times what steps"
        f" took at present, {spread['scale'].text()}; load 1 is "
        + ", ".join(f"{rate:.3g} requests/s of {name}" for name, rate in bench.rates.items())
        + f" by that\nsteps took {spread['factor'].text()} times what was then predicted; no step ran for"
        f" {spread['gap'].text(100, 0)} % of the time with requests; others had {spread['kept'].text(100, 0)} % of the"
        f" cores' time; a decision took {spread['plan'].text(1e3)} ms; {bench.again} pairs were made again",
        highlight=False,
    )
    footer(out)
    settings = {
        "shape": artifact.name, "minutes": options.minutes, "lengths_scale": SCALE, "asked_ms": vars(asked),
        "load_1_requests_per_second": bench.rates, "fidelity": fitted.fidelity, "made_again": bench.again,
    }  # fmt: skip
    runs = {
        f"{name}, {what} {load:g}": [
            {policy: {"real": _figures(run), "simulated": _figures(told)} for policy, (run, told) in pair.items()}
            for pair in pairs
        ]
        for (name, what, load), pairs in found.items()
    }
    save(options.out, "goodput-real", settings, {"machine": spread, "runs": runs})


def _line(seed: int, plan: tuple[str, str, float], pair: Pair) -> str:
    told = "; ".join(
        f"{policy} {run.attainment:.0%} in time, simulated {other.attainment:.0%}, TPOT {run.tpot * 1e3:.1f} ms"
        for policy, (run, other) in pair.items()
    )
    return f"round {seed + 1}, {', '.join(map(str, plan))}: {told}"


def _figures(run: Run) -> dict[str, Any]:
    tpot, ttft = [one.tpot for one in run.served], [one.ttft for one in run.served]
    return {
        "requests": len(run.served), "good_per_second": run.good, "attainment": run.attainment,
        "tpot_mean": run.tpot, "tpot_p99": percentile(tpot, 0.99), "ttft_p50": percentile(ttft, 0.5),
        "ttft_p90": percentile(ttft, 0.9), "preemptions": run.preemptions, "step_factor": run.factor, "gap": run.gap,
        "kept": run.kept, "plan": run.plan,
    }  # fmt: skip


def _good(name: str, found: Mapping[tuple[str, str, float], Sequence[Pair]]) -> Table:
    made = table(f"{name}: requests in time, served and (second) simulated",
                 "arrivals", "rounds", f"{BASE}: in time/s", "mix", "mix / chunked", "simulated", f"{BASE}: %",
                 "simulated", "mix: %", "simulated")  # fmt: skip
    for (trace, _, load), pairs in found.items():
        sides = [{policy: [pair[policy][at] for pair in pairs] for policy in PAIRS["load"]} for at in (0, 1)]
        compared = [ratios([run.good for run in of["mix"]], [run.good for run in of[BASE]]) for of in sides]
        made.add_row(
            f"{trace}, load {load:g}",
            str(len(pairs)),
            *(Spread.of(run.good for run in sides[0][policy]).text() for policy in PAIRS["load"]),
            *(Spread.of(each).text() for each in compared),
            *(Spread.of(run.attainment for run in of[policy]).text(100, 0) for policy in PAIRS["load"] for of in sides),
        )
    return made


def _tight(found: Mapping[tuple[str, str, float], Sequence[Pair]]) -> Table:
    made = table("too little memory", "arrivals, policy", "TPOT ms: mean", "TTFT s: p50", "preemptions", "simulated",
                 f"TPOT / {BASE}", "simulated")  # fmt: skip
    for (trace, what, _), pairs in found.items():
        for policy in PAIRS[what]:
            real = [pair[policy][0] for pair in pairs]
            compared = [ratios([p[policy][at].tpot for p in pairs], [p[BASE][at].tpot for p in pairs]) for at in (0, 1)]
            made.add_row(
                f"{trace}, {policy}",
                Spread.of(run.tpot for run in real).text(1e3, 1),
                Spread.of(percentile([one.ttft for one in run.served], 0.5) for run in real).text(),
                *(Spread.of(pair[policy][at].preemptions for pair in pairs).text(1, 0) for at in (0, 1)),
                *(Spread.of(each).text() for each in compared),
            )
    return made


def _arrivals(lengths: Lengths, setting: Setting, count: int, seed: int) -> Callable[[float], list[Arrival]]:
    return lambda rate: window(lengths, count, seed, rate, setting)


def _request(name: str, one: Arrival, vocab: int, at: float, seed: str) -> Request:
    """Random ids, of which no two requests share a beginning."""
    source = random.Random(seed)
    prompt = tuple(source.randrange(vocab) for _ in range(one.prompt))
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=one.output)
    return Request(name, prompt, params, arrival=at, urgency=one.urgency)


def _timed(plan: Callable[[], Any], plans: list[float]) -> Callable[[], Any]:
    def timed() -> Any:
        begin = time.perf_counter()
        found = plan()
        plans.append(time.perf_counter() - begin)
        return found

    return timed


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what at least one of the spans covers."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _waited() -> float:
    """Seconds that threads of this process were ready to run and had no core."""
    return sum(wait for _, wait in thread_times().values()) / 1e9
