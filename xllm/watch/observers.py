"""Who looks at a server, as its flags say: nobody, a histogram of its steps, a profiler that a route starts."""

from __future__ import annotations

import os
from pathlib import Path

from xllm.artifact import Artifact
from xllm.runtime.executor import Executor
from xllm.traffic import Traffic, TrafficFile
from xllm.watch.executor import WatchedExecutor


class Observers:
    """traffic: the file to keep the histogram in. Raises ValueError for one that can't be written."""

    def __init__(self, traffic: Path | None) -> None:
        self._traffic = None
        self._file = None
        if traffic is not None:
            _check_folder(traffic.parent, "--record-traffic")
            if traffic.is_dir():
                raise ValueError(f"--record-traffic {traffic} is a folder: name a file")
            self._traffic = Traffic()
            self._file = TrafficFile(self._traffic, traffic)

    def watch(self, executor: Executor, artifact: Artifact) -> Executor:
        """The executor as who looks at it sees it; itself where nobody does."""
        if self._traffic is None:
            return executor
        return WatchedExecutor(executor, [bucket.T for bucket in artifact.plan.buckets], self._traffic)

    def close(self) -> None:
        """Writes what is to be written; the engine has ended."""
        if self._file is not None:
            self._file.close()


def _check_folder(folder: Path, flag: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {folder} is not a folder that can be written to")
