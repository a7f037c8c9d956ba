"""A file of settings: what it says, what goes before it, and what it may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.models import FAMILIES, build
from tests.servers import serving
from xllm import cli

SAID = {"models": ["a.xllm", "b.xllm"], "memory": "2GiB", "no-prefix-cache": True, "allow_origin": ["https://a.b"]}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command: its exit code, what `serve` would have served, and what it printed."""
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "_serve", lambda arguments: served.append(vars(arguments)))

    def command(*argv: str | Path) -> tuple[int, dict[str, Any], str, str]:
        served.clear()
        try:
            code = cli.main([*map(str, argv)])
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr()
        return code, served[0] if served else {}, out.out, out.err

    return command


def write(folder: Path, what: Any) -> Path:
    file = folder / "settings.json"
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return file


def test_behaviour_37_a_file_overrides_defaults_and_the_command_line_both(run, tmp_path: Path) -> None:
    plain = run("serve", "x")[1]
    code, found, _, _ = run("serve", "--config", write(tmp_path, SAID))
    assert code == 0
    changed = {name for name in plain if name not in ("flags", "config") and plain[name] != found[name]}
    assert changed == {"models", "memory", "no_prefix_cache", "allow_origin"}
    assert found["models"] == [Path("a.xllm"), Path("b.xllm")] and found["memory"] == 2 << 30
    file = write(tmp_path, SAID)
    for argv in (("c", "--memory", "1GiB"), ("c", "--mem=1GiB")):
        found = run("serve", *argv, "--config", file, "--allow-origin", "http://c")[1]
        assert (found["models"], found["memory"]) == ([Path("c")], 1 << 30)
        assert found["allow_origin"] == ["http://c"] and found["no_prefix_cache"]
    found = run("serve", "--config", write(tmp_path, {"models": ["x"], "port": 9}), "--port", "8000")[1]
    assert found["port"] == 8000, "said, though it is the default"


def test_behaviour_37_a_dump_has_what_is_no_default_and_reads_back(run, tmp_path: Path) -> None:
    argv = ("x", "--memory", "4GiB", "--port", "8000", "--scheduler", "mix", "--no-async-scheduling")
    code, _, out, _ = run("config", "dump", *argv)
    assert code == 0
    assert json.loads(out) == {"models": ["x"], "memory": 4 << 30, "scheduler": "mix", "no_async_scheduling": True}
    file = write(tmp_path, out)
    assert run("config", "check", file)[:3:2] == (0, f"{file}: 4 settings, all of them known\n")
    assert run("config", "dump", "--config", file)[2] == out
    wanted, found = run("serve", *argv)[1], run("serve", "--config", file)[1]
    assert {**wanted, "config": None, "flags": None} == {**found, "config": None, "flags": None}


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (None, "No such file or directory"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([], "must hold one JSON object"),
        ({"prot": 1}, "there is no setting prot; did you mean port?"),
        ({"run": 1}, "there is no setting run"),
        ({"port": 300_000}, "argument --port: '300000' is not a whole number"),
        ({"port": 1.5}, "port is 1.5"),
        ({"memory": "much"}, "argument --memory"),
        ({"port": None}, "port is null"),
        ({"models": ["x"], "port": False}, "port is false"),
        ({"models": False}, "models is false"),
        ({"models": [True]}, "models is [true]"),
        ({"models": [""]}, 'models is [""]'),
        ({"models": ["x"], "port": [1, 2]}, "port is [1, 2], it takes one value"),
        ({"models": ["x"], "max_wait": []}, "max_wait is [], it takes one value"),
        ('{"models": ["x"], "max-wait": 1, "max_wait": 2}', "max_wait is there more than once"),
        ({"no_prefix_cache": "yes"}, "argument --no-prefix-cache"),
        ({}, "say what to serve"),
    ],
)
def test_behaviour_37_a_broken_or_missing_file_is_one_line_and_nothing_of_it_counts(run, tmp_path, held, said) -> None:
    file = tmp_path / "none.json" if held is None else write(tmp_path, held)
    code, served, _, err = run("serve", "--config", file)
    assert (code, served) == (2, {})
    assert said in err and str(file) in err and err.count("\n") == 1


def test_models_of_a_file_are_never_flags(run, tmp_path) -> None:
    code, served, _, _ = run("serve", "--config", write(tmp_path, {"models": ["--help", "--port=99"]}))
    assert (code, [str(one) for one in served["models"]], served["port"]) == (0, ["--help", "--port=99"], 8000)


def test_without_models_it_says_what_to_do(run) -> None:
    assert run("serve")[::3] == (2, "xllm: say what to serve: xllm serve ARTIFACT\n")
    assert run("config", "check")[0] == 2


def test_a_server_starts_from_a_file(tmp_path: Path) -> None:
    artifact = build(tmp_path, FAMILIES["qwen3"])[1]
    said = {"models": [str(artifact)], "memory": "256MiB", "threads": 1, "served_model_name": ["filed"]}
    with serving([], "--config", str(write(tmp_path, said))) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "filed"
