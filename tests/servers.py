"""A real `xllm serve` on a free loopback port, stopped by process id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Server:
    """A running server: `said` is what it printed before it listened."""

    process: subprocess.Popen[str]
    url: str
    said: str

    def metric(self, name: str, model: str = "") -> float:
        """Value of an unlabelled metric, or the sum over its labels; of one model, where it is named."""
        label = f'model_name="{model}"' if model else ""
        lines = [line for line in httpx.get(f"{self.url}/metrics").text.splitlines() if label in line]
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        if not found:
            raise KeyError(f"the server has no metric {name}")
        return sum(found)

    def mapped_files(self) -> str:
        return Path(f"/proc/{self.process.pid}/maps").read_text()


@contextmanager
def serving(model: Path | Sequence[Path], *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Starts `xllm serve MODEL...`, waits until it listens, and ends it with SIGTERM (SIGKILL if that does not do). One
    that has crashed by then, or that never listened, fails the test with what it wrote of it."""
    models = [model] if isinstance(model, Path) else model
    command = [sys.executable, "-m", "xllm.cli", "serve", *map(str, models), "--port", "0", *flags]
    env = {**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        assert process.stdout is not None
        said = ""
        try:
            for line in process.stdout:
                said += line
                if line.startswith("listening on "):
                    yield Server(process, line.split()[-1], said)
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
            errors.seek(0)
            crashed = process.returncode < 0 and -process.returncode not in (signal.SIGTERM, signal.SIGKILL)
            if crashed or "listening on " not in said:
                raise AssertionError(f"the server ended with {process.returncode}: {said}{errors.read()[-4000:]}")
