"""What integer weights and rounded activations cost: held-out loss of the embedded model, and logits on random weights
beside the rounding of llama.cpp at as many bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.accuracy import LIBRARY, SHAPE, checkpoint_by_library, logits, loss, relative
from bench.checkpoints import write_checkpoint
from xllm.compiler import CompileOptions
from xllm.embedded import checkpoint_path

CONVERSATIONS, TOKENS = 6, 32


@pytest.fixture(scope="module")
def of_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> float:
    made = tmp_path_factory.mktemp("bfloat16") / "made.xllm"
    return loss(checkpoint_path(), made, CompileOptions(weights="bfloat16"), CONVERSATIONS)


@pytest.mark.parametrize(
    ("weights", "activations", "most"),
    [
        ("int8.32", None, 0.005),
        ("int8.row", "int8", 0.005),
        ("int4.32", None, 0.03),
        ("int4.128", "int8", 0.03),
    ],
)
def test_held_out_loss(tmp_path: Path, of_bfloat16: float, weights: str, activations: str | None, most: float) -> None:
    chosen = CompileOptions(weights=weights, activations=activations)
    found = loss(checkpoint_path(), tmp_path / "made.xllm", chosen, CONVERSATIONS)
    assert found != of_bfloat16
    assert found <= (1 + most) * of_bfloat16


@pytest.mark.parametrize(("weights", "library"), list(zip(("int8.32", "int4.32"), LIBRARY, strict=True)))
def test_logits_are_no_further_off_than_a_known_library_s(tmp_path: Path, weights: str, library: str) -> None:
    """Ours with rows rounded to whole numbers too, the library's weights as float32; the rounding of rows may cost a
    tenth, which int4 makes up for by choosing its scales."""
    checkpoint = write_checkpoint(tmp_path / "seed", SHAPE)
    rounded = checkpoint_by_library(checkpoint, tmp_path / "rounded", LIBRARY[library])
    reference, ours, theirs = (
        logits(source, tmp_path / "made.xllm", CompileOptions(weights=stored, kv="bfloat16"), TOKENS)
        for source, stored in ((checkpoint, "bfloat16"), (checkpoint, weights), (rounded, "float32"))
    )
    assert relative(theirs, reference) > 0
    assert relative(ours, reference) <= 1.1 * relative(theirs, reference)
