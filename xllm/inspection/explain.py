"""`xllm explain`: what the compiler did to a model and what it left alone, from the artifact alone.

`explain` gathers plain data (the form of --json), `text` words it for a person. Alike things are told once, with their
number and the first place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from xllm.artifact import Artifact, ArtifactError
from xllm.measure.record import profile_path
from xllm.plan import Plan
from xllm.targets.base import StepSizes

REPORT = "report.json"
LARGEST = 6
SECONDS_PER_FALLBACK = 1e-4  # a torch call and its copies, measured with one row


def explain(artifact: Artifact) -> dict[str, Any]:
    """Passes, kernels, fallbacks, buckets and memory of an artifact, as JSON holds them.

    Raises ArtifactError for an artifact that carries no report, or one that is none.
    """
    try:
        return _gathered(artifact, read_report(artifact))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("artifact-malformed", f"{REPORT} or manifest.json lacks {error}; compile again") from error


def _gathered(artifact: Artifact, report: Mapping[str, Any]) -> dict[str, Any]:
    manifest, plan = artifact.manifest, artifact.plan
    kernels = _kernels(plan, report["operators"])
    beside = profile_path(artifact.path)
    return {
        "model": dict(manifest["model"]),
        "target": dict(manifest["target"]),
        "toolchain": dict(manifest["toolchain"]),
        "limits": dict(manifest["limits"]),
        "activations": manifest.get("activations", ""),
        "notes": report["notes"],
        "pipeline": manifest["pipeline"],
        "extensions": manifest.get("extensions", {}),
        "passes": [_pass(record) for record in manifest["passes"]],
        "kernels": kernels,
        "fallbacks": [kernel for kernel in kernels if kernel["provider"] == "torch"],
        "buckets": {"sizes": [dict(bucket.sizes) for bucket in plan.buckets], **report["buckets"]},
        "memory": _memory(artifact),
        **({"profile": beside.name} if beside.is_file() else {}),
    }


def read_report(artifact: Artifact) -> dict[str, Any]:
    """report.json as the compiler wrote it. Raises ArtifactError when there is none."""
    if REPORT not in artifact.manifest["files"]:
        raise ArtifactError("artifact-incomplete", f"the artifact has no {REPORT}; compile the checkpoint again")
    return json.loads(artifact.read(REPORT))


def _pass(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its near misses grouped by reason; names of values differ where reasons are the same."""
    misses: dict[str, dict[str, Any]] = {}
    for node, why in record["misses"]:
        alike = re.sub(r"[%@][\w.]+|\b[\w.]*\d[\w.]*\b", "·", why)
        found = misses.setdefault(alike, {"why": why, "count": 0, "first": node})
        found["count"] += 1
    grouped = sorted(misses.values(), key=lambda miss: -miss["count"])
    changed = record["before"] != record["after"]
    return {
        "name": record["name"], "kind": record["kind"], "hits": record["hits"], "changed": changed, "misses": grouped,
    }  # fmt: skip


