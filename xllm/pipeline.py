"""What the compile of a checkpoint and of a function share: the list of passes with those of modules of others, what a
manifest says of it, and lines of a report."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import xllm
from xllm.errors import CompileError
from xllm.plan import Plan
from xllm.storage import ACTIVATIONS, rounds

if TYPE_CHECKING:
    from xllm.artifact import Written
    from xllm.ir import Program
    from xllm.passes import Context, Pass, Record


@dataclass(frozen=True)
class Pipeline:
    """What one compile runs: passes, kernel providers, and the modules of others among them for the manifest."""

    rewrites: tuple[Any, ...]
    plans: tuple[Any, ...]
    providers: tuple[Any, ...]
    extensions: Mapping[str, list[dict[str, str]]]


def pipeline_of(
    rewrites: Sequence[Pass], disable: Sequence[str], pass_modules: Sequence[str], kernel_modules: Sequence[str]
) -> Pipeline:
    """A list of rewrites and the plans, with the passes of modules in their places, less those disabled."""
    from xllm import extensions
    from xllm.passes import PLANS, without
    from xllm.passes.extend import Provider, check_places, passes_of, placed

    modules = {"passes": extensions.load(pass_modules), "kernels": extensions.load(kernel_modules)}
    added = [step for module in modules["passes"] for step in passes_of(module)]
    check_places(rewrites, PLANS, added)
    without((*rewrites, *PLANS), disable)
    return Pipeline(
        tuple(step for step in placed(rewrites, added) if step.name() not in disable),
        placed(PLANS, added),
        tuple(Provider.of(module) for module in modules["kernels"]),
        {kind: [{"module": m.name, "digest": m.digest} for m in held] for kind, held in modules.items() if held},
    )


def check_activations(activations: str, *storages: str) -> None:
    """Raises CompileError where rows rounded to `activations` would meet no weights to which they fit."""
    fitting = [kind for kind in ACTIVATIONS if any(rounds(kind, storage) for storage in storages)]
    if activations in ("", *fitting):
        return
    kinds, beside = dict.fromkeys(storage.partition(".")[0] for storage in storages), ACTIVATIONS.get(activations, ())
    why = f"activations are rounded to {activations} beside weights of {' or '.join(beside) or 'no type'} only, weights"
    why += f" are {' and '.join(kinds)}"
    advice = [f"--activations {kind}" for kind in fitting] + [f"--weights {kind}" for kind in beside]
    raise CompileError(why, code="bad-option", try_=" or ".join((*advice, "no --activations")))


def describe_passes() -> str:
    """Every pass in order, of language models and then of functions: kind, name with options, and the first line of
    what it does where it stands first."""
    from xllm.passes import FUNCTION_REWRITES, PLANS, REQUIRED, REWRITES

    lines: list[str] = []
    told: set[str] = set()
    for what, rewrites in (("of a checkpoint", REWRITES), ("of an ONNX file", FUNCTION_REWRITES)):
        lines += [*([""] if lines else []), f"the compile {what}:"]
        for step in (*rewrites, *PLANS):
            summary = (sys.modules[type(step).__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
            optional = "" if step.name() in REQUIRED else "  (--disable-pass)"
            line = f"{step.kind:<8} {step.spelled():<24}"
            lines.append(line.rstrip() if step.name() in told else f"{line} {summary}{optional}")
            told.add(step.name())
    return "\n".join(lines)


def sized(plan: Plan) -> Plan:
    """The plan with the bytes of every weight as the target stores it."""
    from xllm.targets.cpu.rules import stored_bytes

    held = {
        key: replace(weight, bytes=stored_bytes(weight.shape, weight.layout)) for key, weight in plan.weights.items()
    }
    return replace(plan, weights=held)


def made_by(
    program: Program, pipeline: Pipeline, records: Iterable[Record], written: Written, context: Context, *packages: str
) -> dict[str, Any]:
    """What any manifest says of how the artifact was made: target, passes and modules, weights, and the versions of
    ours, torch and `packages`."""
    from xllm.ir.show import digest
    from xllm.passes import pipeline_text
    from xllm.targets import cpu

    return {
        "toolchain": {"xllm": xllm.__version__, **{name: _version(name) for name in ("torch", *packages)}},
        "target": {"name": context.target.name, "level": context.target.level, "architecture": cpu.architecture()},
        "weights_dtype": context.weights_dtype,
        **({"activations": context.activations} if context.activations else {}),
        **({"head_dtype": context.head_dtype} if context.head_dtype not in ("", context.weights_dtype) else {}),
        "weights_header": written.header,
        "weights_checksum": written.checksum,
        "weight_origins": dict(written.origins),
        "pipeline": pipeline_text((*pipeline.rewrites, *pipeline.plans)),
        **({"extensions": pipeline.extensions} if pipeline.extensions else {}),
        "passes": [
            {"name": r.name, "kind": r.kind, "hits": r.hits, "misses": list(r.misses), "before": r.before,
             "after": r.after}
            for r in records
        ],
        "program": digest(program),
    }  # fmt: skip


def modules_of(plan: Plan) -> tuple[str, ...]:
    """Modules of others whose kernels a plan runs."""
    return tuple(dict.fromkeys(call.kernel.partition(":")[0] for call in plan.calls if ":" in call.kernel))


# --- lines of a report ------------------------------------------------------------------------------------------------


def pass_lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        missed = f", {len(record.misses)} near misses" if record.misses else ""
        yield f"  {record.name:<20} {record.hits:>5} hits{missed}  {record.seconds:.2f} s"


def module_lines(modules: Iterable[str], advice: str) -> Iterator[str]:
    for name in modules:
        yield (
            f"  kernels of module {name} run: same bits under any schedule are that module's own promise;"
            f" {advice.format(name)}"
        )


def fallback_lines(fallbacks: Sequence[tuple[str, str, str, int]], step: str = "step") -> Iterator[str]:
    """Operators left to torch as (node, operator, why, bytes moved for a token), alike ones together, and what they
    cost in every `step`."""
    alike: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for node, op, why, moved in fallbacks:
        alike.setdefault((op, why), []).append((node, moved))
    for (op, why), items in alike.items():
        first = f" ({items[0][0]}{', …' if len(items) > 1 else ''})" if items[0][0] else ""
        told = f"  runs in torch: {len(items)} x {op}{first}, because {why}"
        moved = sum(size for _, size in items)
        yield f"{told}; moves {moved:,} bytes a token" if moved else told
    if fallbacks:
        yield (
            "  running it imports torch for them: seconds and some 200 MB at start, and about 0.1 ms for each of"
            f" {len(fallbacks)} calls of every {step}"
        )
        yield "  the same bits under any schedule are promised for native kernels only, not for these"


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""
