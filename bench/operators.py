"""Every operator of a decode step and of a prompt beside what was predicted of it, and what no prediction explains.

    python -m bench.operators ARTIFACT... [--decode 256] [--prefill 512] [--seconds 2]

One table a step, as `xllm profile` prints them, then a row for each step: predicted, from the artifact's own table or
from what is usual at its level, and measured; and what of a step of the engine's loop is the host's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.report import RESULTS, console, footer, save, table
from xllm.artifact import Artifact
from xllm.inspection.profile import Operator, operators, text
from xllm.measure.profile import profile
from xllm.measure.record import StepProfile
from xllm.measure.shape import Shape
from xllm.targets.predicted import TUNING, target_of

PARTS = ("products", "attention", "other")


def row(artifact: Artifact, step: StepProfile, found: list[Operator]) -> dict[str, Any]:
    """Of one step: seconds of all calls and of each of PARTS, and of what is no call."""
    parts = {name: _sums([one for one in found if _part(one) == name]) for name in PARTS}
    return {
        "weights": artifact.manifest["weights_dtype"], "step": step.name,
        "kernels": sorted({one.kernel for one in found if _part(one) == "products"}),
        "tuned": TUNING in artifact.manifest["files"], "calls": _sums(found), "parts": parts,
        "sampling_seconds": step.sample, "host_seconds": step.host, "step_seconds": step.step,
        "engine_host_seconds": step.engine_host, "engine_step_seconds": step.engine_step,
        "unexplained": [one.name for one in found if one.unexplained(sum(each.measured for each in found))],
    }  # fmt: skip


def _part(one: Operator) -> str:
    if "linear" in one.kernel or one.kernel.startswith(("moe", "experts")):
        return "products"
    return "attention" if "attention" in one.kernel else "other"


def _sums(found: list[Operator]) -> dict[str, float]:
    return {"predicted": sum(one.predicted for one in found), "measured": sum(one.measured for one in found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--decode", type=int, default=256, help="tokens in all of the sequence that decodes")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each step")
    parser.add_argument("--out", type=Path, default=RESULTS / "operators.json")
    options, out, rows = parser.parse_args(), console(), []
    made = table("milliseconds, predicted / measured", "artifact", "step", *PARTS, "off by", "host")
    for path in options.artifacts:
        artifact = Artifact.open(path)
        shapes = [Shape(True, 1, options.decode), Shape(False, options.prefill, 0)]
        found = profile(artifact, shapes, seconds=options.seconds)
        print(text(artifact, found))
        for step in found.steps:
            rows.append(row(artifact, step, operators(artifact, target_of(artifact), found.machine, step)))
            calls, parts = rows[-1]["calls"], rows[-1]["parts"]
            cells = (f"{one['predicted'] * 1e3:,.1f} / {one['measured'] * 1e3:,.1f}" for one in parts.values())
            off = f"{calls['measured'] / calls['predicted'] - 1:+.0%}"
            host = step.engine_host / step.engine_step if step.engine_host and step.engine_step else 0.0
            made.add_row(path.name, step.name, *cells, off, f"{host:.1%}" if host else "")
    out.print(made)
    footer(out)
    settings = {"decode": options.decode, "prefill": options.prefill, "seconds": options.seconds}
    save(options.out, "operators", settings, {"rows": rows})


if __name__ == "__main__":
    main()
