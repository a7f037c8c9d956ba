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


@pytest.mark.parametrize("name", ["Qwen3", "BERT"])
def test_rows_are_what_is_measured(name: str, tmp_path: Path) -> None:
    found = measure(name, tmp_path)
    captured, _, in_torch, error, _ = written()[name]
    assert (captured, in_torch) == (found.captured, "none")
    assert found.fallbacks == 0
    assert max(found.error, float(error)) <= 1e-5
