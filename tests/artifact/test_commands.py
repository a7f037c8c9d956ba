"""pack, unpack and sign on the command line, and what a person sees when an artifact is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifacts import write_small
from xllm import cli


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.xllm")


def test_pack_sign_unpack_and_show(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, packed, back = tmp_path / "key.pem", tmp_path / "small.pack", tmp_path / "back.xllm"
    assert cli.main(["sign", str(path), "--new-key", str(key)]) == 0
    assert cli.main(["pack", str(path), str(packed)]) == 0
    assert cli.main(["unpack", str(packed), str(back)]) == 0
    capsys.readouterr()
    for place in (path, packed, back):
        assert cli.main(["show", str(place), "--stage", "captured"]) == 0
        assert capsys.readouterr().out == "program\n"
    assert (back / "signature.json").read_bytes() == (path / "signature.json").read_bytes()


@pytest.mark.parametrize("form", ["folder", "packed"])
def test_a_refusal_is_one_line_and_exit_code_2(
    path: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = path
    cli.main(["sign", "--new-key", str(tmp_path / "key.pem")])
    if form == "packed":
        place = tmp_path / "small.pack"
        cli.main(["pack", str(path), str(place)])
    capsys.readouterr()
    public = str(tmp_path / "key.pem.pub")
    assert cli.main(["generate", str(place), "-p", "x", "--require-signature", public]) == 2
    assert capsys.readouterr().err.startswith(f"xllm: {place} has no signature.json")
    changed = path / "plan.json" if form == "folder" else place
    whole = changed.read_bytes()
    changed.write_bytes(whole.replace(b'"logits"', b'"Logits"', 1))
    assert cli.main(["generate", str(place), "-p", "x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "plan.json is not what the compiler wrote" in told


def test_what_cannot_be_signed_says_what_to_do(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sign", str(path)]) == 2
    assert "--key FILE" in capsys.readouterr().err
    packed = tmp_path / "small.pack"
    cli.main(["pack", str(path), str(packed)])
    assert cli.main(["sign", str(packed), "--new-key", str(tmp_path / "key.pem")]) == 2
    assert "unpack it, sign the folder" in capsys.readouterr().err
