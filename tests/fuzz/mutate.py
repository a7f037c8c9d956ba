"""Bytes near sound ones: flipped, cut, doubled, spliced, and with words that parsers know in the wrong places."""

from __future__ import annotations

import random

WORDS = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b'"\\ud800"', b"\xff", b"\x00", b"[" * 2000,
    b"9" * 5000, b"18446744073709551615", b"{{", b"{%", b"%}", b"}}", b"9999999999", b"../", b"|", b".", b"__class__",
    b"\xff" * 8, b"\x00" * 8, b"(1,)*99999999", b"loop",
)  # fmt: skip


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """One to four changes of `seed`."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.choice(WORDS)
            case 2:
                data[at : at + rng.randint(1, 8)] = rng.choice(WORDS)
            case 3:
                del data[at : at + rng.randint(1, 32)]
            case 4:
                del data[at:]
            case _:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randint(1, 64)]
    return bytes(data)
