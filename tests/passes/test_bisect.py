"""The bisection names the pass that is wrong, and where in the program; a sound pipeline is called sound."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from bench.checkpoints import write_checkpoint
from tests.models import FAMILIES
from tests.passes.zoo import CONTEXT, captured
from xllm.compiler import CompileOptions
from xllm.diagnose import bisect_passes, program_of
from xllm.ir import Program
from xllm.passes import REWRITES, Context, Outcome, Pass
from xllm.passes.bisect import bisect
from xllm.passes.emit import emit_task
from xllm.passes.rewrite import Editor


@dataclass(frozen=True)
class LoseEpsilon(Pass):
    """Swaps one norm for one with another epsilon: the second of the program, so that the place matters."""

    kind: ClassVar[Literal["rewrite", "plan"]] = "rewrite"

    def run(self, program: Program, context: Context) -> Outcome:
        editor = Editor(program)
        wanted = [node for node in program.calls() if node.target is torch.ops.xllm.rms_norm.default][1]
        with editor.before(wanted):
            x, weight, _ = wanted.args
            wanted.replace_all_uses_with(editor.emit(torch.ops.xllm.rms_norm.default, x, weight, 0.5, like=wanted))
        editor.hit(wanted)
        editor.finish()
        return Outcome(program, tuple(editor.hits))


def test_the_wrong_pass_is_named_with_its_place() -> None:
    program = captured("llama")
    at = next(index for index, step in enumerate(REWRITES) if step.name() == "fuse-rms-norm") + 1
    told: list[str] = []
    found = bisect(program, [*REWRITES[:at], LoseEpsilon(), *REWRITES[at:]], CONTEXT, lambda name, _: told.append(name))
    assert found is not None and found.pass_name == "lose-epsilon"
    assert told[-2:] == ["fuse-rms-norm", "lose-epsilon"]  # no pass after it was run
    assert "layers.0.mlp" in found.path  # what reads the norm behind attention: the first product of the MLP
    assert found.op == "xllm.linear"
    assert found.error > 1e-3 and found.output_error > 1e-5
    assert any("rms_norm" in name for name in found.made_by)
    assert "relative difference" in found.text() and found.node in found.text()


def test_sound_passes_are_called_sound() -> None:
    worst: list[float] = []
    assert bisect(captured("qwen3"), REWRITES, CONTEXT, lambda _, error: worst.append(error)) is None
    assert len(worst) == len(REWRITES) and max(worst) <= 1e-5


def test_the_task_asked_for_is_looked_at(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", {**FAMILIES["qwen3"], "num_hidden_layers": 1}, dtype="float32")
    options = CompileOptions(task="embed")
    assert emit_task(program_of(checkpoint, "captured", options))["kind"] == "embed"
    assert bisect_passes(checkpoint, options) is None
