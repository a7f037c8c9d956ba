"""A short seeded run of every fuzz target; `make fuzz` runs them long."""

from __future__ import annotations

import json
import random

import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import SEEDS, TARGETS
from xllm.service.errors import ApiError
from xllm.service.tokenizer import TextCodec

COUNTS = {"safetensors": 500, "artifact": 400, "tokenizer": 1500, "config": 50, "template": 500,
          "quantisation_config": 300, "onnx_model": 600}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_of_ours_come_out(name: str) -> None:
    rng = random.Random(name)
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    for _ in range(COUNTS[name]):
        data = mutated(rng.choice(SEEDS[name]), rng)
        try:
            TARGETS[name](data)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} on {data[:300]!r}") from error


def test_a_panic_of_the_tokenizers_library_is_an_error_of_ours() -> None:
    """Found by fuzzing: the library slices a merged word by the width of the prefix, which is wider than it."""
    held = json.loads(SEEDS["tokenizer"][0])
    held["model"] |= {"continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
        TextCodec.from_bytes(json.dumps(held).encode())


def test_a_text_without_tokens_is_an_error_of_the_request() -> None:
    """Found by fuzzing: a vocabulary without an unknown token, of a kind that wants one."""
    codec = TextCodec.from_bytes(b'{"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": null}}')
    assert codec.encode("a", False) == [0]
    with pytest.raises(ApiError, match="400 untokenizable_text: the text has no tokens under this tokenizer"):
        codec.encode("b", False)


def test_the_seeds_of_what_must_be_refused_are_accepted() -> None:
    """A corpus that no target lets in would find nothing."""
    from tests.fuzz import targets

    accepted = []
    for name in ("safetensors", "artifact", "tokenizer", "template"):
        TARGETS[name](SEEDS[name][0])
        accepted.append(name)
    with pytest.raises(AssertionError, match="a changed artifact was accepted"):
        original, targets.SEEDS = targets.SEEDS, {**targets.SEEDS, "artifact": (b"",)}
        try:
            targets.artifact(original["artifact"][0])
        finally:
            targets.SEEDS = original
    assert len(accepted) == 4
    assert all(targets.imported(seed).outputs == ("y",) for seed in SEEDS["onnx_model"])
