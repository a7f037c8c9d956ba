"""What ten times too much does: every request ends in an answer or a typed error, and those served are served in time.

    python -m bench.overload [--times 10] [--minutes 5] [--max-wait 10] [--artifact DIR]

First so many clients find what the server sustains, each sending its next request when the last has ended. Then
requests leave at `times` that rate, whatever the server does. `xllm serve --max-wait` bounds what may wait: a request
that comes when more is ahead gets 429 and a time to come again. In time is a first token within max-wait and half of
it again, for what decodes in between. Ends with 1 when a request ended otherwise, or the server grew.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import load
from bench.load import Outcome, Target, Work
from bench.report import RESULTS, console, footer, percentile, save, table
from bench.server import serving
from bench.subject import add_flags, subject
from xllm.artifact import Artifact

REFUSED = "status 429"
SLACK = 1.5
GROWTH_BYTES = 32 << 20  # of heaps that hold more at a time than before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=(__doc__ or "").splitlines()[0])
    add_flags(parser)
    parser.add_argument("--times", type=float, default=10.0, metavar="X", help="what is sustained (default 10)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="of overload (default 5)")
    parser.add_argument("--max-wait", type=int, default=10, metavar="S", help="of xllm serve, seconds (default 10)")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="that find the rate (default 8)")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens, at most (default 128)")
    parser.add_argument("--output", type=int, default=32, metavar="N", help="tokens, at most (default 32)")
    parser.add_argument("--out", type=Path, default=RESULTS / "overload.json", metavar="FILE")
    options = parser.parse_args()
    out = console()
    flags = ("--max-wait", str(options.max_wait), "--max-concurrent-requests", "0")
    with subject(options, out) as given, serving(given.artifact, *flags) as server:
        artifact = Artifact.open(given.artifact)
        extra, vocab = load.one_letter(artifact), artifact.manifest["model"]["vocab"]
        target = Target(server.url, artifact.name, extra)
        works = _works(8 * options.clients, options.prompt, options.output, vocab, seed=0)
        asyncio.run(load.closed_loop(target, works[: options.clients], options.clients))  # what first steps pay
        with out.status("what is sustained"):
            steady = asyncio.run(load.closed_loop(target, works, options.clients))
        rate = len(steady) / load.summarize(steady).seconds
        before = server.memory().anonymous
        count = math.ceil(rate * options.times * options.minutes * 60)
        flood = load.poisson(_works(count, options.prompt, options.output, vocab, seed=1), rate * options.times, seed=1)
        with out.status(f"{count:,} requests in {options.minutes:g} minutes"):
            flooded = asyncio.run(load.open_loop(target, flood))
        after = server.memory().anonymous
        alive = _healthy(server.url)
    found = {"sustained": _figures(steady, options.max_wait), "overload": _figures(flooded, options.max_wait)}
    made = table(f"xllm serve, {artifact.name}: {rate:.2f} requests/s sustained, then {options.times:g} times that",
                 "", *found)  # fmt: skip
    for name, scale, digits in (
        ("requests", 1, 0), ("served", 1, 0), ("refused", 1, 0), ("other", 1, 0), ("served_per_second", 1, 2),
        ("ttft_p50", 1, 2), ("ttft_p99", 1, 2), ("itl_p99", 1e3, 0), ("in_time", 100, 1),
    ):  # fmt: skip
        unit = {"ttft_p50": " s", "ttft_p99": " s", "itl_p99": " ms", "in_time": " %"}.get(name, "")
        made.add_row(name.replace("_", " ") + unit, *(f"{one[name] * scale:,.{digits}f}" for one in found.values()))
    out.print(made)
    grown = after - before
    out.print(
        f"memory: {before / 1e6:,.0f} MB of heaps before, {grown / 1e6:+,.1f} MB after; the server "
        f"{'answers' if alive else 'DOES NOT ANSWER'}; in time is a first token within {options.max_wait * SLACK:g} s",
        highlight=False,
    )
    for what, many in Counter(outcome.error for outcome in flooded).items():
        out.print(f"  {many} x {what or 'answered'}", highlight=False)
    footer(out)
    settings = {
        "model": artifact.name, "artifact": artifact.manifest["digest"], "times": options.times,
        "minutes": options.minutes, "max_wait_seconds": options.max_wait, "clients": options.clients,
        "prompt_tokens": options.prompt, "output_tokens": options.output,
    }  # fmt: skip
    save(options.out, "overload", settings, {"sustained_per_second": rate, "grown_bytes": grown, **found})
    return 1 if found["overload"]["other"] or grown > GROWTH_BYTES or not alive else 0


def _works(count: int, prompt: int, output: int, vocab: int, seed: int) -> list[Work]:
    """Lengths from a quarter of the most to the most."""
    source = random.Random(seed)

    def some(most: int) -> int:
        return source.randrange(max(1, most // 4), most + 1)

    return [Work(tuple(source.randrange(vocab) for _ in range(some(prompt))), some(output)) for _ in range(count)]


def _figures(outcomes: Sequence[Outcome], max_wait: float) -> dict[str, float]:
    summary = load.summarize(outcomes)
    served = [outcome for outcome in outcomes if outcome.error is None]
    first = [outcome.events[0] - outcome.start for outcome in served if outcome.events]
    refused = summary.errors.get(REFUSED, 0)
    return {
        "requests": len(outcomes),
        "served": len(served),
        "refused": refused,
        "other": len(outcomes) - len(served) - refused,
        "served_per_second": len(served) / summary.seconds,
        "ttft_p50": percentile(first, 0.5),
        "ttft_p99": percentile(first, 0.99),
        "itl_p99": summary.itl["p99"],
        "in_time": sum(seconds <= max_wait * SLACK for seconds in first) / len(first) if first else math.nan,
    }


def _healthy(url: str) -> bool:
    time.sleep(1)
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        return answer.status == 200


if __name__ == "__main__":
    sys.exit(main())
