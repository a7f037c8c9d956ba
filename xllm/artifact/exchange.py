"""Decides whether the weights of one artifact can take the place of another's while it is served: all that was made of
the other at the start, but for the weights themselves, must be the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from xllm.artifact.opened import Artifact
from xllm.artifact.seal import digest
from xllm.plan import Plan

_FACTS = ("target", "task", "limits", "generation", "special_tokens", "extensions")


def differences(served: Artifact, other: Artifact) -> list[str]:
    """What of `other` differs, by names that a person finds in the artifact; empty where its weights will do."""
    return list(_differences(served, other))


def plan_digest(plan: Plan) -> str:
    """Of all that is executed, whatever the values of the weights are."""
    weights = {name: replace(weight, digest="") for name, weight in plan.weights.items()}
    return digest(replace(plan, weights=weights).to_json().encode())


def _differences(served: Artifact, other: Artifact) -> Iterator[str]:
    old, new = plan_digest(served.plan), plan_digest(other.plan)
    if old != new:
        yield f"plan.json (digest without weights {new[:16]}, not {old[:16]})"
    if served.weight_bytes != other.weight_bytes:
        yield f"{other.weight_bytes} bytes of weights, not {served.weight_bytes}"
    for name in _FACTS:
        if served.manifest.get(name) != other.manifest.get(name):
            yield f"{name} in manifest.json"
    facts, others = _unnamed(served), _unnamed(other)
    yield from (f"model.{name} in manifest.json" for name in facts | others if facts.get(name) != others.get(name))
    files, others = served.manifest["files"], other.manifest["files"]
    names = sorted(name for name in {*files, *others} if name.startswith("tokenizer/"))
    yield from (name for name in names if files.get(name) != others.get(name))


def _unnamed(artifact: Artifact) -> dict[str, Any]:
    return {name: value for name, value in artifact.manifest["model"].items() if name != "name"}
