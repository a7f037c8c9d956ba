"""`xllm serve` as a process under measurement: when it said what, what it mapped, how much memory it held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 60.0
LISTENING = "listening on "
LEDGER = "memory of "


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process by what is behind them. `peak` is the most it ever held, shared pages included.

    weights: pages of the artifact, shared between processes. kv: pages of the pool. anonymous: arena, heaps, stacks.
    code: pages of executables and libraries.
    """

    peak: int
    weights: int
    kv: int
    anonymous: int
    code: int

    @property
    def above(self) -> int:
        """The peak beyond weights and KV: what the process itself costs, arena included."""
        return self.peak - self.weights - self.kv


@dataclass
class Server:
    """A running server. `ledger` and `listening` are seconds after `started` (a time.perf_counter)."""

    process: subprocess.Popen[str]
    started: float
    url: str = ""
    ledger: float = 0.0
    listening: float = 0.0
    stderr: str = ""  # known when it has ended

    def memory(self) -> Memory:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        resident = {"weights": 0, "kv": 0, "anonymous": 0, "code": 0}
        kind = "anonymous"
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                kind = _kind(rest.split(maxsplit=4)[4:])
            elif name == "Rss:":
                resident[kind] += int(rest.split()[0]) * 1024
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
        return Memory(peak, **resident)

    def maps(self) -> set[str]:
        """Files the process has mapped."""
        lines = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        return {parts[5] for line in lines if len(parts := line.split(maxsplit=5)) == 6}


@contextmanager
def serving(artifact: Path, *flags: str, interpreter: Sequence[str] = ()) -> Iterator[Server]:
    """A server on a free port of this host, stopped with the block. `interpreter`: flags of Python.

    Raises RuntimeError with what it printed when it ends before it listens.
    """
    # What the installed `xllm` script does, without depending on where it was installed.
    entry = "import sys; from xllm.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        *interpreter,
        "-c",
        entry,
        "serve",
        artifact,
        "--port",
        "0",
        "--log-level",
        "error",
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop a server that says much
        started = time.perf_counter()
        # What is installed has its bytecode beside it: a setting that keeps Python from writing it is not of the start.
        settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=settings)
        server = Server(process, started)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(LEDGER):
                    server.ledger = time.perf_counter() - started
                if line.startswith(LISTENING):
                    server.listening = time.perf_counter() - started
                    server.url = line.removeprefix(LISTENING).strip()
                    break
            else:
                errors.seek(0)
                raise RuntimeError(f"the server ended before it listened: {errors.read()}")
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            finally:
                process.stdout.close()
                errors.seek(0)
                server.stderr = errors.read()


def _kind(name: Sequence[str]) -> str:
    """What is behind a mapping, from its name in smaps."""
    path = name[0] if name else ""
    if path.endswith(".safetensors"):
        return "weights"
    if path.startswith("/memfd:"):
        return "kv"
    return "code" if path.startswith("/") and "(deleted)" not in path and "zero" not in path else "anonymous"
