"""Decides what it takes to hold, put to sleep and update an engine with the artifact it serves. What `xllm serve` and
`LLM` share; all of it may be called from any thread."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Literal, cast

from xllm.artifact import Artifact, ArtifactError, differences
from xllm.runtime.engine import Engine
from xllm.runtime.errors import RequestRefused
from xllm.runtime.orders import Mode
from xllm.targets import host
from xllm.targets.cpu.executor import CpuExecutor

Level = Literal["light", "deep"]
Leaving = Literal["wait", "abort"]


def version_of(artifact: Artifact) -> str:
    """What tells its weights from others: the beginning of its digest."""
    return artifact.manifest["digest"][:16]


class EngineControl:
    """Of one engine on the CPU. require_signature: public key file of who must have signed other weights too. A future
    says whether anything changed, or has what was refused: RequestRefused; MemoryFault where memory is not given back,
    or not to be had again."""

    def __init__(
        self, engine: Engine, artifact: Artifact, require_signature: str | os.PathLike[str] | None = None
    ) -> None:
        self._engine, self._executor = engine, cast(CpuExecutor, engine.executor)  # or what stands before one
        self._artifact, self._require_signature = artifact, require_signature

    @property
    def paused(self) -> bool:
        return self._engine.paused

    @property
    def asleep(self) -> str:
        """ "light" or "deep"; empty while it is awake."""
        return self._engine.asleep

    @property
    def weights(self) -> str:
        """The version of the weights that are computed with."""
        return self._engine.stats().weights

    def pause(self, mode: Mode = "keep") -> Future[bool]:
        """As Engine.pause."""
        return self._engine.pause(mode)

    def resume(self) -> Future[bool]:
        return self._engine.resume()

    def sleep(self, level: Level = "light", mode: Leaving | None = None) -> Future[bool]:
        """Give memory back until `wake`: the weights leave this process and lie in the system's cache of files, which
        drops them when others need the room; KV pages and values are gone. "deep" drops the cached file as well. mode:
        as Engine.sleep."""

        def rest() -> None:
            self._executor.rest(level == "deep")
            host.trim()

        return self._engine.sleep(level, rest, mode)

    def wake(self) -> Future[bool]:
        """Read the weights again, all of them checked as at the start; weights_changed where they are others."""

        def rouse() -> None:
            try:
                self._executor.rouse()
            except ArtifactError as error:
                raise RequestRefused("weights_changed", str(error)) from error

        return self._engine.wake(rouse)

    def update_weights(
        self, path: str | os.PathLike[str], checksum: str | None = None, mode: Leaving = "wait"
    ) -> Future[bool]:
        """Compute with the weights of another artifact, compiled like this one, from the next step on that no request
        is in the middle of; see Engine.swap. They are read and checked here, while the engine goes on.

        checksum: the digest that its manifest must have. Raises RequestRefused: weights_unusable, checksum_mismatch,
        weights_incompatible with what differs.
        """
        try:
            other = Artifact.open(path, self._require_signature)
            if checksum is not None and checksum != other.manifest["digest"]:
                text = f"the artifact's digest is {other.manifest['digest']}, not {checksum[:64]}"
                raise RequestRefused("checksum_mismatch", text)
            if found := differences(self._artifact, other):
                text = f"it was not compiled like the artifact that is served: {'; '.join(found[:5])} differs"
                raise RequestRefused("weights_incompatible", text)
            mapped = other.map_weights(start_threads=self._executor.threads)
        except ArtifactError as error:
            raise RequestRefused("weights_unusable", str(error)) from error
        return self._engine.swap(version_of(other), lambda: self._executor.load(other, mapped), mode)


class Controlled:
    """The half of `LLM` that holds, puts to sleep and updates its engine; from any thread."""

    artifact: Artifact
    _control: EngineControl | None = None

    def pause(self, mode: Mode = "keep") -> bool:
        """Compute nothing until `resume`, which another thread calls: "keep" goes on where it was, to the same text,
        "wait" finishes first what runs, "abort" ends it (finish_reason cancelled). Whether it ran before."""
        return self._controlled.pause(mode).result()

    def resume(self) -> bool:
        """Whether it was paused."""
        return self._controlled.resume().result()

    def sleep(self, level: Level = "light", mode: Leaving | None = None) -> bool:
        """Give memory back until `wake_up`; level "deep" drops the weight file from the system's cache too. While
        something is generated: RequestRefused (engine_busy), unless `mode` says what becomes of it. Whether it did not
        sleep like this before."""
        return self._controlled.sleep(level, mode).result()

    def wake_up(self) -> bool:
        """Whether it slept. Raises RequestRefused (weights_changed) when they are not what they were; it sleeps on."""
        return self._controlled.wake().result()

    @property
    def is_sleeping(self) -> bool:
        return bool(self._controlled.asleep)

    def update_weights(self, path: str | os.PathLike[str], checksum: str | None = None, mode: Leaving = "wait") -> bool:
        """Generate with the weights of another artifact that was compiled like this one from now on. No prompt mixes
        the two: `mode` says what becomes of those that have begun. Whether they are others. Raises RequestRefused with
        what differs."""
        return self._controlled.update_weights(path, checksum, mode).result()

    @property
    def weights(self) -> str:
        """The version of the weights."""
        return self._controlled.weights

    @property
    def _controlled(self) -> EngineControl:
        if self._control is None:
            raise RequestRefused("wrong_task", f"{self.artifact.name} gives rows: only what generates is controlled")
        return self._control
