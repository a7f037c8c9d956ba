"""The table of families names them all, and what it says of a few is what is measured now."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.families import FAMILIES, TABLE, measure


def written() -> dict[str, list[str]]:
    """Cells of each row behind the name."""
    rows = [line.strip("|").split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows[1:]}


def test_every_family_has_its_row() -> None:
    assert set(written()) == set(FAMILIES)


# Two that everybody has, and those that no other test captures at this size.
MEASURED = ("Qwen3", "BERT", "Gemma 3n", "GPT-J", "EXAONE 4", "Cohere 2", "GLM-4-MoE", "Falcon", "PhiMoE")


@pytest.mark.parametrize("name", MEASURED)
def test_rows_are_what_is_measured(name: str, tmp_path: Path) -> None:
    found = measure(name, tmp_path)
    captured, hits, in_torch, error, _ = written()[name]
    assert (captured, in_torch) == (found.captured, str(found.fallbacks or "none"))
    assert [hit.split()[0] for hit in hits.split(", ")] == [hit.split()[0] for hit in found.hits.split(", ")]
    assert max(found.error, float(error)) <= 1e-5


@pytest.mark.parametrize("name", ["Bloom", "Mamba 2"])
def test_families_that_are_not_taken_say_why(name: str, tmp_path: Path) -> None:
    assert written()[name][0] == f"not taken: {measure(name, tmp_path).refused}"
