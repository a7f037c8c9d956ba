"""Servers of contenders under one load: 16 clients at once, or one request from the start of the process."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bench import load
from bench.peers.contenders import HOME, NATIVE
from bench.server import serving

START_SECONDS = 120.0


class Asked(Protocol):
    """What a workload tells: clients at once, tokens in, tokens out."""

    @property
    def sequences(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def output(self) -> int: ...


def measure(adapter: str, model: Path, asked: Asked, vocab: int, threads: int) -> dict[str, Any]:
    """Figures of one server process: its start, then one request of each client. Raises RuntimeError where one failed.

    The start counts from the process to the first token at a client that asks as soon as the server answers at all.
    """
    letter = _letter(model)
    with _running(adapter, model, asked, threads) as (url, name, started):
        target = load.Target(url, name, letter)
        first = _sent(target, load.uniform(1, 16, 4, vocab, seed=3), 1)
        began = first[0].events[0] - started
        if asked.sequences == 1:
            return {"first_token_seconds": began}
        summary = load.summarize(
            _sent(target, load.uniform(asked.sequences, asked.prompt, asked.output, vocab, seed=4), asked.sequences)
        )
    return {
        "first_token_seconds": began,
        "total_tokens_per_second": summary.output_tokens_per_second,
        "itl_p99_ms": summary.itl["p99"] * 1e3,
        "ttft_p50_seconds": summary.ttft["p50"],
    }


def _sent(target: load.Target, works: list[load.Work], clients: int) -> list[load.Outcome]:
    outcomes = asyncio.run(load.closed_loop(target, works, clients))
    if errors := {outcome.error for outcome in outcomes if outcome.error}:
        raise RuntimeError(f"requests failed: {', '.join(sorted(errors))}")
    return outcomes


def _letter(model: Path) -> dict[str, Any]:
    """Fields of a body that make every token one letter, as `load.one_letter` says, of the model's checkpoint."""
    tokenizer = json.loads((model.parent / "checkpoint" / "tokenizer.json").read_text())
    return {"logit_bias": {str(tokenizer["model"]["vocab"]["a"]): 100}}


@contextmanager
def _running(adapter: str, model: Path, asked: Asked, threads: int) -> Iterator[tuple[str, str, float]]:
    """(url, model name, time of the start) of a server that answers."""
    if adapter == "xllm":
        with serving(model, "--threads", str(threads)) as server:
            with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
                name = json.load(answer)["data"][0]["id"]
            yield server.url, name, server.started
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = asked.sequences * -(-(asked.prompt + asked.output) // 256) * 256
    command = [
        NATIVE / "bin" / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", str(threads),
        "-np", str(asked.sequences), "-c", str(context), "--no-warmup", "--cache-ram", "0",
    ]  # fmt: skip
    url, started = f"http://127.0.0.1:{port}", time.perf_counter()
    with (HOME / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not _healthy(url):
            if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                raise RuntimeError(f"llama-server does not answer: {(HOME / 'server.log').read_text()[-160:]}")
            time.sleep(0.01)
        yield url, model.stem, started
    finally:
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False
