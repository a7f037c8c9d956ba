"""Servers of contenders under one load: 16 clients at once, or one request from the start of the process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from bench import load
from bench.peers.contenders import HOME, NATIVE, XLLM, Contender, environment
from bench.peers.with_vllm import FREE_MEMORY
from bench.server import serving

START_SECONDS = 240.0


class Asked(Protocol):
    """What a workload tells: clients at once, tokens in, tokens out."""

    @property
    def sequences(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def output(self) -> int: ...


def measure(contender: Contender, model: Path, asked: Asked, vocab: int, threads: int) -> dict[str, Any]:
    """Figures of one server process: its start, then one request of each client. Raises RuntimeError where one failed.

    The start counts from the process to the first token at a client that asks as soon as the server answers at all.
    """
    letter = _letter(model)
    with _running(contender, model, asked, threads) as (url, name, started):
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
def _running(contender: Contender, model: Path, asked: Asked, threads: int) -> Iterator[tuple[str, str, float]]:
    """(url, model name, time of the start) of a server that answers."""
    if contender is XLLM:
        with serving(model, "--threads", str(threads)) as server:
            with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
                name = json.load(answer)["data"][0]["id"]
            yield server.url, name, server.started
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, place, started = f"http://127.0.0.1:{port}", ["--host", "127.0.0.1", "--port", str(port)], time.perf_counter()
    command = (_llama if contender.adapter == "llamacpp" else _vllm)(contender, model, asked, threads)
    with (HOME / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *place], stdout=log, stderr=log, env=environment(contender), start_new_session=True
        )
    try:
        while not _healthy(url):
            if process.poll() is not None or time.perf_counter() - started > START_SECONDS:
                text = (HOME / "server.log").read_text()[-160:]
                raise RuntimeError(f"the server of {contender.name} does not answer: {text}")
            time.sleep(0.01)
        yield url, model.stem, started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
        process.wait()


def _llama(contender: Contender, model: Path, asked: Asked, threads: int) -> list[str | Path]:
    context = asked.sequences * -(-(asked.prompt + asked.output) // 256) * 256
    return [
        NATIVE / "bin" / "llama-server", "-m", model, "-t", str(threads), "-np", str(asked.sequences),
        "-c", str(context), "--no-warmup", "--cache-ram", "0",
    ]  # fmt: skip


def _vllm(contender: Contender, model: Path, asked: Asked, threads: int) -> list[str | Path]:
    each = -(-(asked.prompt + asked.output) // 128)  # pages of 128 tokens
    return [
        contender.python, "-m", "vllm.entrypoints.openai.api_server",  # its `vllm serve` asks for a package `vllm`
        "--model", model, "--served-model-name", model.stem, "--dtype", "bfloat16",
        "--max-model-len", str(128 * each), "--max-num-seqs", str(asked.sequences),
        "--num-gpu-blocks-override", str(asked.sequences * each + 1), "--no-enable-prefix-caching",
        "--gpu-memory-utilization", str(FREE_MEMORY),
    ]  # fmt: skip


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False
