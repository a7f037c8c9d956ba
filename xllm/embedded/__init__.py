"""The model that ships with xllm: a Qwen3-architecture chat model that tells short stories and answers questions.

Its greedy stories obey the grammar and world of `grammar.py`; `checkpoint/results.json` has the figures.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def checkpoint_path() -> Path:
    """The shipped Hugging Face checkpoint folder. `FileNotFoundError` if this installation lacks it."""
    folder = Path(str(files(__name__).joinpath("checkpoint")))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The embedded model is missing at {folder}: reinstall xllm, with its package data.")
    return folder