def _kernels(plan: Plan, operators: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Which kernel runs which operator, alike calls together, in the order they first run."""
    groups: dict[Any, dict[str, Any]] = {}
    one = dict.fromkeys(plan.buckets[-1].sizes, 1) if plan.is_function else StepSizes.usual(1, 1)
    for call in plan.calls:
        held = operators[call.node]
        key = (call.op, call.kernel, json.dumps(held["refused"]))
        group = groups.setdefault(
            key,
            {
                "op": call.op, "kernel": call.kernel, "provider": held["provider"], "calls": 0, "first": call.node,
                "refused": held["refused"], "token_bytes": 0, "token_flops": 0,
            },
        )  # fmt: skip
        group["calls"] += 1
        group["token_bytes"] += call.cost.bytes.at(one)
        group["token_flops"] += call.cost.flops.at(one)
    return list(groups.values())


def _memory(artifact: Artifact) -> dict[str, Any]:
    plan = artifact.plan
    owners: dict[tuple[str, str], dict[str, Any]] = {}
    for weight in plan.weights.values():
        key = (owner_of(weight.name), f"{weight.layout.dtype} {weight.layout.form}")
        held = owners.setdefault(key, {"owner": key[0], "stored": key[1], "count": 0, "bytes": 0})
        held["count"] += 1
        held["bytes"] += weight.bytes
    sizes = plan.buckets[-1].sizes
    alike: dict[tuple[int, str], list[str]] = {}
    for name, buffer in plan.buffers.items():
        alike.setdefault((-buffer.bytes.at(sizes), re.sub(r"_\d+_", "_*_", name)), []).append(name)
    largest = [
        {"value": kind, "count": len(names), "bytes": -size} for (size, kind), names in sorted(alike.items())[:LARGEST]
    ]
    every = sum(buffer.bytes.at(sizes) for buffer in plan.buffers.values())
    return {
        "weights": sorted(owners.values(), key=lambda held: (-held["bytes"], held["owner"], held["stored"])),
        "weight_bytes": sum(weight.bytes for weight in plan.weights.values()),
        "arena_bytes": plan.arena_bytes,
        "values": len(plan.buffers),
        "values_bytes": every,
        "largest_values": largest,
        "kv_token_bytes": plan.kv.token_bytes,
        "kv_fixed_bytes": plan.kv.fixed_bytes,
        "kv_dtype": plan.kv.dtype,
    }


def owner_of(weight: str) -> str:
    """The kind of module of a weight: "model.layers.3.mlp.down_proj.weight" -> "model.layers.*.mlp.down_proj"."""
    parts = ["*" if part.isdigit() else part for part in weight.partition("#")[0].split(".")]
    return ".".join(parts).removesuffix(".weight")


# --- in words ---------------------------------------------------------------------------------------------------------


def text(facts: Mapping[str, Any]) -> str:
    """The explanation for a person, one section after another."""
    sections = (_head(facts), _passes(facts), _choices(facts), _fallbacks(facts), _sizes(facts), _bytes(facts))
    sections += (
        ([f"PROFILE  {facts['profile']}: `xllm show ARTIFACT --profile` prints it"],) if "profile" in facts else ()
    )
    return "\n".join(line for section in sections for line in (*section, "")).rstrip("\n") + "\n"


def _head(facts: Mapping[str, Any]) -> list[str]:
    model, target, limits = facts["model"], facts["target"], facts["limits"]
    tools = ", ".join(f"{name} {version}" for name, version in sorted(facts["toolchain"].items()))
    rounded = facts["activations"]
    lines = [
        f"{model['name']} ({model['architecture']}) compiled for {target['name']} {target['level']} by {tools}",
        "limits: " + ", ".join(f"{name} {value:,}" for name, value in sorted(limits.items())),
        *(
            [f"activations: {rounded} beside weights that it fits (experts aside), bfloat16 in attention"]
            if rounded
            else ()
        ),
    ]
    for kind in ("passes", "kernels"):
        for module in facts["extensions"].get(kind, ()):
            lines.append(f"third-party {kind} of {module['module']} (sha256 {module['digest'][:12]})")
    if facts["extensions"].get("kernels"):
        lines.append("the same bits under any schedule are promised for our kernels; for theirs, by their authors")
    return lines + [f"note: {note}" for note in facts["notes"]]


def _passes(facts: Mapping[str, Any]) -> list[str]:
    lines = ["PASSES  in order; a near miss is a place that looked like the pattern, and why it was left alone"]
    for step in facts["passes"]:
        effect = "" if step["kind"] == "plan" or step["changed"] else "   program unchanged"
        lines.append(f"  {step['name']:<24}{step['kind']:<9}{step['hits']:>5} hits{effect}")
        for miss in step["misses"]:
            lines.append(f"      {_times(miss['count'])}near miss at %{miss['first']}: {miss['why']}")
    return lines


def _choices(facts: Mapping[str, Any]) -> list[str]:
    lines = ["KERNELS  per operator; who was asked before and refused stands below it"]
    for kernel in facts["kernels"]:
        lines.append(f"  {kernel['op']:<28}{kernel['kernel']:<32}{kernel['calls']:>5} calls")
        lines += [f"      refused by {who}: {why}" for who, why in kernel["refused"]]
    return lines


def _fallbacks(facts: Mapping[str, Any]) -> list[str]:
    found = facts["fallbacks"]
    if not found:
        return ["FALLBACKS  none: every operator has a native kernel, serving never imports torch"]
    calls, each = sum(kernel["calls"] for kernel in found), "step" if "ladder" in facts["buckets"] else "run"
    lines = [
        f"FALLBACKS  {calls} calls run in torch: about {calls * SECONDS_PER_FALLBACK * 1e3:.1f} ms in every {each},"
        " seconds and some 200 MB at start, and no promise of same bits"
    ]
    for kernel in found:
        lines.append(
            f"  {kernel['calls']} x {kernel['op']} (%{kernel['first']}, …), {kernel['token_bytes']:,} bytes for a token"
        )
    return lines


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    buckets = facts["buckets"]
    if "ladder" not in buckets:
        limits = ", ".join(f"{dim} up to {size:,}" for dim, size in buckets["sizes"][0].items())
        return [f"SIZES  {limits or 'all are fixed'}; kernels take what comes, none pads"]
    pads = "each is a captured shape" if buckets["pads"] else "kernels take sizes: a bucket sizes the arena, none pads"
    ladder = " ".join(str(size) for size in buckets["ladder"])
    return [
        f"BUCKETS  of tokens a step ({pads})",
        "  " + "  ".join(", ".join(f"{dim}={n}" for dim, n in sorted(size.items())) for size in buckets["sizes"]),
        f"  padding if each were a fixed shape: {buckets['padding']:.1%} under traffic ({buckets['traffic']});"
        f" powers of two {ladder}: {buckets['ladder_padding']:.1%} with {len(buckets['ladder'])} shapes",
    ]


def _bytes(facts: Mapping[str, Any]) -> list[str]:
    memory = facts["memory"]
    lines = ["MEMORY  by owner", f"  weights {memory['weight_bytes']:,} bytes, mapped and shared between processes"]
    for held in memory["weights"]:
        lines.append(f"    {held['owner']:<44}{held['stored']:<20}{_times(held['count']):>7}{held['bytes']:>16,}")
    saved = 1 - memory["arena_bytes"] / memory["values_bytes"] if memory["values_bytes"] else 0.0
    lines += [
        f"  arena {memory['arena_bytes']:,} bytes at the largest bucket: {memory['values']} values of"
        f" {memory['values_bytes']:,} bytes share it, {saved:.0%} less",
        *(
            f"    {'%' + held['value']:<64}{_times(held['count']):>7}{held['bytes']:>16,}"
            for held in memory["largest_values"]
        ),
    ]
    if "ladder" in facts["buckets"]:
        lines.append(f"  KV {memory['kv_token_bytes']:,} bytes a token ({memory['kv_dtype']})")
        lines[-1] += f", {memory['kv_fixed_bytes']:,} a sequence" if memory["kv_fixed_bytes"] else ""
    return lines


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def sorted_facts(facts: Mapping[str, Any]) -> str:
    """--json: keys sorted, two spaces, so that two of them can be compared line by line."""
    return json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
