"""The same checkpoint gives the same bytes whoever compiles it, wherever and whenever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from tests.models import FAMILIES

ROOT = Path(__file__).parents[2]
GOLDEN, LEVEL = ROOT / "tests/golden/artifact-digests.txt", "x86-64-v3"
BUILD = """
import os, sys, time
os.umask(int(os.environ["BUILD_UMASK"], 8))
import torch
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
shift = float(os.environ["BUILD_CLOCK_SHIFT"])
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() + shift, lambda: now_ns() + int(shift * 1e9)
from xllm.compiler import compile_checkpoint
compile_checkpoint(sys.argv[1], sys.argv[2])
"""
PLACES: dict[str, dict[str, str]] = {
    "here/out.xllm": {
        "HOME": "/nowhere", "USER": "ada", "LOGNAME": "ada", "LANG": "C", "LC_ALL": "C", "TZ": "UTC",
        "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "BUILD_UMASK": "022", "BUILD_CLOCK_SHIFT": "0",
    },
    "a deeper/ordner ü/other.name": {
        "HOME": "/tmp", "USER": "grace", "LOGNAME": "grace", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
        "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "3", "BUILD_UMASK": "077",
        "BUILD_CLOCK_SHIFT": "1e8",
        # As on another machine of this level, where torch and MKL would choose other code:
        "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}  # fmt: skip


def entries(root: Path) -> dict[str, tuple[int, bytes]]:
    """Mode and bytes of every file, mode of every folder."""
    found = (root, *sorted(root.rglob("*")))
    return {
        entry.relative_to(root).as_posix(): (entry.stat().st_mode, entry.read_bytes() if entry.is_file() else b"")
        for entry in found
    }


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for place, variables in PLACES.items():
        out = tmp_path_factory.mktemp("builds") / place
        checkpoint = write_checkpoint(out.parent / "tiny", {**FAMILIES["qwen3"], "num_hidden_layers": 2})
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        command = [sys.executable, "-c", BUILD, str(checkpoint), str(out)]
        done = subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append(out)
    return made


def test_folder_home_user_locale_seed_threads_clock_umask_and_maths_code_leave_no_trace(builds: list[Path]) -> None:
    one, two = map(entries, builds)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_reuse_changes_no_byte_and_the_report_weighs_traffic(builds: list[Path], tmp_path: Path) -> None:
    from xllm.compiler import CompileOptions, compile_checkpoint

    checkpoint, options = builds[0].parent / "tiny", CompileOptions(traffic=((1, 90.0), (24, 9.0), (512, 1.0)))
    report = compile_checkpoint(checkpoint, tmp_path / "reused.xllm", options, reuse=builds[0])
    assert report.reused == report.weights > 0
    assert f"reused {report.weights} of {report.weights} weights" in report.text()
    # Of 90 + 216 + 512 rows powers of two pad 24 to 32, nine times; the sizes themselves pad none.
    padding = (
        "expected padding under this traffic 0.0% in 3 shapes, with powers of two 8.1% in 10; if shapes were fixed"
    )
    assert padding in report.text()
    fresh = compile_checkpoint(checkpoint, tmp_path / "fresh.xllm", options)
    assert fresh.reused == 0 and "reused" not in fresh.text()
    assert entries(tmp_path / "reused.xllm") == entries(tmp_path / "fresh.xllm")


def test_a_part_of_the_checkpoint_that_is_not_read_is_one_line_of_the_report(tmp_path: Path) -> None:
    from xllm.compiler import Report

    tower = [f"model.visual.blocks.{layer}.attn.qkv.weight" for layer in range(40)]
    lines = Report(tmp_path, (), (), 0, 0, 0, (), unused=("model.extra", *tower)).text().splitlines()
    assert "  unused tensor of the checkpoint: model.extra" in lines
    assert [line for line in lines if "visual" in line] == ["  unused of the checkpoint: 40 tensors below model.visual"]


def test_another_machine_of_the_level_gives_the_same_bytes(
    golden: Callable[[Path, str], None], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of the embedded model's artifact, written on one machine and compared on whichever runs this. They are of
    the versions that capture it; made anew (--update-golden) when these or the compiler change.
    """
    import torch
    import transformers
    from blake3 import blake3

    from xllm.compiler import CompileOptions, compile_checkpoint
    from xllm.embedded import checkpoint_path
    from xllm.kernels import cpu

    if LEVEL not in cpu.levels():
        pytest.skip(f"this machine has no {LEVEL}")
    monkeypatch.setattr(cpu, "level", lambda: LEVEL)
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    if not request.config.getoption("--update-golden") and versions not in GOLDEN.read_text():
        pytest.skip(f"the digests are not of {versions}")
    lines = [versions]
    for weights in ("bfloat16", "int8", "int4"):
        out = tmp_path / weights
        compile_checkpoint(checkpoint_path(), out, CompileOptions(weights=weights))
        files = sorted(entry for entry in out.rglob("*") if entry.is_file())
        lines += [f"{blake3(file.read_bytes()).hexdigest()} {file.relative_to(tmp_path).as_posix()}" for file in files]
    golden(GOLDEN, "\n".join(lines) + "\n")
