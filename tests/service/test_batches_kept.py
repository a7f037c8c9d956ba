"""What a batch has is kept: over restarts, full disks and torn files."""

from __future__ import annotations

import json
import os
from typing import Any

import openai
import pytest

from tests.service.fakes import fake, fake_service, wait_for
from tests.service.test_batches import CHAT, begin, client_of, end, line, lines, results, serving
from xllm.service.batch_lines import Journal, Result
from xllm.service.shelf import Files


def test_a_restart_goes_on_where_the_batch_was(tmp_path):
    """The first server is taken away in the middle; of one answer only half of the line had reached the disk."""
    state = tmp_path / "state"
    asked = [line(f"n{at}") for at in range(60)]
    slow = fake_service(tmp_path, tick=0.05)
    with serving(slow, state) as base, client_of(base) as client:
        batch = begin(client, lines(*asked))
        wait_for(lambda: (client.batches.retrieve(batch.id).request_counts or batch.request_counts).completed > 0)  # type: ignore[union-attr]
    [output] = [
        file
        for file in (state / "files" / "open").glob("*.data")
        if file.stat().st_size and not file.with_suffix(".json").exists()
    ]
    whole = output.read_bytes()
    done = {json.loads(data)["custom_id"] for data in whole.splitlines()}
    output.write_bytes(whole + whole.splitlines()[0][:50])
    (state / "files" / "open" / "file-0.part").write_bytes(b"half an upload")
    after = fake_service(tmp_path)
    with serving(after, state) as base, client_of(base) as client:
        batch = end(client, batch)
        assert batch.status == "completed" and batch.request_counts is not None and batch.error_file_id is None
        assert results(client, batch.output_file_id).keys() == {item["custom_id"] for item in asked}
        assert len(fake(after).seen) <= 60 - len(done)
        assert not list(state.rglob("*.part"))
    with serving(fake_service(tmp_path), state) as base, client_of(base) as client:
        assert client.batches.retrieve(batch.id) == batch, "what has ended stays as it is"


def test_a_disk_that_is_full_delays_a_batch_and_loses_nothing(tmp_path, monkeypatch):
    """Facts and results fail to be written in turn, until there is room again."""
    monkeypatch.setattr("xllm.service.batches.REPAIR_SECONDS", 0.01)
    sync, calls = os.fsync, iter(range(1000))

    def full(file: int) -> None:
        if next(calls) % 3 == 2:
            raise OSError(28, "No space left on device")
        sync(file)

    service = fake_service(tmp_path)
    asked = [line(f"n{at}") for at in range(40)]
    with serving(service, tmp_path / "state") as base, client_of(base) as client:
        file = client.files.create(file=("in.jsonl", lines(*asked)), purpose="batch")
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(openai.InternalServerError) as failed:
                for _ in range(3):
                    client.files.create(file=("in.jsonl", lines(*asked)), purpose="batch")
            kept = [file for file in (tmp_path / "state" / "files" / "open").iterdir() if file.suffix != ".json"]
            assert len(kept) == len(client.files.list().data)
            assert failed.value.code == "storage_failed" and str(tmp_path) not in failed.value.message
            calls = iter(range(1000))
            batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            batch = end(client, batch)
        assert batch.status == "completed"
        assert results(client, batch.output_file_id).keys() == {item["custom_id"] for item in asked}
        assert next(calls) > 10


def test_a_folder_has_one_server(tmp_path):
    files = Files(tmp_path)
    with pytest.raises(ValueError, match="another server keeps its files"):
        Files(tmp_path)
    files.close()
    Files(tmp_path).close()


def test_results_are_written_once_and_whole(tmp_path, monkeypatch):
    """A disk that is full in the middle of a line leaves nothing behind, and the same may be written again."""
    output, errors = tmp_path / "output", tmp_path / "errors"
    journal = Journal("batch_b", output, errors)
    journal.write([Result(0, "a", 200, "r", b"{}")])
    write = os.write

    def full(file: int, data: Any) -> int:
        write(file, data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space"):
            journal.write([Result(1, "b", 200, "r", b"{}"), Result(2, "c", 500, "r", b"{}")])
    journal.write([Result(1, "b", 200, "r", b"{}"), Result(2, "c", 500, "r", b"{}"), Result(0, "a", 200, "r", b"{}")])
    assert [json.loads(data)["custom_id"] for data in output.read_bytes().splitlines()] == ["a", "b"]
    assert [json.loads(data)["custom_id"] for data in errors.read_bytes().splitlines()] == ["c"]
    assert journal.counts == [2, 1] == Journal("batch_b", output, errors).counts
    journal.close()
