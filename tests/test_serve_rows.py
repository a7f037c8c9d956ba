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
from xllm.offline import LLM
from xllm.traffic import read_traffic

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


def test_behaviour_57_embeddings_are_those_of_this_process(embedder: Server, artifacts: Mapping[str, Path]) -> None:
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


def test_behaviour_57_dimensions_cut_and_are_of_length_1(embedder: Server, artifacts: Mapping[str, Path]) -> None:
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


def sigmoid(logits: np.ndarray) -> list[float]:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()


def test_behaviour_58_a_classifier_reranks_by_its_probability(reranker: Server, artifacts: Mapping[str, Path]) -> None:
    with LLM(artifacts["bert-reranker"], threads=1) as llm:
        wanted = sigmoid(llm.score([("who?", text) for text in TEXTS])[:, 0])
        pairs = sum(len(llm.codec.encode_pair("who?", text)) for text in TEXTS)
    order = sorted(range(len(TEXTS)), key=lambda at: (-wanted[at], at))
    assert order != sorted(order)
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = httpx.post(f"{reranker.url}{path}", json={"query": "who?", "documents": TEXTS, "top_n": 4}).json()
        assert [each["index"] for each in answer["results"]] == order[:4]
    assert [each["document"]["text"] for each in answer["results"]] == [TEXTS[at] for at in order[:4]]
    found = [each["relevance_score"] for each in answer["results"]]
    assert found == pytest.approx([wanted[at] for at in order[:4]], rel=1e-12)
    assert answer["usage"] == {"prompt_tokens": pairs, "total_tokens": pairs}
    ask = {"query": "who?", "documents": [{"text": text} for text in TEXTS], "return_documents": False}
    bare = httpx.post(f"{reranker.url}/v1/rerank", json=ask).json()["results"]
    assert [set(each) for each in bare] == [{"index", "relevance_score"}] * len(TEXTS)
    assert [each["relevance_score"] for each in bare[:4]] == found  # equal texts are ties, and keep their order


def test_scores_of_pairs_and_of_labels(reranker: Server, artifacts: Mapping[str, Path]) -> None:
    with LLM(artifacts["bert-reranker"], threads=1) as llm:
        wanted = sigmoid(llm.score([("a", "b"), ("a", "cd"), ("e", "b")])[:, 0])
        [label] = llm.labels

    def ask(path: str, **fields: object) -> list[dict[str, object]]:
        answer = httpx.post(f"{reranker.url}{path}", json={"model": "bert-reranker", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    one = ask("/v1/score", text_1="a", text_2=["b", "cd"])
    assert [each["score"] for each in one] == pytest.approx(wanted[:2], rel=1e-12)
    both = ask("/score", text_1=["a", "e"], text_2=["b", "b"])
    assert [each["score"] for each in both] == pytest.approx([wanted[0], wanted[2]], rel=1e-12)
    [found] = ask("/v1/classify", input="hello")
    assert (found["label"], found["num_classes"]) == (label, 1)
    cut = ask("/v1/score", text_1="a", text_2="x" * 300, truncate_prompt_tokens=9)
    assert cut[0]["score"] == ask("/v1/score", text_1="a", text_2="x" * 5)[0]["score"]


def test_an_embedding_model_scores_by_the_cosine(embedder: Server, artifacts: Mapping[str, Path]) -> None:
    rows = expected(artifacts["bert"], ["who?", *TEXTS]).astype(np.float64)
    wanted = rows[1:] @ rows[0] / np.linalg.norm(rows[1:], axis=1) / np.linalg.norm(rows[0])
    ask = {"query": "who?", "documents": TEXTS}
    answer = httpx.post(f"{embedder.url}/v1/rerank", json=ask).json()
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    assert [found[at] for at in range(len(TEXTS))] == pytest.approx(wanted.tolist(), rel=1e-9)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found[0] == found[4]
    pair = {"text_1": "who?", "text_2": TEXTS[2]}
    [alone] = httpx.post(f"{embedder.url}/v1/score", json=pair).json()["data"]
    assert alone["score"] == found[2]  # the same bits alone


def test_flags_of_the_scheduler_are_refused(artifacts: Mapping[str, Path]) -> None:
    with pytest.raises(AssertionError, match="ended with"), serving(artifacts["bert"], "--chunk", "4"):
        pass


def test_steps_of_rows_are_recorded_and_profiled(artifacts: Mapping[str, Path], tmp_path: Path) -> None:
    flags = ("--threads", "1", "--record-traffic", str(tmp_path / "traffic.json"), "--profile-dir", str(tmp_path))
    with serving(artifacts["bert"], *flags) as server, client(server) as ask:
        assert httpx.post(f"{server.url}/start_profile").json()["changed"]
        answer = ask.embeddings.create(model="bert", input=TEXTS[:1], encoding_format="float")
        told = httpx.post(f"{server.url}/stop_profile").json()
    assert np.array_equal(np.array([answer.data[0].embedding], np.float32), expected(artifacts["bert"], TEXTS[:1]))
    assert told["steps"] == 1 and answer.usage is not None
    assert read_traffic(tmp_path / "traffic.json") == ((answer.usage.prompt_tokens, 1.0),)
    assert '"prompt step"' in (tmp_path / told["trace"]).read_text()
