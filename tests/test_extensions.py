"""The example of CONTRIBUTING.md, from an empty folder, as written; and what modules of others can't do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from tests.models import family
from xllm.artifact import Artifact, ArtifactError
from xllm.errors import CompileError
from xllm.extensions import ExtensionError, load, read
from xllm.passes import PLANS, REWRITES, parse_pipeline, pipeline_text, run_pipeline
from xllm.passes.extend import check_places, passes_of, placed
from xllm.targets.modules import kernels_of

GUIDE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", GUIDE, re.DOTALL))
[COMMANDS] = re.findall(r"```sh\n(xllm compile \"\$MODEL\" --bisect.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after the documented commands, and what they printed."""
    folder = tmp_path_factory.mktemp("empty")
    checkpoint = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    write_checkpoint(checkpoint, family("qwen3", "Qwen3ForCausalLM", num_hidden_layers=1, **sizes))
    for name, source in EXAMPLES.items():
        (folder / name).write_text(source, encoding="utf-8")
    environment = os.environ | {"MODEL": str(checkpoint), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", COMMANDS], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_guide_is_short_enough_and_works(walked) -> None:
    folder, out = walked
    assert all(source.count("\n") <= 25 for source in EXAMPLES.values())
    assert "every pass keeps what the program computes" in out
    assert re.search(r"norm-fewer-rows +1 hits", out)
    assert "same bits under any schedule are that module's own promise" in out
    assert re.search(r"xllm.gated_act +numpy_gate:gate", out)
    assert "+  %model = xllm.rms_norm(%rows_2" in out
    assert {path.name for path in folder.iterdir()} == {*EXAMPLES, "plain.xllm", "mine.xllm"}


def test_the_manifest_records_both_modules(walked) -> None:
    manifest = Artifact.open(walked[0] / "mine.xllm").manifest
    assert "norm_fewer:norm-fewer-rows" in manifest["pipeline"].split()
    held = manifest["extensions"]
    assert [held[kind][0]["module"] for kind in ("passes", "kernels")] == ["norm_fewer", "numpy_gate"]
    assert "extensions" not in Artifact.open(walked[0] / "plain.xllm").manifest


def test_an_artifact_does_not_make_code_run(walked, tmp_path, capfd) -> None:
    from xllm import cli

    artifact = Artifact.open(walked[0] / "mine.xllm")
    with pytest.raises(ArtifactError, match="give --kernel-module numpy_gate") as caught:
        kernels_of(artifact, ())
    assert caught.value.code == "kernel-module-missing"
    changed = tmp_path / "numpy_gate.py"
    changed.write_text(EXAMPLES["numpy_gate.py"] + "raise SystemExit('it ran')\n")
    with pytest.raises(ArtifactError, match="is not the module numpy_gate") as caught:
        kernels_of(artifact, [str(changed)])
    assert caught.value.code == "kernel-module-changed"
    assert cli.main(["generate", str(artifact.path), "-p", "x"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert set(kernels_of(artifact, [str(walked[0] / "numpy_gate.py")])) == {"numpy_gate:gate"}


def test_a_kernel_computes_what_ours_does(walked) -> None:
    import xllm

    answers = []
    for name, modules in (("plain.xllm", ()), ("mine.xllm", [str(walked[0] / "numpy_gate.py")])):
        with xllm.LLM(walked[0] / name, memory_bytes=256 << 20, threads=1, kernel_modules=modules) as llm:
            [answer] = llm.generate("Once", temperature=0, max_tokens=6)
            answers.append(answer.tokens)
    assert answers[0] == answers[1]


PASS = """
from dataclasses import dataclass
from xllm.passes import Outcome, Pass

@dataclass(frozen=True)
class Extra(Pass):
    count: int = 3
    kind, AFTER = "rewrite", "fuse-qkv"

    def run(self, program, context):
        return Outcome(program)
"""


def test_finding_a_module_runs_no_package(tmp_path, monkeypatch) -> None:
    package = tmp_path / "site" / "loud_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package ran')")
    (package / "kernels.py").write_text("KERNELS = {}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ExtensionError, match="of a module in a package, give the path"):
        read(["loud_package.kernels"])
    assert set(read([str(package / "kernels.py")])) == {"kernels"}


def test_a_pass_takes_its_place_and_its_spelling_round_trips(tmp_path) -> None:
    (tmp_path / "more.py").write_text(PASS)
    [extension] = load([str(tmp_path / "more.py")])
    added = passes_of(extension)
    names = [step.name() for step in placed(REWRITES, added)]
    assert names[names.index("fuse-qkv") + 1] == "extra"
    text = pipeline_text(placed(REWRITES, added))
    assert "more:extra{count=3}" in text
    assert parse_pipeline(text, added) == placed(REWRITES, added)
    assert not list(tmp_path.glob("__pycache__"))  # nothing is written beside it


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (PASS.replace("fuse-qkv", "fuse-all"), "which is no pass"),
        (PASS.replace("class Extra", "class FuseQkv"), "two passes are called fuse-qkv"),
        (PASS.replace('kind, AFTER = "rewrite", "fuse-qkv"', "pass"), "does not say its place"),
        (PASS.replace("fuse-qkv", "choose-kernels"), "is a rewrite and goes after the plan"),
        ("x = 1\n", "defines no Pass"),
    ],
)
def test_a_pass_without_a_place_is_refused(source: str, why: str, tmp_path) -> None:
    (tmp_path / "more.py").write_text(source)
    with pytest.raises(CompileError, match=why):
        added = passes_of(load([str(tmp_path / "more.py")])[0])
        check_places(REWRITES, PLANS, added)
        placed(PLANS, added)


@pytest.mark.parametrize(
    ("source", "why"),
    [("1 / 0\n", "ZeroDivisionError"), ("raise SystemExit(3)\n", "SystemExit: 3"), ("def f(:\n", "SyntaxError")],
)
def test_a_module_that_fails_is_named(source: str, why: str, tmp_path) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ExtensionError, match=why):
        load([str(tmp_path / "broken.py")])
    with pytest.raises(ExtensionError, match="there is no module nowhere_at_all"):
        load(["nowhere_at_all"])


