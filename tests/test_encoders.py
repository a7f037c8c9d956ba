"""Embeddings and label scores against transformers, the same bits in any company, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.encoders import MODELS, VOCAB, reference, write_model
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions, compile_checkpoint
from xllm.errors import CompileError
from xllm.inspection.show import show
from xllm.llm import open_engine
from xllm.offline import LLM
from xllm.runtime.errors import RequestRefused

LENGTHS = (1, 2, 17, 64, 65, 90, 33)
OPTIONS = CompileOptions(max_batch_tokens=96, max_seqs=4)


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, VOCAB, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Path]]]:
    """Checkpoint and artifact of every model, made when first asked for."""
    root = tmp_path_factory.mktemp("encoders")

    class Made(dict[str, tuple[Path, Path]]):
        def __missing__(self, name: str) -> tuple[Path, Path]:
            checkpoint = write_model(root / name, name)
            compile_checkpoint(checkpoint, root / f"{name}.xllm", OPTIONS)
            self[name] = checkpoint, root / f"{name}.xllm"
            return self[name]

    yield Made()


def rows(llm: LLM, texts: list[list[int]]) -> np.ndarray:
    return llm.embed(texts) if llm.artifact.task == "embed" else llm.score(texts)


@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, artifact = built[name]
    wanted = reference(checkpoint, name, prompts())
    with LLM(artifact, threads=1) as llm:
        got = rows(llm, prompts())
    # Against the largest row: what is left of a single logit may be next to nothing.
    errors = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1).max()
    assert got.shape == wanted.shape
    assert errors.max() <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_in_any_company(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    """Alone, with others, in any order, on one thread or two; a decoder's prompt also cut into steps."""
    _, artifact = built[name]
    texts = prompts()
    with LLM(artifact, threads=1) as llm:
        together = rows(llm, texts)
        alone = np.concatenate([rows(llm, [text]) for text in texts])
    with LLM(artifact, threads=2) as llm:
        backwards = rows(llm, texts[::-1])[::-1]
    assert alone.tobytes() == together.tobytes()
    assert backwards.tobytes() == together.tobytes()


def test_a_decoder_takes_prompts_longer_than_a_step(built: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, artifact = built["qwen3-embedding"]
    compile_checkpoint(checkpoint, tmp_path / "narrow.xllm", CompileOptions(max_batch_tokens=16, max_seqs=2))
    with LLM(artifact, threads=1) as wide, LLM(tmp_path / "narrow.xllm", threads=1) as narrow:
        assert wide.embed(prompts()).tobytes() == narrow.embed(prompts()).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_to_torch(name: str, built: dict[str, tuple[Path, Path]]) -> None:
    plan = Artifact.open(built[name][1]).plan
    assert not [call.op for call in plan.calls if call.kernel == "torch"]


def test_golden(built: dict[str, tuple[Path, Path]], golden: Callable[[Path, str], None]) -> None:
    golden(Path(__file__).parent / "golden" / "bert.ir", show(built["bert"][1]))


def test_texts_get_the_special_tokens_of_their_tokenizer(built: dict[str, tuple[Path, Path]]) -> None:
    with LLM(built["bert"][1], threads=1) as llm:
        ids = llm.codec.encode("hello", True)
        assert (ids[0], ids[-1]) == (1, 2)
        assert llm.embed("hello").tobytes() == llm.embed([ids]).tobytes()
        assert llm.embed([]).shape == (0, 48)
    with LLM(built["roberta-classifier"][1], threads=1) as llm:
        pair = llm.codec.encode_pair("a", "bc")
        assert pair.count(2) == 2
        assert llm.score([("a", "bc")]).tobytes() == llm.score([pair]).tobytes()
        assert len(llm.labels) == 3


def test_bad_input_is_refused_by_name(built: dict[str, tuple[Path, Path]]) -> None:
    with LLM(built["bert"][1], threads=1) as llm:
        before = llm.embed([[5, 6]])
        for bad, code in (([], "empty_prompt"), ([VOCAB], "token_out_of_range"), ([-1], "token_out_of_range"),
                          ([5] * 97, "context_length_exceeded")):  # fmt: skip
            with pytest.raises(RequestRefused, match=code):
                llm.embed([[5, 6], bad])
        with pytest.raises(RequestRefused, match=r"wrong_task.*embed\(texts\)"):
            llm.score(["a"])
        with pytest.raises(RequestRefused, match="wrong_task"):
            llm.generate("a")
        assert llm.embed([[5, 6]]).tobytes() == before.tobytes()


def test_segments_tell_the_texts_of_a_pair_apart(built: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, artifact = built["bert-classifier"]
    with LLM(artifact, threads=1) as llm:
        ids = llm.codec.encode_pair("hello", "you", VOCAB)
        assert [token // VOCAB for token in ids] == [0] * 7 + [1] * 4
        got = np.concatenate([llm.score([("hello", "you")]), llm.score([[t % VOCAB for t in ids], ids])])
        with pytest.raises(RequestRefused, match="token_out_of_range"):
            llm.score([[2 * VOCAB]])
    wanted = reference(checkpoint, "bert-classifier", [ids, [token % VOCAB for token in ids]])
    assert np.linalg.norm(wanted[0] - wanted[1]) > 0.01 * np.linalg.norm(wanted[0])
    assert np.linalg.norm(got[:2] - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert got[2].tobytes() == got[0].tobytes()


def test_an_engine_of_tokens_and_too_little_memory_are_refused(built: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(ArtifactError, match="computes embeddings"):
        open_engine(Artifact.open(built["bert"][1]), print)
    with pytest.raises(ArtifactError, match="more"):
        LLM(built["bert"][1], memory_bytes=1 << 20)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "and"),
        ("1_Pooling/config.json", [], "not a JSON object"),
        ("modules.json", {}, "not a JSON array"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "Dense"),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../x"}], "outside"),
    ],
)
def test_files_that_ask_for_what_is_not_computed(file: str, content: object, message: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "bert", "bert")
    (checkpoint / file).write_text(json.dumps(content))
    with pytest.raises(CompileError, match=message):
        compile_checkpoint(checkpoint, tmp_path / "out.xllm", OPTIONS)


def test_task_by_hand(built: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A decoder with files of sentence-transformers still generates when told to."""
    checkpoint, _ = built["qwen3-embedding"]
    compile_checkpoint(checkpoint, tmp_path / "text.xllm", CompileOptions(task="generate", max_len=64))
    assert Artifact.open(tmp_path / "text.xllm").task == "generate"
    with pytest.raises(CompileError, match="poetry"):
        CompileOptions(task="poetry")
