"""The model that ships with xllm: a Qwen3-architecture chat model that tells short stories and answers questions.

Held-out loss: 0.28 nats per token over whole conversations, 0.18 on answers (0.51 in stories, most of it free choice;
0.004 in answers to questions). Greedy replies to 200 unseen prompts of each kind that the checker of `grammar.py` and
`dialogue.py` accepts: 99.6 % of stories, 99.0 % of answers. Details: README.md and `xllm-story/results.json`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def checkpoint_path() -> Path:
    """The shipped Hugging Face checkpoint folder. `FileNotFoundError` if this installation lacks it."""
    folder = Path(str(files(__name__).joinpath("xllm-story")))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"The embedded model is missing at {folder}: reinstall xllm, with its package data.")
    return folder
