"""Traffic histograms: what is read, and what is refused by name."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from xllm.files import KeptFile
from xllm.traffic import MAX_FILE_BYTES, MAX_SIZES, MAX_TOKENS, Traffic, counted, read_traffic


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


def test_what_a_server_records_is_read_again_in_bounded_memory(tmp_path: Path) -> None:
    traffic, chance = Traffic(), random.Random(1)
    assert traffic.to_json() is None, "no step is no histogram"
    sizes = [*range(1, 600), MAX_TOKENS, *(chance.randrange(1, MAX_TOKENS) for _ in range(20_000))]
    for size in sizes:
        traffic.add(size, chance.randrange(1, 300), 0, 1 << 20)
    content = traffic.to_json()
    assert content is not None and len(content) < MAX_FILE_BYTES
    file = tmp_path / "traffic.json"
    file.write_bytes(content)
    found = dict(read_traffic(file))
    assert len(found) <= MAX_SIZES and sum(found.values()) == len(sizes)
    assert set(range(1, 513)) <= set(found), "small sizes are themselves"
    for size in sizes:
        assert size <= counted(size) <= size * 257 / 256 and counted(size) in found


def test_the_file_is_written_in_time_and_at_the_end(tmp_path: Path) -> None:
    traffic, file = Traffic(), tmp_path / "traffic.json"
    keeper = KeptFile("traffic", traffic.to_json, file, seconds=0.01)
    traffic.add(5, 2, 1, 8)
    while not file.exists():
        time.sleep(0.005)
    assert read_traffic(file) == ((5, 1.0),)
    traffic.add(8, 1, 0, 8)
    keeper.close()
    assert read_traffic(file) == ((5, 1.0), (8, 1.0))
    assert json.loads(file.read_text())["seen"] == {
        "rows": {"1": 1, "2": 1}, "decodes": 1, "prompts": 2, "prompt_tokens": 12, "bucket_misses": {"8": 1},
    }  # fmt: skip


def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("xllm.files.write_whole", full)
    traffic = Traffic()
    traffic.add(5, 1, 0, 8)
    KeptFile("traffic", traffic.to_json, tmp_path / "traffic.json").close()
    assert "was not written" in caplog.text and "No space left" in caplog.text
