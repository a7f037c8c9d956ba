"""The command line: help, errors of one line, exit codes, and one checkpoint from folder to answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.service.fakes import CHAT_TEMPLATE, EOS, TOKENIZER, VOCAB
from xllm import cli

COMMANDS = ("compile", "serve", "generate", "passes", "show", "profile", "tune", "pack", "unpack", "sign", "doctor")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xllm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_help_loads_nothing_heavy():
    code = "import sys; from xllm.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "torch", "transformers", "uvicorn", "rich", "tokenizers", "jinja2", "asyncio"}
    assert heavy.isdisjoint(result.stdout.splitlines()[-1].split())
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"] if name else ["--help"])
    assert ended.value.code == 0
    assert "examples:\n  xllm " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["compile", "here"], "-o/--out"),
        (["compile", "here", "-o", "there", "--weights", "int3"], "--weights"),
        (["compile", "/does/not/exist", "-o", "never.xllm", "--quiet"], "/does/not/exist"),
        (["serve", "/does/not/exist"], "neither an artifact"),
        (["serve", "x", "--memory", "lots"], "is not a size"),
        (["serve", "x", "--port", "99999"], "0 to 65535"),
        (["serve", "x", "--threads", "0"], "--threads"),
        (["serve", "x", "--tool-call-parser", "qwen"], "'qwen3_coder'"),
        (["serve", "x", "--reasoning-parser", "r1"], "'deepseek-r1'"),
        (["serve", "x", "--host", "0.0.0.0"], "--api-key-file"),
        (["serve", "x", "--api-key-file", "/does/not/exist"], "/does/not/exist"),
        (["generate", "/does/not/exist", "-p", "x"], "manifest.json"),
        (["show", "/does/not/exist"], "manifest.json"),
        (["profile", "/does/not/exist"], "manifest.json"),
        (["profile", "x", "--decode", "0"], "is not N or N@CONTEXT"),
        (["profile", "x", "--prefill", "8@-1"], "is not N or N@PAST"),
        (["compile", "x.onnx", "-o", "y", "--tuning", "cached"], "--tuning is for language models"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(arguments, message, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_fault_of_ours_and_an_interrupt(monkeypatch, capsys):
    def fail(error: BaseException):
        def command(_):
            raise error

        return command

    monkeypatch.setattr(cli, "_doctor", fail(ZeroDivisionError("oh")))
    assert cli.main(["doctor"]) == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_doctor", fail(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == ""


def test_tracebacks_do_not_change_the_exit_code(monkeypatch, capsys):
    monkeypatch.setenv("XLLM_DEBUG", "1")
    assert cli.main(["show", "/does/not/exist"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("XLLM_DEBUG", "9")
    assert cli.main(["show", "/does/not/exist"]) == 2
    assert capsys.readouterr().err == "xllm: XLLM_DEBUG is '9', allowed are 0 to 5\n"


def test_a_bar_leaves_no_empty_line(capsys):
    with pytest.raises(KeyError), cli._progress() as show:
        show("capturing", 1, 2)
        raise KeyError
    assert capsys.readouterr().err == ""


def test_a_checkpoint_is_cached_by_its_subfolders_too(tmp_path):
    from xllm.commands import _cached_artifact

    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text("{}")
    before = _cached_artifact(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    assert _cached_artifact(tmp_path) != before


def test_both_pipelines_are_listed(capsys):
    assert cli.main(["passes"]) == 0
    steps, _, functions = capsys.readouterr().out.partition("\n\n")
    assert "fuse-qkv" in steps and "fuse-sdpa" not in steps
    assert "fuse-sdpa" in functions and "fuse-qkv" not in functions and "plan-memory" in functions


def test_a_missing_compiler_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["compile", str(tmp_path), "-o", "y"]) == 2
    assert "pip install 'xllm[compile]'" in capsys.readouterr().err


def test_doctor_says_what_it_found(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"OK", "WARN"}
    assert any("native library" in line for line in lines)
    assert any("GB/s" in line for line in lines)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Qwen3 of one layer with random weights and the byte-level tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    facts: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 256, "eos_token_id": EOS}
    Qwen3ForCausalLM(Qwen3Config(**facts, **width, **heads)).save_pretrained(folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def served(checkpoint: Path, cache: Path) -> tuple[subprocess.Popen[str], list[str], str]:
    """A server on a free port: its process, the lines it printed, its URL."""
    command = [sys.executable, "-m", "xllm.cli", "serve", str(checkpoint), "--port", "0", "--threads", "1"]
    environment = os.environ | {"XLLM_CACHE": str(cache)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("listening on "):
        line = process.stdout.readline()
        assert line, lines
        lines.append(line.rstrip("\n"))
    return process, lines, lines[-1].removeprefix("listening on ")


def test_a_checkpoint_is_compiled_once_served_and_drained(checkpoint, tmp_path):
    process, lines, base = served(checkpoint, tmp_path)
    try:
        assert "compiling it once into" in lines[0]
        assert any("KV pages" in line for line in lines)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            arguments: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "seed": 3}
            first = client.completions.create(**arguments)
            assert first.usage is not None
            assert first.usage.prompt_tokens == 5
            assert first.choices[0].text == client.completions.create(**arguments).choices[0].text
            message: Any = {"role": "user", "content": "hi"}
            stream = client.chat.completions.create(model="tiny", messages=[message], max_tokens=4, stream=True)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()

    process, lines, _ = served(checkpoint, tmp_path)
    assert "compiled from it before" in lines[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0

    (artifact,) = (tmp_path / "artifacts").iterdir()
    assert "xllm.linear" in run("show", str(artifact)).stdout
    answers = [run("generate", str(artifact), "-p", "hello", "--max-tokens", "4", "--seed", "1") for _ in range(2)]
    assert answers[0].returncode == 0
    assert answers[0].stdout == answers[1].stdout
    assert "first token after" in answers[0].stderr
    wrong = run("generate", str(artifact), "-p", "x" * 300)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "256 tokens" in wrong.stderr
    assert "must be UTF-8" in run("generate", str(artifact), "-p", "\udcff").stderr
