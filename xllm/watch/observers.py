"""Who looks at a server, as its flags say: nobody, a histogram of its steps, a profiler that a route starts."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, cast

from xllm.artifact import Artifact
from xllm.files import KeptFile, write_whole
from xllm.runtime.executor import Executor
from xllm.runtime.policies.trace import Trace
from xllm.traffic import Traffic
from xllm.watch.executor import WatchedExecutor
from xllm.watch.profiler import Operator, Profiler, Recording, Timed

KEPT = 16  # profiles in the folder: the next one replaces the oldest


class Observers:
    """traffic: the file to keep the histogram in; profiles: the folder to write profiles to; decisions: the file to
    keep the latest in. Raises ValueError for what can't be written. `trace` is for the engine's settings."""

    def __init__(
        self, traffic: Path | None = None, profiles: Path | None = None, decisions: Path | None = None
    ) -> None:
        self._traffic = self.trace = None
        self._files: list[KeptFile] = []
        self.profiling: Profiles | None = None
        if profiles is not None:
            _check_folder(profiles, "--profile-dir")
            self.profiling = Profiles(profiles)
        if traffic is not None:
            _check_file(traffic, "--record-traffic")
            self._traffic = Traffic()
            self._files.append(KeptFile("traffic", self._traffic.to_json, traffic))
        if decisions is not None:
            _check_file(decisions, "--trace-decisions")
            self.trace = Trace()
            self._files.append(KeptFile("trace", self.trace.text, decisions))

    def watch(self, executor: Executor, artifact: Artifact) -> Executor:
        """The executor as who looks at it sees it; itself where nobody does."""
        if self._traffic is None and self.profiling is None:
            return executor
        buckets = [bucket.T for bucket in artifact.plan.buckets]
        profiler = None
        if self.profiling is not None:
            operators = [Operator(call.node, call.kernel) for call in artifact.plan.calls]
            profiler = self.profiling.profiler = Profiler(cast(Timed, executor), operators)
        return WatchedExecutor(executor, buckets, self._traffic, profiler)

    def close(self) -> None:
        """Writes what is to be written; the engine has ended."""
        for file in self._files:
            file.close()


class Profiles:
    """Profiles of one server in one folder: profile-00.trace.json, profile-00.svg and so on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._count = 0
        self._unwritten: Recording | None = None
        self.profiler: Profiler | None = None  # as soon as there is an engine

    def start(self) -> dict[str, Any]:
        assert self.profiler is not None
        return {"status": "running", "changed": self.profiler.start()}

    def stop(self) -> dict[str, Any]:
        """Writes what was recorded. Raises OSError; what could not be written is kept for the next call."""
        from xllm.watch.chrome import trace  # few ask for it
        from xllm.watch.flame import flame_graph

        assert self.profiler is not None
        with self._lock:
            recording = self._unwritten = self.profiler.stop() or self._unwritten
            if recording is None:
                return {"status": "stopped", "changed": False}
            name = f"profile-{self._count % KEPT:02}"
            files = {"trace": f"{name}.trace.json", "flame_graph": f"{name}.svg"}
            write_whole(self._folder / files["trace"], trace(recording))
            write_whole(self._folder / files["flame_graph"], flame_graph(recording))
            self._unwritten = None
            self._count += 1
        told = {"steps": len(recording.steps), "seconds": round(recording.ended - recording.began, 3)}
        return {"status": "stopped", "changed": True, **files, **told, "cut": recording.cut or None}


def _check_file(file: Path, flag: str) -> None:
    _check_folder(file.parent, flag)
    if file.is_dir():
        raise ValueError(f"{flag} {file} is a folder: name a file")


def _check_folder(folder: Path, flag: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {folder} is not a folder that can be written to")
