"""The target of an artifact, with the figures of a machine that it was compiled with."""

from __future__ import annotations

from xllm.artifact import Artifact, ArtifactError
from xllm.targets.cpu import CpuTarget
from xllm.targets.cpu.tuning import Tuning

TUNING = "tuning.json"


def target_of(artifact: Artifact) -> CpuTarget:
    """Predicts times from the artifact's own table, from what is usual where it has none. Raises ArtifactError for a
    table that is none."""
    tuning = None
    if TUNING in artifact.manifest["files"]:
        try:
            tuning = Tuning.from_json(artifact.read(TUNING))
        except ValueError as error:
            raise ArtifactError("artifact-malformed", f"{TUNING}: {error}; compile again") from error
    return CpuTarget(artifact.manifest["target"]["level"], tuning=tuning)
