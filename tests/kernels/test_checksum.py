"""The checksum of weights against its definition, and what it must find."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.kernels import cpu

BLOCK, LANES = 1 << 20, 64


def defined(data: np.ndarray) -> np.ndarray:
    """uint32 [blocks, 64]: each lane adds a word times a prime, turns by 13 bits and multiplies by another."""
    blocks = []
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        words = np.concatenate([block, np.zeros(-len(block) % 256, np.uint8)]).view(np.uint32).reshape(-1, LANES)
        lanes = np.zeros(LANES, np.uint32)
        for row in words:
            mixed = lanes + row * np.uint32(0x85EBCA77)
            lanes = (mixed << np.uint32(13) | mixed >> np.uint32(19)) * np.uint32(0x9E3779B1)
        blocks.append(lanes)
    return np.array(blocks, np.uint32).reshape(-1, LANES)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 5000, BLOCK, BLOCK + 3])
def test_it_is_what_it_says_on_any_number_of_threads(size: int, rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, size, np.uint8)
    with np.errstate(over="ignore"):
        wanted = defined(data)
    for threads in (1, 2, 5):
        np.testing.assert_array_equal(cpu.checksum(data, threads), wanted)


def test_every_bit_and_every_place_count(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 3000, np.uint8)
    whole = cpu.checksum(data, 1).tobytes()
    for place in range(0, len(data), 7):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert cpu.checksum(data, 1).tobytes() != whole
            data[place] ^= 1 << bit
    for one, other in ((0, 256), (4, 2564), (100, 101)):  # the same words elsewhere, in one lane and in two
        swapped = data.copy()
        swapped[one : one + 4], swapped[other : other + 4] = data[other : other + 4], data[one : one + 4].copy()
        assert cpu.checksum(swapped, 1).tobytes() != whole


@pytest.mark.parametrize("bit", range(32))
def test_two_flips_of_one_bit_in_one_lane_do_not_cancel(bit: int) -> None:
    for first in (0, 1):
        words = np.zeros(LANES * 40, np.uint32)
        words[LANES * 3] |= np.uint32(first << bit)
        changed = words.copy()
        changed[[LANES * 3, LANES * 9]] ^= np.uint32(1 << bit)
        assert cpu.checksum(words.view(np.uint8), 1).tobytes() != cpu.checksum(changed.view(np.uint8), 1).tobytes()
