"""The same bits whatever is on: each request alone on the plainest engine, then all of them together with everything.

    python -m bench.bits [--requests 2000] [--artifact DIR] [--seed 0]

Alone: one at a time, the plain loop, no prefix cache. Together: shuffled, overlapped, many more than the KV pages
hold, with the prefix cache and a tier in memory, under each scheduling policy, some cancelled half-way; drawn and
greedy, with penalties, logprobs, schemas, samples, common beginnings, offline beside online; then beam searches on what
the others left in the caches. A difference is a token, a logprob (bit for bit), an end, or a beam's score. Ends with 1
when there is one.
"""

from __future__ import annotations

import argparse
import queue
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.mix import SCHEMAS, WORDS
from bench.report import RESULTS, console, footer, save, table
from bench.subject import story
from xllm.artifact import Artifact
from xllm.llm import engine_config, open_model
from xllm.memory import plan_memory
from xllm.runtime import Request, SamplingParams, TokenOutput
from xllm.runtime.beams import BeamParams
from xllm.runtime.config import EngineStats, TierConfig
from xllm.runtime.engine import Engine
from xllm.runtime.urgency import Urgency
from xllm.service.grammar import Grammars
from xllm.service.tokenizer import TextCodec
from xllm.targets.cpu.executor import CpuExecutor

