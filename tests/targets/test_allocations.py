"""Once it has run its widest shapes, a step allocates nothing on the native side, plan, draw and threads together (but
where a penalty has to remember one more token)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from tests.models import FAMILIES
from xllm.compiler import CompileOptions, compile_checkpoint

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
COUNTS = """
#include <atomic>
#include <cstdlib>
#include <new>
static std::atomic<long> made{0};
extern "C" long allocations() { return made; }
void *operator new(std::size_t bytes) {
  made++;
  if (void *p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void *p) noexcept { std::free(p); }
void operator delete(void *p, std::size_t) noexcept { std::free(p); }
"""
STEPS = """
import ctypes
import sys
from pathlib import Path

from xllm.artifact import Artifact
from xllm.measure.machine import state_memory
from xllm.runtime.executor import Batch, Row
from xllm.runtime.request import Request, SamplingParams
from xllm.targets.cpu.executor import CpuExecutor

made = ctypes.CDLL(None).allocations
made.restype = ctypes.c_long
executor = CpuExecutor(Artifact.open(Path(sys.argv[1])), 2)
opened = made()
span = executor.kv.bytes_for(128)
memory = state_memory(4 * span)
drawn = SamplingParams(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, seed=1, logprobs=3,
                       logit_bias={3: 1.0}, max_tokens=100)
for slot in range(4):
    params = SamplingParams(temperature=0.0) if slot % 2 else drawn
    executor.attach(slot, Request(str(slot), (1, 2), params), ())
rows = [Row(slot, memory.ctypes.data + slot * span, 40, [5], True) for slot in range(4)]
prompt = Row(0, memory.ctypes.data, 0, list(range(1, 41)), True)
SHAPES = [rows, rows[:1], [prompt], [prompt, *rows[1:]], rows[1:3]]
counts = []
for turn in range(6):
    for step, shape in enumerate(SHAPES):
        executor.launch(Batch(turn * 10 + step, tuple(shape))).result()
    counts.append(made())
executor.close()
print(opened, *counts)
"""


@pytest.mark.skipif(COMPILER is None or not sys.platform.startswith("linux"), reason="needs a compiler and LD_PRELOAD")
@pytest.mark.parametrize("options", [{}, {"weights": "int8", "activations": "int8"}], ids=["float32", "int8"])
def test_a_step_allocates_nothing(tmp_path: Path, options: dict[str, str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", FAMILIES["qwen3"], dtype="float32")
    made = CompileOptions(max_batch_tokens=64, max_len=128, max_seqs=4, **options)  # pyright: ignore[reportArgumentType]
    compile_checkpoint(checkpoint, tmp_path / "tiny.xllm", made)
    (tmp_path / "counts.cpp").write_text(COUNTS)
    library = tmp_path / "counts.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", tmp_path / "counts.cpp", "-o", library], check=True)  # pyright: ignore
    run = subprocess.run(
        [sys.executable, "-c", STEPS, tmp_path / "tiny.xllm"],
        cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened, warm, *counts = map(int, run.stdout.split())
    assert opened > 0, "nothing was counted"
    assert counts == [warm] * len(counts)
