"""`xllm serve` over artifacts that give rows, asked by the official client and by hand: the same bits as in this
process, whatever comes at the same time."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.encoders import VOCAB, write_model
from tests.servers import Server, serving
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.llm import LLM

OPTIONS = CompileOptions(max_batch_tokens=96, max_seqs=4)
TEXTS = ["a fox", "the lantern", "grüße 😀", "z" * 60, "a fox"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("rows")
    made = {name: root / f"{name}.xllm" for name in ("bert", "bert-reranker")}
    for name, artifact in made.items():
        compile_checkpoint(write_model(root / name, name), artifact, OPTIONS)
    return made


@pytest.fixture(scope="module")
def embedder(artifacts: Mapping[str, Path]) -> Iterator[Server]:
    with serving(artifacts["bert"], "--threads", "1") as server:
        yield server


@pytest.fixture(scope="module")
def reranker(artifacts: Mapping[str, Path]) -> Iterator[Server]:
    with serving(artifacts["bert-reranker"], "--threads", "1") as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def expected(artifact: Path, texts: list[str]) -> np.ndarray:
    with LLM(artifact, threads=1) as llm:
        return llm.embed(texts)


def test_embeddings_are_those_of_this_process(embedder: Server, artifacts: Mapping[str, Path]) -> None:
    wanted = expected(artifacts["bert"], TEXTS)
    with client(embedder) as ask:
        answer = ask.embeddings.create(model="bert", input=TEXTS)
        plain = ask.embeddings.create(model="bert", input=TEXTS, encoding_format="float")
        raw = httpx.post(f"{embedder.url}/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    assert [item.index for item in answer.data] == list(range(len(TEXTS)))
    for data in (answer.data, plain.data):
        assert np.array([item.embedding for item in data], np.float32).tobytes() == wanted.tobytes()
    assert b"".join(base64.b64decode(item["embedding"]) for item in raw["data"]) == wanted.astype("<f4").tobytes()
    assert np.allclose(np.linalg.norm(wanted, axis=1), 1)
    tokens = sum(len(text.encode()) + 2 for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert answer.object == "list"


def test_one_text_ids_and_lists_of_ids(embedder: Server, artifacts: Mapping[str, Path]) -> None:
    [wanted] = expected(artifacts["bert"], ["hello"])
    with LLM(artifacts["bert"], threads=1) as llm:
        ids = llm.codec.encode("hello", True)
    with client(embedder) as ask:
        for given in ("hello", ["hello"], ids, [ids]):
            [found] = ask.embeddings.create(model="bert", input=given).data  # pyright: ignore[reportArgumentType]
            assert np.array(found.embedding, np.float32).tobytes() == wanted.tobytes()
        bare = ask.embeddings.create(model="bert", input="hello", extra_body={"add_special_tokens": False})
        assert bare.usage.prompt_tokens == len(ids) - 2


def test_dimensions_cut_and_are_of_length_1(embedder: Server, artifacts: Mapping[str, Path]) -> None:
    wanted = expected(artifacts["bert"], TEXTS)
    with client(embedder) as ask:
        cut = ask.embeddings.create(model="bert", input=TEXTS, dimensions=7)
        whole = ask.embeddings.create(model="bert", input=TEXTS, dimensions=48)
    found = np.array([item.embedding for item in cut.data])
    assert np.allclose(found, wanted[:, :7] / np.linalg.norm(wanted[:, :7], axis=1, keepdims=True), rtol=1e-6)
    assert np.array([item.embedding for item in whole.data], np.float32).tobytes() == wanted.tobytes()


def test_a_long_text_is_cut_where_asked(embedder: Server) -> None:
    with client(embedder) as ask:
        with pytest.raises(openai.BadRequestError, match="202 tokens, the context holds 96"):
            ask.embeddings.create(model="bert", input="x" * 200)
        cut = ask.embeddings.create(model="bert", input="x" * 200, extra_body={"truncate_prompt_tokens": 10})
        assert cut.usage.prompt_tokens == 10
        assert cut.data[0].embedding == ask.embeddings.create(model="bert", input="x" * 8).data[0].embedding
        most = ask.embeddings.create(model="bert", input="x" * 200, extra_body={"truncate_prompt_tokens": -1})
        assert most.usage.prompt_tokens == 96


def test_many_clients_at_once_get_the_same_bits(embedder: Server, artifacts: Mapping[str, Path]) -> None:
    generator = np.random.default_rng(3)
    prompts = [generator.integers(3, VOCAB, int(length)).tolist() for length in generator.integers(1, 90, 60)]
    with LLM(artifacts["bert"], threads=1) as llm:
        wanted = llm.embed(prompts)
    with client(embedder) as ask, ThreadPoolExecutor(12) as pool:

        def rows(at: int) -> list[list[float]]:
            found = ask.embeddings.create(model="bert", input=prompts[at : at + 3])
            return [item.embedding for item in found.data]

        found = [row for part in pool.map(rows, range(0, 60, 3)) for row in part]
    assert np.array(found, np.float32).tobytes() == wanted.tobytes()
    assert embedder.metric("num_running_requests") == embedder.metric("num_waiting_requests") == 0
    assert embedder.metric("num_processing_tokens_total_prompt") >= sum(map(len, prompts))
    assert embedder.metric("request_handling_latency_seconds_embedding") > 0


def test_what_is_not_for_embeddings_says_what_is(embedder: Server) -> None:
    with client(embedder) as ask, pytest.raises(openai.BadRequestError) as refused:
        ask.chat.completions.create(model="bert", messages=[{"role": "user", "content": "hi"}])
    assert refused.value.code == "wrong_task"
    assert "task embed" in refused.value.message
    assert "/v1/embeddings" in refused.value.message
