"""What the compiler shows of itself: a dump after every rewrite, and the XLLM_DEBUG ladder on standard error.

1 passes, hits, times · 2 near misses with reasons · 3 IR difference per pass · 4 full IR · 5 numerics check per rewrite
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

import torch.fx as fx

from xllm.ir import Program
from xllm.ir.show import text
from xllm.passes.base import Pass, Record
from xllm.passes.numerics import check_same, random_sources
from xllm.passes.operations import Reader
from xllm.plan import Plan


class Ladder:
    """Observer of a pipeline: hands dumps to `write(name, text)` and says on stderr what `level` asks for."""

    def __init__(self, level: int, target: str, write: Callable[[str, str], None]) -> None:
        self.level, self._target, self._write = level, target, write
        self.count = 0
        self._latest = ""

    def captured(self, program: Program) -> None:
        self._sources = random_sources(program) if self.level >= 5 else {}
        self._dump("captured", program)

    def observe(self, step: Pass, before: Program, after: Program, record: Record) -> None:
        """Called after every pass; see `run_pipeline`."""
        if self.level >= 1:
            self._say(f"{record.name}: {record.hits} hits, {len(record.misses)} near misses, {record.seconds:.3f} s")
        if self.level >= 2:
            for node, why in record.misses:
                self._say(f"  near miss at %{node}: {why}")
        if step.kind != "rewrite":
            return
        previous = self._latest
        self._dump(record.name, after)
        if self.level >= 3:
            for line in difflib.unified_diff(
                previous.splitlines(), self._latest.splitlines(), "before", "after", lineterm=""
            ):
                self._say(line)
        if self.level >= 4:
            self._say(self._latest)
        if self.level >= 5:
            self._say(f"  numerics: relative difference {check_same(before, after, record.name, self._sources):.1e}")

    def _dump(self, name: str, program: Program) -> None:
        self._latest = text(program, stage=name, target=self._target)
        self._write(f"{self.count:02d}-{name}", self._latest)
        self.count += 1

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr)


def dump_planned(program: Program, plan: Plan, target: str) -> dict[str, str]:
    """The final program with plan columns (stream, kernel, address in the largest bucket): folded, and "unfolded"."""
    reader, largest = Reader(program), plan.buckets[-1]
    calls = {call.node: call for call in plan.calls}
    buckets = " ".join(str(bucket.T) for bucket in plan.buckets)
    padding = program.plans["buckets"].expected_padding
    notes = (
        f"buckets T = {buckets}, expected padding {padding:.0%}, arena {plan.arena_bytes:,} bytes",
        f"KV {plan.kv.dtype}, {plan.kv.token_bytes:,} bytes a token in groups of {plan.kv.group_tokens}",
        "columns: stream, kernel, address in the largest bucket; of the first layer where layers are folded",
    )

    def columns(node: fx.Node) -> str:
        call = calls.get(node.name)
        if call is None:
            return f"view of {reader.owner(node)}"
        places = [f"arena+{largest.offsets[result.name]:#08x}" for result in reader.results(node)]
        return "  ".join((call.stream, call.kernel, *places))

    return {
        suffix: text(program, stage="planned", target=target, unfold=bool(suffix), notes=notes, columns=columns)
        for suffix in ("", "unfolded")
    }
