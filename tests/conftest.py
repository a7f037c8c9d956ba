"""Options of the whole suite: --update-golden rewrites golden files; --mutations and --graphs say how many broken plans
and random programs to try, --seed gives other random programs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch computes references; `make test` runs two of us side by side


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("xllm")
    group.addoption("--update-golden", action="store_true", help="rewrite golden files with what the code gives now")
    group.addoption("--mutations", type=int, default=500, help="mutated plans and graphs per checker (release: 100000)")
    group.addoption("--graphs", type=int, default=20, help="random programs per rewrite (release: 1000)")
    group.addoption("--seed", type=int, default=0, help="which random programs: a long run is one, or several seeds")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compares a text with a golden file, exactly. The difference is the review; --update-golden accepts it."""

    def compare(file: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.is_file(), f"{file.name} is missing: run pytest --update-golden and read the file"
        assert text == file.read_text(encoding="utf-8"), "if this is meant: pytest --update-golden, then read git diff"

    return compare


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--mutations"))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def graphs(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--graphs"))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))  # pyright: ignore[reportArgumentType]