def test_a_pass_that_ends_the_process_is_named(tmp_path) -> None:
    from tests.passes.zoo import CONTEXT, captured

    (tmp_path / "more.py").write_text(PASS.replace("return Outcome(program)", "raise SystemExit(3)"))
    added = passes_of(load([str(tmp_path / "more.py")])[0])
    with pytest.raises(CompileError, match="extra: the pass failed with SystemExit: 3"):
        run_pipeline(captured("llama"), added, CONTEXT)


BAD_RULES = {
    "not a lowering": (
        'RULES = {"xllm.gated_linear": lambda *_: 3}\nKERNELS = {}\n',
        "neither a Lowering nor a Refusal",
    ),
    "no such kernel": ('RULES = {"xllm.gated_linear": lambda *_: Lowering("k", {})}\nKERNELS = {}\n', "has no 'k'"),
    "nothing written": (
        'RULES = {"xllm.gated_linear": lambda *_: Lowering("k", {})}\nKERNELS = {"k": print}\n',
        "is not given the result",
    ),
    "it raises": ('RULES = {"xllm.gated_linear": lambda *_: 1 / 0}\nKERNELS = {}\n', "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", BAD_RULES)
def test_a_rule_that_answers_nonsense_is_named(case: str, tmp_path) -> None:
    from dataclasses import replace

    from tests.passes.zoo import CONTEXT, rewritten
    from xllm.passes.choose_kernels import ChooseKernels
    from xllm.passes.extend import Provider

    source, why = BAD_RULES[case]
    (tmp_path / "mod.py").write_text("from xllm.targets.base import Lowering\n" + source)
    [extension] = load([str(tmp_path / "mod.py")])
    with pytest.raises(CompileError, match=why):
        ChooseKernels().run(rewritten("llama")[0][-1].copy(), replace(CONTEXT, providers=(Provider.of(extension),)))


def test_a_refusal_is_on_record(tmp_path) -> None:
    from dataclasses import replace

    from tests.passes.zoo import CONTEXT, rewritten
    from xllm.passes.choose_kernels import ChooseKernels
    from xllm.passes.extend import Provider

    rules = 'RULES = {name: lambda *_: Refusal("not today") for name in %s}'
    source = f"from xllm.targets.base import Refusal\n{rules}\nKERNELS = {{}}\n"
    (tmp_path / "shy.py").write_text(source % json.dumps(["xllm.gated_linear", "xllm.attention"]))
    [extension] = load([str(tmp_path / "shy.py")])
    context = replace(CONTEXT, providers=(Provider.of(extension),))
    choices = ChooseKernels().run(rewritten("llama")[0][-1].copy(), context).program.plans["kernels"]
    refused = {choice.operation.op: choice.refused for choice in choices.values() if choice.refused}
    assert refused == {
        "xllm.gated_linear": (("shy", "not today"),),
        "xllm.attention": (("shy", "kernels of modules are not given the KV state"),),
    }
    assert all(choice.provider == "cpu" for choice in choices.values())
