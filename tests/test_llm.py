"""An artifact in this process: what a ledger says is what the engine has, and a call leaves nothing to the next."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.models import FAMILIES, build
from tests.service.fakes import wait_for
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions
from xllm.llm import open_engine
from xllm.memory import PROCESS_BYTES, plan_memory
from xllm.offline import LLM, Completion
from xllm.runtime import EngineConfig, RequestRefused, SamplingParams
from xllm.service.template import ChatTemplate

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    return build(folder, FAMILIES["qwen3"], options=CompileOptions(max_len=256, max_seqs=4))[1]


@pytest.fixture(scope="module")
def llm(artifact: Path) -> Iterator[LLM]:
    with LLM(artifact, threads=1) as running:
        yield running


def prompts(count: int) -> list[list[int]]:
    return [[index, index + 1, index + 2] for index in range(count)]


def test_a_refused_call_leaves_nothing_to_the_next(llm: LLM) -> None:
    [alone] = llm.generate(prompts(1), **GREEDY)
    with pytest.raises(RequestRefused, match="token_out_of_range"):
        llm.generate([*prompts(3), [10**9]], **GREEDY)
    assert llm.generate(prompts(1), **GREEDY) == [alone]
    with pytest.raises(TypeError, match="temperature"):
        llm.generate(prompts(1), SamplingParams(), temperature=0)


def test_more_prompts_than_the_queue_holds(artifact: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.llm.EngineConfig", partial(EngineConfig, queue_limit=2))
    with LLM(artifact, threads=1) as narrow:
        assert narrow.generate(prompts(20), **GREEDY) == llm.generate(prompts(20), **GREEDY)


def test_threads_take_turns(llm: LLM) -> None:
    expected = llm.generate(prompts(4), **GREEDY)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda prompt: llm.generate([prompt], **GREEDY), prompts(4))
        assert [answer for [answer] in answers] == expected


def test_a_closed_engine_leaves_no_thread_and_no_memory(artifact: Path) -> None:
    before = set(threading.enumerate())
    with LLM(artifact, threads=2) as second:
        second.generate(prompts(1), **GREEDY)
        assert {thread.name for thread in set(threading.enumerate()) - before} >= {"xllm-engine", "xllm-executor"}
        assert second._engine is not None
        executor = weakref.ref(second._engine._core.executor)
    assert set(threading.enumerate()) <= before
    del second
    gc.collect()
    assert executor() is None


@pytest.mark.parametrize("memory_bytes", [None, 1 << 30])
@pytest.mark.parametrize("max_seqs", [None, 1])
def test_the_ledger_is_what_the_engine_has(artifact: Path, memory_bytes: int | None, max_seqs: int | None) -> None:
    engine, ledger = open_engine(
        Artifact.open(artifact), print, memory_bytes=memory_bytes, threads=1, max_seqs=max_seqs
    )
    stats = engine.stats()
    engine.stop()
    assert ledger.kv == stats.total_pages * stats.page_bytes
    sequences = max_seqs or 4
    assert 256 * sequences <= ledger.kv_tokens < 256 * sequences + ledger.pool.tokens_for(1) * sequences
    assert f"{ledger.kv_tokens:,} tokens" in ledger.table()


def test_answers_are_the_same_with_and_without_the_prefix_cache(artifact: Path) -> None:
    prompts = [[*range(1, 60), *range(last)] for last in (5, 9, 1, 9)]
    answers = []
    for prefix_cache in (True, False):
        with LLM(artifact, threads=1, prefix_cache=prefix_cache) as llm:
            answers.append([llm.generate(prompts, temperature=0, max_tokens=8, ignore_eos=True) for _ in range(2)])
            assert llm.ledger is not None and llm._engine is not None
            assert llm.ledger.prefix_note().startswith("on, " if prefix_cache else "off, as asked")
            cached = llm._engine.stats().cached_tokens
            assert cached >= 4 * 48 if prefix_cache else cached == 0
    assert answers[0] == answers[1]


def test_what_was_computed_goes_to_the_tiers_that_were_asked_for(artifact: Path, tmp_path: Path) -> None:
    options = {"host_cache": 1 << 20, "disk_cache": tmp_path / "kv", "disk_cache_size": 1 << 24}
    with LLM(artifact, threads=1, **options) as llm:
        assert llm.ledger is not None and llm._engine is not None
        assert llm.ledger.host_cache > 0 and "host cache" in llm.ledger.table()
        llm.generate([[*range(1, 60)]], temperature=0, max_tokens=8, ignore_eos=True)
        end = time.monotonic() + 60
        while min(tier.stored for tier in llm._engine.stats().tiers) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        assert [(tier.name, tier.stored) for tier in llm._engine.stats().tiers] == [("host", 4), ("disk", 4)]
    assert len(list((tmp_path / "kv").glob("kv-*/*.kv"))) == 4


def test_memory_that_can_not_do_is_refused_with_numbers(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Artifact.open(artifact)
    with pytest.raises(ArtifactError, match=r"256 tokens needs 2MiB: give --memory \d+MiB"):
        plan_memory(opened, PROCESS_BYTES)
    monkeypatch.setattr("xllm.memory._available_bytes", lambda: PROCESS_BYTES)
    with pytest.raises(ArtifactError, match="smaller --memory"):
        plan_memory(opened, 1 << 30)
    with pytest.raises(ArtifactError, match="free some"):
        plan_memory(opened, None)


def test_prompts_may_be_written_in_each_of_their_forms(llm: LLM) -> None:
    ids = llm.codec.encode("hello", True)
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    assert len(set(llm.generate(forms, **GREEDY))) == 1 == len(llm.generate(ids, **GREEDY))
    for wrong in ({}, {"text": "a"}, {"prompt": "a", "prompt_token_ids": [1]}):
        with pytest.raises(RequestRefused, match="prompt_token_ids"):
            llm.generate([wrong], **GREEDY)


def test_a_chat_is_its_template_and_each_of_several_has_an_answer(llm: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    one, other = llm.chat([chat, [{"role": "user", "content": "no"}]], **GREEDY)
    assert llm.chat(chat, **GREEDY) == [one] != [other]
    assert llm.artifact.chat_template is not None
    text = ChatTemplate(llm.artifact.chat_template, llm.artifact.special_tokens).render(chat, {})
    assert llm.generate([llm.codec.encode(text, False)], **GREEDY) == [one]
    with pytest.raises(RequestRefused, match=r"messages\[0\].role"):
        llm.chat([{"role": "boss", "content": "hi"}])
    with pytest.raises(TypeError, match="tools"):
        llm.chat(chat, tools=[])


def test_a_stream_is_the_whole_in_pieces_and_ends_where_it_is_left(llm: LLM) -> None:
    async def gather(prompt: list[int]) -> list[Completion]:
        return [piece async for piece in llm.stream(prompt, **GREEDY, logprobs=1)]

    async def many() -> list[list[Completion]]:
        return await asyncio.gather(*map(gather, prompts(6)))

    for pieces, whole in zip(asyncio.run(many()), llm.generate(prompts(6), **GREEDY, logprobs=1), strict=True):
        assert [len(piece.tokens) for piece in pieces] == [1] * 8
        assert "".join(piece.text for piece in pieces) == whole.text
        assert sum((piece.top_logprobs for piece in pieces), ()) == whole.top_logprobs
        assert [piece.finish_reason for piece in pieces] == [None] * 7 + ["length"]

    async def leave() -> None:
        async with contextlib.aclosing(llm.stream([1, 2, 3], temperature=0, ignore_eos=True)) as pieces:
            async for _ in pieces:
                break

    engine = llm._engine
    assert engine is not None
    before = engine.stats().cancelled
    asyncio.run(leave())
    assert not llm._routes
    wait_for(lambda: engine.stats().cancelled == before + 1)


def test_an_answer_ends_before_a_stop_text_and_its_request_with_it(llm: LLM) -> None:
    [whole] = llm.generate(prompts(1), **GREEDY)
    stop = whole.text[3:5]
    [cut] = llm.generate(prompts(1), **GREEDY, stop=stop)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.tokens == whole.tokens[: len(cut.tokens)] != whole.tokens
    assert llm.generate(prompts(1), **GREEDY) == [whole]


def test_a_bar_is_shown_where_it_is_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(prompts(2), **GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(prompts(2), **GREEDY, progress=True)
    said = capsys.readouterr()
    assert not said.out and "prompts" in said.err and "100%" in said.err
