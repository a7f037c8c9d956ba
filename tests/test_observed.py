"""A server that is looked at: the traffic it records is what the compiler takes, and answers stay as they are."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.models import FAMILIES, build
from tests.servers import serving
from xllm import cli
from xllm.artifact import Artifact
from xllm.compiler import CompileOptions
from xllm.traffic import read_traffic

FLAGS = ("--memory", "256MiB", "--threads", "1", "--log-level", "error", "--no-prefix-cache")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its artifact."""
    options = CompileOptions(max_len=256, max_seqs=8, max_batch_tokens=128)
    return build(tmp_path_factory.mktemp("observed"), FAMILIES["qwen3"], options=options)


def ask(url: str, prompt: int, tokens: int) -> str:
    body = {
        "prompt": [300 + at % 50 for at in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_recorded_traffic_gives_buckets_that_fit_it(compiled: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, artifact = compiled
    file = tmp_path / "traffic.json"
    with serving(artifact, *FLAGS, "--record-traffic", str(file)) as server:
        for _ in range(3):
            ask(server.url, 37, 9)
            ask(server.url, 90, 5)
        assert not file.exists(), "it is written by the minute"
        steps = server.metric("num_processing_tokens_total_generated")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "nothing is left beside it"
    seen = dict(read_traffic(file))
    assert seen.pop(1) == 3 * 8 + 3 * 4 and seen == {37: 3, 90: 3} and steps == 42
    told = json.loads(file.read_text())["seen"]
    buckets = [bucket.T for bucket in Artifact.open(artifact).plan.buckets]
    wide = [next(str(size) for size in buckets if size >= tokens) for tokens in (37, 90)]
    assert told["rows"] == {"1": 42} and (told["decodes"], told["prompts"], told["prompt_tokens"]) == (36, 6, 381)
    ones = {} if 1 in buckets else {str(buckets[0]): 36}
    assert told["bucket_misses"] == {**ones, **{size: 3 * wide.count(size) for size in wide}}
    limits = ["--max-len", "256", "--max-seqs", "8", "--max-batch-tokens", "128", "--quiet"]
    assert cli.main(["compile", str(checkpoint), "-o", str(tmp_path / "again"), "--traffic", str(file), *limits]) == 0
    again = [bucket.T for bucket in Artifact.open(tmp_path / "again").plan.buckets]
    assert again == [1, 37, 90, 128] != buckets


def test_a_file_that_can_not_be_written_is_refused_at_the_start(compiled, tmp_path: Path, capsys) -> None:
    for file, why in ((tmp_path / "none" / "t.json", "is not a folder that can be written to"), (tmp_path, "a folder")):
        assert cli.main(["serve", str(compiled[1]), "--record-traffic", str(file)]) == 2
        assert why in capsys.readouterr().err
