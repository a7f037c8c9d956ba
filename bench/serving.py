"""How fast a server answers: one sequence beside what the machine can do, then many, over HTTP on loopback.

    python -m bench.serving [--checkpoint DIR] [--artifact DIR] [--quick] [--rate R] [--trace FILE.csv]
    python -m bench.serving --url http://127.0.0.1:8000     the loads alone, on a server that runs already

The first table is a ladder: the executor alone, the engine around it, HTTP around that, and transformers on the same
checkpoint. Decode is set against the time to read the weights once, prefill against the multiply peak, both measured
around each rung. The second table is load: closed with so many clients, then Poisson arrivals and a trace if asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import inprocess, load, peer, report
from bench.inprocess import Demand, Rates
from bench.report import RESULTS, Ceiling, Spread, footer, save, table
from bench.server import serving
from bench.subject import Subject, add_flags, subject
from xllm.artifact import Artifact

BASE = "xllm serve, HTTP"


@dataclass(frozen=True)
class Rung:
    """One way to run one sequence, and its share of what the machine could do around it (`ceiling`)."""

    prefill_seconds: Spread
    step_seconds: Spread
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    ceiling: Ceiling
    prefill_share: float
    decode_share: float

    @staticmethod
    def of(rates: Sequence[Rates], ceiling: Ceiling, demand: Demand, prompt_tokens: int) -> Rung:
        prefill = Spread.of(rate.prefill_seconds for rate in rates)
        step = Spread.of(rate.step_seconds for rate in rates)
        return Rung(
            prefill,
            step,
            prompt_tokens / prefill.median,
            1 / step.median,
            ceiling,
            demand.prefill_flops / prefill.median / ceiling.flops_per_second,
            demand.step_bytes / step.median / ceiling.read_bytes_per_second,
        )


def http_rates(target: load.Target, vocab: int, prompt: int, output: int, repeats: int) -> list[Rates]:
    """One client, one request at a time; the first is not counted."""
    works = load.uniform(repeats + 1, prompt, output, vocab, seed=1)
    found = [load.summarize([outcome]) for outcome in asyncio.run(load.closed_loop(target, works, 1))]
    if errors := [one.errors for one in found if one.errors]:
        raise RuntimeError(f"requests failed: {errors}")
    return [Rates(one.ttft["p50"], one.itl["p50"]) for one in found[1:]]


def ladder(given: Subject, options: argparse.Namespace, console: Console) -> tuple[Demand, dict[str, Rung]]:
    """Every rung, one after another: nothing else of ours runs meanwhile."""
    prompt, output, threads, repeats = options.ladder_prompt, options.ladder_output, options.threads, options.repeats
    artifact = Artifact.open(given.artifact)
    needed = inprocess.demand(artifact.plan, prompt, output)

    def http() -> list[Rates]:
        with serving(given.artifact, "--threads", str(threads)) as server:
            target = load.Target(server.url, artifact.name, load.one_letter(artifact))
            return http_rates(target, artifact.manifest["model"]["vocab"], prompt, output, repeats)

    rungs: dict[str, Callable[[], list[Rates]]] = {
        "xllm executor": lambda: inprocess.executor_rates(given.artifact, threads, prompt, output, repeats),
        "xllm engine": lambda: inprocess.engine_rates(given.artifact, threads, prompt, output, repeats),
        BASE: http,
    }
    for dtype in peer.DTYPES if options.peer else ():
        rungs[f"transformers eager, {dtype}"] = lambda dtype=dtype: [
            peer.measured(given.checkpoint, dtype, threads, prompt, options.peer_output)
        ]
    found, before = {}, Ceiling.measure(threads)
    for name, run in rungs.items():
        with console.status(f"one sequence: {name}"):
            rates = run()
        after = Ceiling.measure(threads)
        found[name] = Rung.of(rates, Ceiling.best([before, after]), needed, prompt)
        before = after
    return needed, found


def loads(
    target: load.Target, vocab: int, options: argparse.Namespace, console: Console
) -> tuple[dict[str, list[load.Summary]], float]:
    """Summaries of every load, one for each repeat; and the share of one core that the client itself took."""
    makers: dict[str, Callable[[int], list[load.Outcome]]] = {}

    def works(count: int, seed: int) -> list[load.Work]:
        return load.uniform(count, options.prompt, options.output, vocab, seed)

    for clients in options.clients:
        makers[f"closed, {clients} client{'s' * (clients > 1)}"] = lambda seed, clients=clients: asyncio.run(
            load.closed_loop(target, works(clients * options.rounds, seed), clients)
        )
    if options.rate:
        makers[f"Poisson, {options.rate:g} requests/s"] = lambda seed: asyncio.run(
            load.open_loop(target, load.poisson(works(options.requests, seed), options.rate, seed))
        )
    if options.trace:
        fitted = load.TraceOptions(
            options.requests, options.trace_speed, options.trace_scale, options.max_prompt, options.max_output
        )
        makers[f"trace {options.trace.stem}"] = lambda seed: asyncio.run(
            load.open_loop(target, load.replay(options.trace, fitted, vocab, seed))
        )
    found, begin, own = {}, time.perf_counter(), time.process_time()
    for name, make in makers.items():
        with console.status(f"load: {name}"):
            found[name] = [load.summarize(make(seed)) for seed in range(options.repeats)]
    return found, (time.process_time() - own) / (time.perf_counter() - begin)


def main() -> None:
    options = _options()
    console = report.console()
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "prompt",
            "output",
            "rounds",
            "repeats",
            "threads",
            "ladder_prompt",
            "ladder_output",
            "peer_output",
        )
    }
    results: dict[str, Any] = {}
    if options.rate or options.trace:
        settings |= {"requests": options.requests, "rate": options.rate, "trace": options.trace and options.trace.stem}
        settings |= {n: getattr(options, n) for n in ("trace_speed", "trace_scale", "max_prompt", "max_output")}
    with ExitStack() as stack:
        if options.url:
            target, vocab = _running(options.url), options.vocab
        else:
            given = stack.enter_context(subject(options, console))
            artifact = Artifact.open(given.artifact)
            settings |= {"shape": options.shape, "artifact": artifact.manifest["digest"]}
            if options.ladder:
                one = [Ceiling.measure(1)]
                needed, rungs = ladder(given, options, console)
                one.append(Ceiling.measure(1))
                single = Ceiling.best(one)
                console.print(_ladder_table(rungs, options))
                console.print(_ladder_notes(needed, rungs[BASE].ceiling, single, options), highlight=False)
                results |= {"demand": needed, "one_sequence": rungs, "ceiling_one_thread": single}
            server = stack.enter_context(serving(given.artifact, "--threads", str(options.threads)))
            target = load.Target(server.url, artifact.name, load.one_letter(artifact))
            vocab = artifact.manifest["model"]["vocab"]
        load.summarize(asyncio.run(load.closed_loop(target, load.uniform(1, 16, 4, vocab, seed=2), 1)))  # warm
        summaries, client_share = loads(target, vocab, options, console)
    figures = {name: _figures(runs) for name, runs in summaries.items()}
    console.print(_load_table(summaries, figures, options))
    console.print(f"the client took {client_share:.1%} of one core")
    footer(console)
    results["client_share_of_a_core"] = client_share
    results["loads"] = {
        name: {"figures": figures[name], "errors": [run.errors for run in runs]} for name, runs in summaries.items()
    }
    save(options.out, "serving", settings, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--url", help="load this server instead of starting one; no first table then")
    parser.add_argument("--vocab", type=int, default=1000, help="with --url: prompts are random ids below this")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16], help="of the closed loads")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--output", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--rate", type=float, help="also Poisson arrivals, requests a second")
    parser.add_argument("--trace", type=Path, metavar="CSV", help="also the arrivals and lengths of this trace")
    parser.add_argument("--requests", type=int, default=50, help="of the Poisson load and of the trace")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="compresses time, so that bursts stay bursts")
    parser.add_argument("--trace-scale", type=float, default=1.0, help="multiplies lengths")
    parser.add_argument("--max-prompt", type=int, default=1024, help="caps prompts of the trace")
    parser.add_argument("--max-output", type=int, default=128, help="caps answers of the trace")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the server and of its peer"
    )
    parser.add_argument("--ladder-prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--ladder-output", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--peer-output", type=int, default=8, metavar="TOKENS")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    parser.add_argument("--no-ladder", dest="ladder", action="store_false", help="leave the first table out")
    parser.add_argument("--quick", action="store_true", help="one repeat, short answers, no peer")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.rounds, options.output, options.ladder_output, options.peer = 1, 1, 16, 8, False
    return options


def _running(url: str) -> load.Target:
    with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
        return load.Target(url.rstrip("/"), json.load(answer)["data"][0]["id"])


def _figures(runs: Sequence[load.Summary]) -> dict[str, Spread]:
    """Every figure of a load over its repeats."""
    flat = [dict(load.flat(run)) for run in runs]
    return {name: Spread.of(one[name] for one in flat) for name in flat[0]}


def _ladder_table(rungs: dict[str, Rung], options: argparse.Namespace) -> Table:
    base = rungs[BASE]
    made = table(
        f"one sequence, {options.ladder_prompt} prompt tokens, {options.threads} threads",
        "run by", "prefill s", "tokens/s", "of multiply peak", "x xllm",
        "step ms", "tokens/s", "of read bound", "x xllm",
    )  # fmt: skip
    for name, rung in rungs.items():
        made.add_row(
            name,
            rung.prefill_seconds.text(1, 2),
            f"{rung.prefill_tokens_per_second:.0f}",
            f"{rung.prefill_share:.0%}",
            f"{rung.prefill_seconds.median / base.prefill_seconds.median:.2f}",
            rung.step_seconds.text(1e3, 1),
            f"{rung.decode_tokens_per_second:.1f}",
            f"{rung.decode_share:.0%}",
            f"{rung.step_seconds.median / base.step_seconds.median:.2f}",
        )
    return made


def _ladder_notes(needed: Demand, ceiling: Ceiling, single: Ceiling, options: argparse.Namespace) -> str:
    machine = " · ".join(
        f"{one.threads} thread{'s' * (one.threads > 1)}: reads {one.read_bytes_per_second / 1e9:.1f} GB/s, multiplies "
        f"{one.flops_per_second / 1e9:.0f} GFLOP/s"
        for one in (single, ceiling)
    )
    return (
        f"the prompt takes {needed.prefill_flops / 1e9:,.0f} GFLOP; a step reads {needed.step_bytes / 1e6:,.0f} MB of "
        f"weights, keys and values\n{machine}\n"
        f"x xllm: times as long as `{BASE}`; its prefill is the time to the first token"
    )


def _load_table(
    summaries: dict[str, list[load.Summary]], figures: dict[str, dict[str, Spread]], options: argparse.Namespace
) -> Table:
    made = table(
        f"load: {options.prompt} prompt tokens, {options.output} output tokens, {options.repeats} repeats",
        "load", "requests", "errors", "TTFT s: p50", "p90 / p99", "ITL ms: p50", "p90 / p99", "end to end s: p50",
        "output tokens/s", "all tokens/s",
    )  # fmt: skip
    for name, runs in summaries.items():
        of = figures[name]
        made.add_row(
            name,
            str(sum(run.requests for run in runs)),
            str(sum(sum(run.errors.values()) for run in runs)),
            of["ttft.p50"].text(1, 2),
            f"{of['ttft.p90'].median:,.2f} / {of['ttft.p99'].median:,.2f}",
            of["itl.p50"].text(1e3, 0),
            f"{of['itl.p90'].median * 1e3:,.0f} / {of['itl.p99'].median * 1e3:,.0f}",
            of["end_to_end.p50"].text(1, 2),
            of["output_tokens_per_second"].text(1, 1),
            of["total_tokens_per_second"].text(1, 1),
        )
    return made


if __name__ == "__main__":
    main()
