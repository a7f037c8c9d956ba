"""The prefix cache: what a sequence starts on, what is shared and copied, and what goes when memory is short."""

from __future__ import annotations

from tests.runtime.fakes import Rig, assert_as_alone, request


def test_second():
    rig = Rig(group_bytes=1500)
    prompt = tuple(range(1, 40)) * 3
    for name in "ab":
        rig.engine.submit(request(name, prompt, 20, ignore_eos=True))
        rig.finish()
        assert_as_alone(rig, request(name, prompt, 20, ignore_eos=True))
    print(rig.end("b").cached_tokens, rig.engine.stats())
    assert rig.end("a").cached_tokens == 0 and rig.end("b").cached_tokens == 112
    rig.assert_baseline()
