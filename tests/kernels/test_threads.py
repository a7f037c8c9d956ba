"""The thread pool, apart from kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

POOL = Path(__file__).parents[2] / "kernels" / "cpu" / "threads.cpp"
PROGRAM = """
#include "threads.h"
#include <cstdio>

int main() {
  std::atomic<long> done{0};
  for (int threads = 3; threads <= 4; threads++) {
    xk::Pool pool(threads);
    for (int i = 0; i < 20000000; i++)
      pool.run(2, [](void *c, int64_t, int) { static_cast<std::atomic<long> *>(c)->fetch_add(1); }, &done);
  }
  printf("%ld", done.load());
}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_runs_that_follow_each_other_at_once_lose_no_unit(tmp_path: Path) -> None:
    """With more threads than cores some are put aside anywhere, also between the last words of a run. One that spoke
    after the next run had begun took that one's units away, and all waited for ever: once in ten million runs."""
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    flags = ["-O2", "-std=c++17", "-pthread", "-I", str(POOL.parent)]
    subprocess.run(["g++", *flags, "-o", str(program), str(source), str(POOL)], check=True, timeout=120)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == str(2 * 20_000_000 * 2)
