import numpy as np
import pytest

from tests.kernels.oracle import bf16_bits, bf16_round
from xllm.kernels import cpu


def unpacked(panels, n, k, dtype):
    """Reads panels back as they are documented: [n/16][k][16]; bf16 keeps row i beside row i + 8."""
    if dtype == "float32":
        lanes = panels.view(np.float32).reshape(-1, k, 16)
    else:
        lanes = panels.view(np.uint16).reshape(-1, k, 8, 2).transpose(0, 1, 3, 2).reshape(-1, k, 16)
    rows = lanes.transpose(0, 2, 1).reshape(-1, k)
    assert not rows[n:].any(), "padding rows are zero"
    return rows[:n]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (17, 40), (33, 7), (32, 32), (48, 101)])
def test_layout(rng, n, k):
    weight = rng.standard_normal((n, k), np.float32)
    assert np.array_equal(unpacked(cpu.pack_panels(weight, "float32"), n, k, "float32"), weight)
    assert np.array_equal(unpacked(cpu.pack_panels(weight, "bfloat16"), n, k, "bfloat16"), bf16_bits(weight))
    bits = bf16_bits(weight)
    assert np.array_equal(unpacked(cpu.pack_panels(bits, "bfloat16"), n, k, "bfloat16"), bits)
    assert np.array_equal(unpacked(cpu.pack_panels(bits, "float32"), n, k, "float32"), bf16_round(weight))


def test_strided_rows_and_a_given_buffer(rng):
    weight = rng.standard_normal((40, 30), np.float32)
    out = np.full(cpu.packed_bytes(20, 25, "float32"), 0xFF, np.uint8)
    assert cpu.pack_panels(weight[::2, 3:28], "float32", out) is out
    assert np.array_equal(unpacked(out, 20, 25, "float32"), weight[::2, 3:28])


def test_special_values():
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, 1e-45, 1 + 2**-8, 1 + 3 * 2**-8]
    want = [0x7F80, 0xFF80, 0x7FC0, 0, 0x8000, 0x7F80, 0, 0x3F80, 0x3F82]
    for rows, times in ((1, 1), (16, 4)):  # a panel in part, and a whole one with 32 columns at a time
        weight = np.tile(np.array(special, np.float32), (rows, times))
        got = unpacked(cpu.pack_panels(weight, "bfloat16"), rows, 9 * times, "bfloat16")
        assert got.tolist() == [want * times] * rows


@pytest.mark.parametrize(
    ("weight", "dtype", "out"),
    [
        (np.zeros(4, np.float32), "float32", None),
        (np.zeros((4, 4)), "float32", None),
        (np.zeros((4, 4), np.float32), "float16", None),
        (np.zeros((4, 8), np.float32)[:, ::2], "float32", None),
        (np.zeros((4, 4), np.float32), "float32", np.zeros(17, np.uint8)),
    ],
)
def test_refusals(weight, dtype, out):
    with pytest.raises(cpu.KernelError):
        cpu.pack_panels(weight, dtype, out)