# What is on: preset and order of the scheduler, offline or not drawn by each request.
WAYS = (("chunked", None), ("continuous", None), ("mix", None), ("zero-evict", None), ("chunked", "sjf"))
PAGES_OF = 2  # sequences of full length that the KV pages hold, of 32 that may run
Said = tuple[tuple[tuple[int | None, float | None], ...], str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--artifact", type=Path, metavar="DIR", help="one that generates (default: the story model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "bits.json", metavar="FILE")
    options = parser.parse_args()
    out = console()
    with story(options.artifact) as path:
        artifact = open_model(path)
        asked = drawn(artifact, options.requests, options.seed)
        searched = [replace(one, id=f"beam {one.id}") for one in asked[:: max(1, len(asked) // 40)]]
        with running(artifact, alone=True) as (engine, outputs):
            expected = {one.id: together(engine, outputs, [one])[one.id] for one in asked}
            beams = {one.id: search(engine, outputs, one) for one in searched}
        made = table(
            f"{len(asked):,} requests and {len(searched)} beam searches, alone and together",
            *("together, under", "differences", "seconds", "preemptions", "cached tokens", "loaded", "cancelled"),
        )
        rows: dict[str, dict[str, Any]] = {}
        for way, order in WAYS:
            name = way if order is None else f"{way}, {order}"
            begin = time.perf_counter()
            with running(artifact, scheduler=way, order=order) as (engine, outputs):
                found = crowd(engine, outputs, asked, options.seed)
                wrong = sum(found[one.id] != expected[one.id] for one in asked)
                wrong += sum(search(engine, outputs, one) != beams[one.id] for one in searched)
                stats: EngineStats = engine.stats()
            seconds = time.perf_counter() - begin
            loaded = sum(tier.loaded for tier in stats.tiers)
            rows[name] = {
                "differences": wrong, "seconds": seconds, "preemptions": stats.preemptions,
                "cached_tokens": stats.cached_tokens, "loaded_groups": loaded, "cancelled": stats.cancelled,
            }  # fmt: skip
            made.add_row(name, *(f"{value:,.0f}" for value in rows[name].values()))
    out.print(made)
    footer(out)
    settings = {"requests": len(asked), "searches": len(searched), "seed": options.seed, "model": artifact.name}
    save(options.out, "bits", settings, rows)
    return 1 if any(row["differences"] for row in rows.values()) else 0


def drawn(artifact: Artifact, count: int, seed: int) -> list[Request]:
    """Requests of every kind."""
    source, codec = random.Random(seed), TextCodec.from_artifact(artifact.tokenizer, artifact.path)
    model = artifact.manifest["model"]
    grammars = Grammars(codec, model["vocab"], model["eos_ids"])
    forms = [grammars.of({"json": dict(schema)}) for schema in SCHEMAS]
    common = [" ".join(source.choices(WORDS, k=100)) for _ in range(6)]
    asked = []
    for at in range(count):
        text = " ".join(source.choices(WORDS, k=source.randrange(1, 60)))
        if source.random() < 0.4:
            text = f"{source.choice(common)} {text}"
        params = SamplingParams(
            temperature=source.choice((0.0, 0.7, 1.0)),
            top_p=source.choice((1.0, 0.9)),
            top_k=source.choice((0, 0, 20)),
            seed=source.randrange(1 << 30),
            presence_penalty=source.choice((0.0, 0.5)),
            repetition_penalty=source.choice((1.0, 1.2)),
            max_tokens=source.randrange(1, 160),
            logprobs=source.choice((0, 0, 3)),
            ignore_eos=(free := source.random() < 0.8),
            grammar=None if free else source.choice((None, *forms)),
        )
        urgency = Urgency(source.choice(("HIGH", "NORMAL", "LOW")), offline=source.random() < 0.3)
        asked.append(Request(f"{at}", tuple(codec.encode(text, True)), params, sample_index=at % 3, urgency=urgency))
    return asked


@contextmanager
def running(
    artifact: Artifact, alone: bool = False, scheduler: str = "chunked", order: str | None = None
) -> Iterator[tuple[Engine, queue.SimpleQueue[list[TokenOutput]]]]:
    """An engine, and what it says."""
    outputs: queue.SimpleQueue[list[TokenOutput]] = queue.SimpleQueue()
    ledger = plan_memory(artifact, None, 32, not alone)
    config = engine_config(artifact, ledger, None, not alone)
    if not alone:
        token = artifact.plan.kv.token_bytes
        full = artifact.manifest["limits"]["max_len"] * token
        tiers = TierConfig(host_bytes=4 * full, identity=artifact.manifest["digest"])
        config = replace(config, kv_bytes=PAGES_OF * full, page_bytes=1 << 16, tiers=tiers)
        config = replace(config, scheduler=scheduler, order=order)
    engine = Engine(CpuExecutor(artifact, 2), config, outputs.put)
    engine.start()
    try:
        yield engine, outputs
    finally:
        engine.stop()


def crowd(
    engine: Engine, outputs: queue.SimpleQueue[list[TokenOutput]], asked: Sequence[Request], seed: int
) -> dict[str, Said]:
    """All at once, in another order; a tenth as many more are asked for and cancelled half-way."""
    source = random.Random(seed + 1)
    shuffled = source.sample(list(asked), len(asked))
    lost = [replace(one, id=f"lost {one.id}") for one in source.sample(list(asked), len(asked) // 10)]
    return together(engine, outputs, [*shuffled, *lost], frozenset(one.id for one in lost))


def together(
    engine: Engine,
    outputs: queue.SimpleQueue[list[TokenOutput]],
    asked: Sequence[Request],
    lost: frozenset[str] = frozenset(),
) -> dict[str, Said]:
    """What becomes of requests, 400 of them in the engine at a time; those that are lost end after two tokens."""
    said: dict[str, list[tuple[int | None, float | None]]] = {one.id: [] for one in asked}
    ends: dict[str, str] = {}
    waiting, inside = list(reversed(asked)), 0
    while len(ends) < len(asked):
        while waiting and inside < 400:
            engine.submit(waiting.pop())
            inside += 1
        for output in outputs.get():
            if output.request_id not in said:
                continue
            if output.token is not None:
                said[output.request_id].append((output.token, output.logprob))
            if output.request_id in lost and output.index == 1:
                engine.cancel(output.request_id)
            if output.finish_reason is not None:
                ends[output.request_id] = output.error or output.finish_reason
                inside -= 1
    return {name: (tuple(tokens), ends[name]) for name, tokens in said.items()}


def search(
    engine: Engine, outputs: queue.SimpleQueue[list[TokenOutput]], one: Request
) -> list[tuple[float, tuple[int, ...]]]:
    """The beams of a request, of eight tokens at most, with their scores."""
    engine.submit(replace(one, params=SamplingParams(temperature=0, max_tokens=8), beams=BeamParams(3)))
    while True:
        for output in outputs.get():
            if output.request_id == one.id:
                assert output.error is None, output.error
                return [(found.score, tuple(found.beam.tokens)) for found in output.found]


if __name__ == "__main__":
    sys.exit(main())
