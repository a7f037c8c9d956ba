"""The pages of docs/ that show explain and diff are what the command writes: every pass of the list, every section."""

from __future__ import annotations

from bench.inspection import DIFF, DOCS, EXPLAIN
from xllm.passes import PLANS, REWRITES


def test_the_pages_show_every_pass_and_section() -> None:
    explained = (DOCS / "explain-qwen3-moe.md").read_text(encoding="utf-8")
    compared = (DOCS / "diff-qwen3-moe.md").read_text(encoding="utf-8")
    assert explained.startswith(EXPLAIN) and compared.startswith(DIFF), "run python -m bench.inspection"
    missing = [step.name() for step in (*REWRITES, *PLANS) if f"\n  {step.name()} " not in explained]
    assert not missing, f"run python -m bench.inspection: the page lacks {missing}"
    for section in ("KERNELS", "FALLBACKS", "BUCKETS", "MEMORY"):
        assert f"\n{section}  " in explained
    assert "B has no such stage" in compared and "\nequal: " in compared
