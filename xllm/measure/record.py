"""The profile of an artifact on one machine, as a file beside it: the artifact is sealed, and other machines have other
times. No hosts, paths or dates, so that a profile can be shared and compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from xllm import typed
from xllm.artifact import Artifact, ArtifactError
from xllm.measure.machine import Machine

SCHEMA = 1
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class StepProfile:
    """Medians over `repeats` steps of one shape, in seconds.

    sequences: tokens of the step and tokens before them, of each. calls: of every call of the plan. sample: choosing
    tokens, or copying rows. step: the whole step by the executor, from launch to result; host: what of it is neither
    calls nor sampling. engine_step, engine_host: the same of the engine's loop, from one step's end to the next; none
    where the engine runs no such steps in a row.
    """

    name: str
    sequences: tuple[tuple[int, int], ...]
    repeats: int
    calls: tuple[float, ...]
    sample: float
    step: float
    host: float
    engine_step: float | None = None
    engine_host: float | None = None


@dataclass(frozen=True)
class Profile:
    """artifact: the digest of its manifest."""

    artifact: str
    machine: Machine
    steps: tuple[StepProfile, ...]

    def to_json(self) -> bytes:
        body = {"schema": SCHEMA, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n"


def profile_path(artifact: Path) -> Path:
    """Where the profile of the artifact at `artifact` lies unless told otherwise: qwen.xllm.profile.json."""
    return artifact.with_name(f"{artifact.name}.profile.json")


def read_profile(path: Path, artifact: Artifact) -> Profile:
    """Raises ArtifactError for a file that is no profile, or one of another artifact."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        body = typed.decode(path.read_bytes(), dict)
        if body.pop("schema", None) != SCHEMA:
            raise ValueError(f"it is not of schema {SCHEMA}")
        profile = typed.convert(body, Profile)
    except FileNotFoundError:
        raise ArtifactError("no-profile", f"{path} is not there; run `xllm profile {artifact.path}`") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError("not-a-profile", f"{path} is no profile: {error}; run `xllm profile` again") from error
    if profile.artifact != artifact.manifest["digest"]:
        raise ArtifactError("other-profile", f"{path} is of another artifact; run `xllm profile {artifact.path}` again")
    calls = len(artifact.plan.calls)
    if any(len(step.calls) != calls or not all(map(math.isfinite, step.calls)) for step in profile.steps):
        raise ArtifactError(
            "not-a-profile", f"{path} has not a time for each of {calls} calls; run `xllm profile` again"
        )
    return profile
