"""`xllm diff A B`: how two artifacts differ, part by part: facts, passes, program stages, kernels, weights, plan.

What is equal is said in one line. The text is for reading; the exit code says whether anything differs.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xllm.artifact import UNFOLDED, Artifact, ArtifactError
from xllm.inspection.explain import owner_of

# Facts that follow from the rest of the artifact, or that have a part of their own below.
DERIVED = (
    "digest", "files", "passes", "pipeline", "program", "schema", "weight_origins", "weights_checksum",
    "weights_header",
)  # fmt: skip
CONTEXT_LINES = 1


@dataclass(frozen=True)
class Difference:
    """One part of two artifacts: its title and the lines that tell how they differ, none where they are equal."""

    title: str
    lines: tuple[str, ...] = ()


def compare(one: Artifact, two: Artifact, stage: str | None = None) -> list[Difference]:
    """Every part, equal or not; with `stage`, that program dump alone. Raises ArtifactError for an unknown stage."""
    if stage is not None:
        return list(_stages(one, two, stage))
    return [
        Difference("facts", tuple(_table(_facts(one), _facts(two)))),
        Difference("passes", tuple(_table(_passes(one), _passes(two)))),
        *_stages(one, two, None),
        Difference("kernels", tuple(_table(_kernels(one), _kernels(two)))),
        Difference("weights", tuple(_table(_weights(one), _weights(two)))),
        Difference("plan", tuple(_table(_plan(one), _plan(two)))),
        Difference("files", tuple(_table(_files(one), _files(two)))),
    ]


def text(parts: list[Difference], one: str, two: str) -> str:
    """The comparison for a person; equal parts share a line."""
    lines = [f"A {one}", f"B {two}"]
    for part in parts:
        if part.lines:
            lines += ["", f"{part.title}:", *(f"  {line}" for line in part.lines)]
    equal = [part.title for part in parts if not part.lines]
    if equal:
        lines += ["", "equal: " + ", ".join(equal)]
    return "\n".join(lines) + "\n"


def _table(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    """What differs side by side: name, A, B; "-" where one has none."""
    names = [name for name in (*one, *(name for name in two if name not in one)) if one.get(name) != two.get(name)]
    rows = [(name, *(str(side[name]) if name in side else "-" for side in (one, two))) for name in names]
    width, middle = (min(max((len(row[i]) for row in rows), default=0), limit) for i, limit in ((0, 60), (1, 50)))
    for name, left, right in rows:
        if max(len(left), len(right)) <= 50:
            yield f"{name:<{width}}  A {left:<{middle}}  B {right}"
        else:
            yield from (name, f"  A {left}", f"  B {right}")


def _facts(artifact: Artifact) -> dict[str, Any]:
    def flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key in sorted(value):
                yield from flat(value[key], f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    held = {key: value for key, value in artifact.manifest.items() if key not in DERIVED}
    return dict(flat(held, ""))


def _passes(artifact: Artifact) -> dict[str, str]:
    spelled = {
        word.partition("{")[0].rpartition(":")[2]: word for word in artifact.manifest.get("pipeline", "").split()
    }
    told, seen = {}, Counter()
    for record in artifact.manifest.get("passes", ()):
        name = record["name"]
        seen[name] += 1
        label = spelled.get(name, name) + (f" ({seen[name]})" if seen[name] > 1 else "")
        missed = len(record["misses"])
        told[label] = f"{record['hits']} hits" + (f", {missed} near misses" if missed else "")
    return told


def _stages(one: Artifact, two: Artifact, only: str | None) -> Iterator[Difference]:
    """Unified difference of the folded dumps. Addresses are left out: they follow from what is told under plan."""
    left, right = ({n: p for n, p in a.stages().items() if not n.endswith(UNFOLDED)} for a in (one, two))
    names = list(dict.fromkeys((*left, *right)))
    if only is not None and only not in names:
        raise ArtifactError("unknown-stage", f"there is no stage {only!r}; one of {', '.join(names)}")
    for name in names if only is None else [only]:
        missing = [who for who, side in (("A", left), ("B", right)) if name not in side]
        if missing:
            yield Difference(f"stage {name}", (f"{' and '.join(missing)} has no such stage",))
            continue
        dumps = (opened.read(side[name]).decode() for opened, side in ((one, left), (two, right)))
        before, after = map(_program_lines, dumps)
        found = list(difflib.unified_diff(before, after, "A", "B", lineterm="", n=CONTEXT_LINES))
        yield Difference(f"stage {name}", tuple(found[2:]))


def _program_lines(dump: str) -> list[str]:
    """The dump without the head that names the model, the notes, the addresses and the padding before columns."""
    lines = [line for line in dump.splitlines() if not line.startswith("//")]
    return [re.sub(r"\s+//\s", "  // ", re.sub(r"\s+arena\+0x[0-9a-f]+", "", line)) for line in lines]


def _kernels(artifact: Artifact) -> dict[str, str]:
    found: dict[str, Counter[str]] = {}
    for call in artifact.plan.calls:
        found.setdefault(call.op, Counter())[call.kernel] += 1
    return {op: ", ".join(f"{n} x {kernel}" for kernel, n in kernels.items()) for op, kernels in found.items()}


def _weights(artifact: Artifact) -> dict[str, str]:
    """By kind of module, so that a change in every layer is one line."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for weight in artifact.plan.weights.values():
        stored = f"{weight.layout.dtype} {weight.layout.form} {list(weight.shape)}"
        groups.setdefault(owner_of(weight.name), []).append((stored, weight.bytes))
    told = {}
    for owner, held in groups.items():
        kinds = Counter(stored for stored, _ in held)
        told[owner] = ", ".join(f"{n} x {kind}" for kind, n in sorted(kinds.items()))
        told[owner] += f", {sum(size for _, size in held):,} bytes"
    contents = {weight.name: weight.digest for weight in artifact.plan.weights.values()}
    return {**told, "contents": _short_digest(contents)}


def _plan(artifact: Artifact) -> dict[str, str]:
    plan = artifact.plan
    return {
        "calls": str(len(plan.calls)),
        "streams": " ".join(plan.streams),
        "buckets": "  ".join(",".join(f"{d}={n}" for d, n in sorted(b.sizes.items())) for b in plan.buckets),
        "values": str(len(plan.buffers)),
        "arena bytes": f"{plan.arena_bytes:,}",
        "KV bytes a token": f"{plan.kv.token_bytes:,} ({plan.kv.dtype})",
        "KV bytes a sequence": f"{plan.kv.fixed_bytes:,}",
        "weight bytes": f"{sum(weight.bytes for weight in plan.weights.values()):,}",
    }


def _files(artifact: Artifact) -> dict[str, str]:
    """Files whose bytes count beyond what is compared above."""
    files = artifact.manifest["files"]
    return {name: files[name][:16] for name in sorted(files) if not name.startswith("ir/")}


def _short_digest(contents: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(contents.items())).encode()).hexdigest()[:16]
