"""The whole product through its public surface: a compiled checkpoint, a real server process, the official client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import openai.types
import pytest

from tests.models import FAMILIES, VOCAB, build
from tests.servers import Server, serving
from tests.service.fakes import wait_for
from xllm.compiler import CompileOptions

CLIENTS = 1000


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    config = {**FAMILIES["qwen3"], "max_position_embeddings": 2048}
    return build(folder, config, options=CompileOptions(max_len=2048, max_seqs=32))[1]


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact, "--memory", "512MiB", "--max-concurrent-requests", "0", "--log-level", "error") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_start_prints_the_ledger_and_loads_no_torch(server: Server) -> None:
    assert "weights" in server.said and "KV pages" in server.said
    mapped = server.mapped_files()
    assert "libxk" in mapped
    assert "libtorch" not in mapped and "libc10" not in mapped


def test_streamed_equals_whole(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    ask = {"model": model, "messages": [{"role": "user", "content": "héllo wörld"}], "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        == whole.choices[0].message.content
    )
    streamed = parts[-1].usage
    assert whole.usage is not None and whole.usage.completion_tokens == 24
    assert streamed is not None and streamed.prompt_tokens_details is not None
    prompt = whole.usage.prompt_tokens
    assert streamed.prompt_tokens_details.cached_tokens == (prompt - 1) // 16 * 16, "it asked the same again"
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (prompt, 24)


def test_reasoning_that_was_asked_for_is_told_apart(artifact: Path) -> None:
    """The parser says that answers begin inside of it; this model never ends it."""
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 24, "temperature": 0}
    with serving(artifact, "--memory", "256MiB", "--reasoning-parser", "deepseek-r1") as running:
        assert "answers: calls of tools as none, reasoning as deepseek-r1" in running.said
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client:
            whole = client.chat.completions.create(**ask)
            chunks = list(client.chat.completions.create(**ask, stream=True))
    message = whole.choices[0].message
    streamed = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert not message.content
    assert message.reasoning_content == streamed != ""  # pyright: ignore[reportAttributeAccessIssue]
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 24


def test_the_time_of_steps_is_told_by_phase(server: Server, client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    client.completions.create(model=model, prompt="one two three four five six", max_tokens=8, temperature=0)
    steps = server.metric("num_model_execution_total_eager")
    assert steps == server.metric("vllm:iteration_tokens_total_count") >= 8
    prompts, generated = (server.metric(f"num_processing_tokens_total_{kind}") for kind in ("prompt", "generated"))
    # The last token of an answer is not computed with, nor is what the prefix cache had; a step too many may run.
    assert 0 < server.metric("vllm:iteration_tokens_total_sum") <= prompts + 2 * generated
    parts = ("scheduling", "allocate_blocks", "prepare_input")
    names = [f"{part}_latency_seconds" for part in parts]
    names += ["execution_latency_seconds_model", "execution_latency_seconds_sampling"]
    names += ["prefix_cache_latency_seconds_match"]
    spent = {name: server.metric(name) for name in names}
    assert all(seconds > 0 for seconds in spent.values()), spent
    assert server.metric("engine_latency_seconds") >= sum(spent.values())
    assert server.metric("total_memory_size_in_kilobytes") > server.metric("weight_size_in_kilobytes") > 0


def test_seed_gives_the_same_samples_in_any_company(client: openai.OpenAI) -> None:
    prompt = list(range(300, 340))
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "seed": 7, "temperature": 1.0, "n": 3, "logprobs": 2}
    first = client.completions.create(**ask)
    second = client.completions.create(**{**ask, "prompt": [prompt, prompt[::-1]]})
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) > 1, "samples of one seed differ by their index"
    assert [choice.text for choice in second.choices[:3]] == texts
    held = first.choices[0].logprobs
    assert held is not None and held.token_logprobs is not None and len(held.token_logprobs) == 16


def test_greedy_text_is_the_engine_s_own(client: openai.OpenAI, artifact: Path) -> None:
    import xllm

    prompt = list(range(260, 300))
    with xllm.LLM(artifact, memory_bytes=512 << 20, threads=1) as llm:
        [own] = llm.generate([prompt], temperature=0, max_tokens=20, ignore_eos=True)
    served = client.completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert served.choices[0].text == own.text


def test_stop_string_across_tokens_is_cut(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "prompt": list(range(300, 330)), "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**ask).choices[0].text
    stop = text[5:9]
    stopped = client.completions.create(**ask, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


BAD = {
    "malformed JSON": (b'{"model": "tiny", "prompt": ', 400),
    "invalid UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
    "NaN temperature": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    "wrong type": ({"prompt": "a", "max_tokens": "many"}, 400),
    "unknown field": ({"prompt": "a", "frobnicate": 1}, 400),
    "unknown model": ({"model": "nobody", "prompt": "a"}, 404),
    "prompt too long": ({"prompt": [300] * 2048}, 400),
    "max_tokens beyond the context": ({"prompt": "a", "max_tokens": 4000}, 400),
    "token id out of range": ({"prompt": [VOCAB]}, 400),
    "negative token id": ({"prompt": [-1]}, 400),
    "empty prompt": ({"prompt": []}, 400),
    "huge n": ({"prompt": "a", "n": 100000}, 400),
    "10 MB body": (b'{"model": "tiny", "prompt": "' + b"a" * 10_000_000 + b'"}', 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_typed_refusal(name: str, server: Server) -> None:
    body, status = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps({"model": "tiny", **body}).encode()
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_empty_messages_and_no_answer_for_get(server: Server) -> None:
    empty = httpx.post(f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert empty.status_code == 400
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405


def test_a_template_that_loops_is_refused_and_the_server_of_a_packed_file_lives(tmp_path: Path) -> None:
    from bench.checkpoints import write_checkpoint
    from xllm.artifact import pack
    from xllm.compiler import compile_checkpoint

    folder = write_checkpoint(tmp_path / "tiny", FAMILIES["qwen3"], dtype="float32")
    looping = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(looping)
    compile_checkpoint(folder, tmp_path / "artifact")
    pack(tmp_path / "artifact", tmp_path / "tiny.pack")
    with serving(tmp_path / "tiny.pack", "--memory", "512MiB") as running:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "template_error"
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 2, "ignore_eos": True}
        answer = httpx.post(f"{running.url}/v1/completions", json=ask, timeout=30)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2


def test_a_thousand_clients_that_leave_mid_stream(server: Server) -> None:
    """Every page comes back, nothing goes on running, and the server answers as before."""
    free = server.metric("num_free_blocks")
    asyncio.run(_leave_mid_stream(server.url))
    deadline = time.monotonic() + 60
    while server.metric("num_running_requests") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("num_running_requests") == 0
    assert server.metric("num_free_blocks") == free
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200


async def _leave_mid_stream(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "abcdefgh", "max_tokens": 1500, "stream": True, "ignore_eos": True})
    head = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    request = "\r\n".join((*head, "", body)).encode()
    seats = asyncio.Semaphore(50)

    async def visit() -> None:
        async with seats:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(request)
            assert b"200" in await reader.readline()
            await reader.readuntil(b"data: ")
            writer.transport.abort()

    await asyncio.gather(*(visit() for _ in range(CLIENTS)))


def test_termination_drains(artifact: Path) -> None:
    """A stream that runs when SIGTERM comes is finished; the process then ends with 0."""
    with serving(artifact, "--memory", "512MiB") as running:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(running.process.pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum(line.startswith("data: {") for line in rest) >= 150
        assert running.process.wait(20) == 0


def test_a_batch_goes_on_after_the_server_was_killed_and_stopped(artifact: Path, tmp_path: Path) -> None:
    """Each line is answered once, with the bits of any other run."""
    flags = ("--memory", "512MiB", "--state-dir", str(tmp_path / "state"), "--log-level", "error")
    prompts = [list(range(300 + at % 20, 330 + at)) for at in range(150)]
    ask = {"max_tokens": 80, "temperature": 0.8, "logprobs": 1, "ignore_eos": True}
    lines = [
        {"custom_id": f"{at}", "method": "POST", "url": "/v1/completions", "body": ask | {"prompt": prompt, "seed": at}}
        for at, prompt in enumerate(prompts)
    ]

    def now(client: openai.OpenAI) -> tuple[openai.types.Batch, int]:
        batch = client.batches.retrieve(name)
        return batch, batch.request_counts.completed if batch.request_counts else 0

    def reached(client: openai.OpenAI, count: int, *states: str) -> bool:
        batch, done = now(client)
        return done >= count and batch.status in states

    name, wanted = "", 10
    for end in (signal.SIGKILL, signal.SIGTERM, None):
        with serving(artifact, *flags) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as client:
            if not name:
                file = client.files.create(file="\n".join(map(json.dumps, lines)).encode(), purpose="batch")
                kind = "/v1/completions"
                name = client.batches.create(input_file_id=file.id, endpoint=kind, completion_window="24h").id
            wait_for(partial(reached, client, wanted, "in_progress", "completed"))
            if end is not None:
                before = now(client)[1]
                wanted = min(before + 10, len(lines))
                server.process.send_signal(end)
                assert server.process.wait(20) == (-end if end == signal.SIGKILL else 0)
                continue
            wait_for(partial(reached, client, len(lines), "completed"))
            batch, done = now(client)
            assert done == len(lines) and batch.output_file_id is not None and batch.error_file_id is None
            found = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
            assert sorted(int(item["custom_id"]) for item in found) == list(range(len(lines)))
            answers = {item["custom_id"]: item["response"]["body"]["choices"] for item in found}
            for at in range(0, len(lines), 10):
                alone = client.completions.create(model="tiny", prompt=prompts[at], extra_body=ask | {"seed": at})
                assert [choice.model_dump(exclude_unset=True) for choice in alone.choices] == answers[f"{at}"]
            asked = server.metric("num_processing_tokens_total_generated") / ask["max_tokens"]
            assert asked <= len(lines) - before + len(lines) // 10, "what was on disk was not asked again"


def test_a_checkpoint_folder_is_compiled_once(tmp_path: Path) -> None:
    from bench.checkpoints import write_checkpoint

    folder = write_checkpoint(tmp_path / "model", FAMILIES["qwen2"], dtype="float32")
    env = {"XLLM_CACHE": str(tmp_path / "cache")}
    said = []
    for _ in range(2):
        with serving(folder, "--memory", "512MiB", env=env) as running:
            assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["id"] == "model"
            said.append(running.said)
    assert "compiling it once" in said[0] and "compiled from it before" in said[1]
