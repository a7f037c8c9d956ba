"""Of the 64 behaviours that acceptance asks for, each is a test with its number in the name, or is named here with what
it waits for."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
SEVERAL_INSTANCES = "prefill and decode in processes of their own, behind a router"
SPECULATION = "speculative decoding"
GRAPHS = "graphs of a device"
WAITING = {
    **dict.fromkeys((17, 18, 19, 20, 21, *range(39, 48), 50, 60), SEVERAL_INSTANCES),
    **dict.fromkeys((22, 23, 24), GRAPHS),
    **dict.fromkeys((25, 26), SPECULATION),
    29: "encoders of images",
    30: "pages of one size for each layer; pages of all layers together are test_pages_and_tokens_are_inverse",
    31: "pools made of several; windows of layers",
}
NAMED = re.compile(r"def test_behaviours?_(\d+)(?:_and_(\d+))?_")


def test_every_behaviour_has_a_test_or_a_reason() -> None:
    shown: set[int] = set()
    for file in TESTS.rglob("test_*.py"):
        for numbers in NAMED.findall(file.read_text(encoding="utf-8")):
            shown |= {int(number) for number in numbers if number}
    assert shown | WAITING.keys() == {*range(1, 65)}
    assert not shown & WAITING.keys()
