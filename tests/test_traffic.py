"""Traffic histograms: what is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm.traffic import read_traffic


def test_a_file_without_end_is_read_to_the_limit() -> None:
    with pytest.raises(ValueError, match="/dev/zero is larger than 4 MiB"):
        read_traffic("/dev/zero")


def test_sizes_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "traffic.json"
    file.write_text('{"schema": 1, "steps": {"512": 3, "1": 9120, "17": 40.5}}')
    assert read_traffic(file) == ((1, 9120.0), (17, 40.5), (512, 3.0))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"schema": 2, "steps": {"1": 1}}', '{"schema": 1, "steps": {}}',
        '{"schema": 1, "steps": {"0": 1}}', '{"schema": 1, "steps": {"-1": 1}}', '{"schema": 1, "steps": {"1.5": 1}}',
        '{"schema": 1, "steps": {"1": -1}}', '{"schema": 1, "steps": {"1": true}}',
        '{"schema": 1, "steps": {"1": "2"}}',
        '{"schema": 1, "steps": {"1": NaN}}', '{"schema": 1, "steps": {"1": 0}}', '{"schema": 1, "steps": [[1, 1]]}',
        '{"schema": 1, "steps": {"1": 1, "01": 1}}', '{"schema": 1, "steps": {"99999999": 1}}', "[" * 100000,
        '{"schema": 1, "steps": {"1": 1}, "more": 1}', '{"schema": 1, "steps": {"1": 1e300}}',
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "traffic.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"traffic\.json is no traffic histogram: "):
        read_traffic(file)
