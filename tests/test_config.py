"""Sizes, addresses, keys and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm.config import api_keys, environment, is_loopback, size_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5G", 1_500_000_000),
        ("10MB", 10_000_000),
        ("4096", 4096),
        ("2 ki", 2048),
    ],
)
def test_sizes(text, expected):
    assert size_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "4XiB", "1e9", "GiB", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        size_bytes(text)


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.org", "example.org")))


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo\n")
    assert api_keys(file) == ("one", "two")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="no API key"):
        api_keys(file)
    for unusable in (b"one\ntw\xc3\xb6\n", b"one\n\xff\xfe\n", b"one\nt wo\n"):
        file.write_bytes(unusable)
        with pytest.raises(ValueError, match=f"{file.name}: key 2"):
            api_keys(file)


def test_environment(monkeypatch):
    for name in ("XLLM_CACHE", "XDG_CACHE_HOME", "XLLM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    assert environment().cache == Path.home() / ".cache" / "xllm"
    assert environment().debug == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert environment().cache == Path("/x/xllm")
    monkeypatch.setenv("XLLM_CACHE", "/y")
    monkeypatch.setenv("XLLM_DEBUG", "3")
    assert (environment().cache, environment().debug) == (Path("/y"), 3)
    monkeypatch.setenv("XLLM_DEBUG", "loud")
    with pytest.raises(ValueError, match="XLLM_DEBUG"):
        environment()


def test_only_this_module_reads_the_environment():
    root = Path(__file__).parent.parent / "xllm"
    readers = [
        file.name for file in root.rglob("*.py") if "os.environ" in (text := file.read_text()) or "getenv" in text
    ]
    assert [name for name in readers if name != "config.py"] == []
