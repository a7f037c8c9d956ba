"""The cost model that was fitted to an artifact on this machine, as a file beside it: the artifact is sealed, and other
machines take other times. It is used by who it fits only, and whoever asks is told why it is not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from xllm import typed
from xllm.artifact import Artifact
from xllm.runtime.cost import StepCost
from xllm.targets import host

SCHEMA = 1
MAX_BYTES = 1 << 20
Share = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


@dataclass(frozen=True)
class Fidelity:
    """How well a model tells what steps take that it was not fitted to: |predicted - measured| / measured, the median
    and the 90th percentile of `held_out` steps. fitted: the steps it was fitted to. spread: by how much the runs of one
    step differ, (median - least) / least, the median over the steps: what no model explains."""

    held_out: Count
    fitted: Count
    median_error: Share
    p90_error: Share
    spread: Share


@dataclass(frozen=True)
class Fitted:
    """artifact: the digest of its manifest. cpu, threads: the machine it was measured on. largest: tokens of the
    largest step that was measured; beyond it the model goes straight on."""

    artifact: str
    cpu: str
    threads: Count
    largest: Count
    fidelity: Fidelity
    cost: StepCost

    def to_json(self) -> bytes:
        body = {"schema": SCHEMA, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(body), indent=1) + b"\n"

    @staticmethod
    def from_json(text: bytes) -> Fitted:
        """Raises ValueError saying what is not as it should be."""
        try:
            body = typed.decode(text, dict)
            if body.pop("schema", None) != SCHEMA:
                raise ValueError(f"it is not of schema {SCHEMA}")
            return typed.convert(body, Fitted)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(str(error)) from error


def cost_path(artifact: Path) -> Path:
    """Where the model of the artifact at `artifact` lies: qwen.xllm.cost.json."""
    whole = Path(os.path.abspath(artifact))  # "." has no name
    return whole.with_name(f"{whole.name}.cost.json")


def cost_of(artifact: Artifact, threads: int) -> tuple[StepCost | None, str]:
    """The model beside the artifact if it is of this artifact, CPU and number of threads; and a sentence that says what
    times are predicted from, and why."""
    file = cost_path(artifact.path)
    again = f"run `xllm profile {artifact.path}`"
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        found = Fitted.from_json(file.read_bytes())
    except FileNotFoundError:
        return None, f"predicted from the figures it was compiled with; {again} to measure this machine"
    except (OSError, ValueError) as error:
        return None, f"{file.name} is not used, it is no cost model: {error}; {again}"
    differing = [
        f"{name} {theirs}, here it is {ours}"
        for name, theirs, ours in (
            ("artifact", found.artifact[:12], artifact.manifest["digest"][:12]),
            ("CPU", found.cpu, host.cpu_model()),
            ("number of threads", found.threads, threads),
        )
        if theirs != ours
    ]
    if differing:
        return None, f"{file.name} is not used, it is of {'; of '.join(differing)}; {again}"
    exact = found.fidelity
    return found.cost, (
        f"{file.name}, off by {exact.median_error:.1%} (median) and {exact.p90_error:.1%} (90 of 100) of"
        f" {exact.held_out} steps it was not fitted to"
    )
