"""`xllm show`: a program dump of an artifact, as it was written, folded or not."""

from __future__ import annotations

import re
from pathlib import Path

from xllm.artifact import PLANNED, UNFOLDED, Artifact, ArtifactError


def show(path: str | Path, stage: str | None = None, unfold: bool = False) -> str:
    """A program dump of an artifact: the last stage, or the one named. Raises ArtifactError listing the stages there
    are.
    """
    artifact = Artifact.open(path)
    stages = artifact.stages()
    name = stage or PLANNED
    if name not in stages:
        known = ", ".join(stage for stage in stages if not stage.endswith(UNFOLDED))
        raise ArtifactError("unknown-stage", f"there is no stage {name!r}; try one of {known}")
    if unfold and name + UNFOLDED in stages:
        return artifact.read(stages[name + UNFOLDED]).decode()
    text = artifact.read(stages[name]).decode()
    return _unfolded(text) if unfold else text


def _unfolded(text: str) -> str:
    """A folded dump with every layer block written once per layer it stands for."""

    def repeated(block: re.Match[str]) -> str:
        numbers: list[int] = []
        for part in block["layers"].split():
            first, _, last = part.partition("..")
            numbers += range(int(first), int(last or first) + 1)
        return "".join(f"  layer {number} {{\n{block['body']}  }}\n" for number in numbers)

    return re.sub(r"  layer (?P<layers>[\d. ]+) \{\n(?P<body>.*?)  \}\n", repeated, text, flags=re.DOTALL)
