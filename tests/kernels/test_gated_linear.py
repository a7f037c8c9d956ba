"""gated_linear: the bits of a product and a gate behind it, wherever columns and panels end."""

import numpy as np
import pytest

from tests.kernels.oracle import KernelRun, aligned, pack
from xllm.kernels import cpu
from xllm.targets.cpu.rules import GATES

STORAGE = {
    "linear.f32": "float32",
    "linear.bf16": "bfloat16",
    "linear_rounded.bf16": "bfloat16",
    "linear.i8": "int8.32",
    "linear.i4": "int4.32",
    "linear_rounded.i8": "int8.32",
    "linear_rounded_row.i8": "int8.row",
    "linear_rounded.i4": "int4.128",
}


class Product:
    """A random weight of 2 n outputs under one kernel, and a bias where there is one."""

    def __init__(self, rng, kernel, k, n, biased):
        self.kernel, self.storage, self.k, self.n = kernel, STORAGE[kernel], k, n
        self.packed = pack(rng.standard_normal((2 * n, k), np.float32), self.storage)
        self.bias = rng.standard_normal(2 * n, np.float32) if biased else None
        kind = cpu.quantised(self.storage)
        self.group = {"group": kind.group} if kind else {}

    def __call__(self, run, name, width, x, **ints):
        out = np.full((len(x), width), np.nan, np.float32)
        args = {"x": x, "weight": self.packed, "bias": self.bias, "out": out}
        if rows := cpu.rows_bytes(self.k, self.storage, "rounded" in name):
            args["scratch_rows"] = aligned(rows * len(x))
        run(name, args, {"k": self.k, "n": width, **self.group, **ints}, rows=len(x))
        return out

    def apart(self, run, x, act):
        both, out = self(run, self.kernel, 2 * self.n, x), np.full((len(x), self.n), np.nan, np.float32)
        run(f"gated_{act}.f32", {"x": both, "out": out}, {"width": self.n}, rows=len(x))
        return out

    def gated(self, run, x, act):
        return self(run, f"gated_{self.kernel}", self.n, x, act=GATES.index(act))


@pytest.mark.parametrize("kernel", STORAGE)
@pytest.mark.parametrize(("k", "n"), [(64, 48), (160, 7), (130, 40), (64, 1000), (515, 17), (33, 3080), (3, 12296)])
def test_same_bits_as_a_gate_behind_a_product(run, rng, kernel, k, n):
    for biased in (False, True):
        product = Product(rng, kernel, k, n, biased)
        for rows in (1, 2, 6, 7, 13, 97, 200):
            x = rng.standard_normal((rows, k), np.float32)
            want = product.apart(run, x, "silu")
            assert np.isfinite(want).all()
            assert np.array_equal(product.gated(run, x, "silu"), want)


@pytest.mark.parametrize("act", GATES)
def test_every_gate(run, rng, act):
    product, x = Product(rng, "linear.f32", 33, 24, True), rng.standard_normal((5, 33), np.float32)
    want = product.apart(run, x, act)
    assert np.array_equal(product.gated(run, x, act), want)
    with cpu.Runner(1, run.runner.level) as alone:
        assert np.array_equal(product.gated(KernelRun(alone), x, act), want)


@pytest.mark.parametrize("kernel", STORAGE)
def test_an_unknown_gate_is_refused(run, rng, kernel):
    product = Product(rng, kernel, 32, 16, False)
    for act in (-1, len(GATES)):
        with pytest.raises(cpu.KernelError, match="act is no activation"):
            product(run, f"gated_{kernel}", 16, np.ones((1, 32), np.float32), act=act)
