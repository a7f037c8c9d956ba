"""One runner per instruction set level that this machine can run; tests that take `run` are repeated for each."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun
from xllm.kernels import cpu


@pytest.fixture(scope="session", params=cpu.levels())
def run(request):
    with cpu.Runner(2, request.param) as runner:
        yield KernelRun(runner)


@pytest.fixture
def rng():
    return np.random.default_rng(7)
