"""What a pass is, and how a pipeline of them runs: verified in, verified out, every run on record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch.fx as fx

from xllm.errors import CompileError
from xllm.ir import Program
from xllm.ir.program import path_of
from xllm.ir.show import digest
from xllm.ir.verify import VerifyError, verify
from xllm.targets.base import Target


@dataclass(frozen=True)
class Context:
    """What passes may consult: the target, and the options of this compile (see `xllm.compiler.CompileOptions`)."""

    target: Target
    weights_dtype: str = "float32"
    kv_dtype: str = "float32"
    traffic: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. Fields of a subclass are its options; its name is derived from the class name.

    kind "rewrite" changes the graph and returns the changed program; kind "plan" leaves the graph alone (checked by digest)
    and adds one entry to `program.plans`.
    """

    kind: ClassVar[Literal["rewrite", "plan"]]

    @classmethod
    def name(cls) -> str:
        """FuseAddRmsNorm -> fuse-add-rms-norm."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def spelled(self) -> str:
        """The pass with its options, as the pipeline string records it: name or name{key=value,…}."""
        options = ",".join(f"{item.name}={getattr(self, item.name)}" for item in fields(self))
        return f"{self.name()}{{{options}}}" if options else self.name()

    def run(self, program: Program, context: Context) -> Outcome:
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """What one run did: the program, the node names it matched, and what it nearly matched with the reason."""

    program: Program
    hits: tuple[str, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Record:
    """The trace of one run that goes into reports and the manifest. `seconds` is shown, never stored."""

    name: str
    kind: str
    hits: int
    misses: tuple[tuple[str, str], ...]
    before: str
    after: str
    seconds: float = field(compare=False)


Observer = Callable[[Pass, Program, Program, Record], None]


def run_pipeline(
    program: Program, passes: Iterable[Pass], context: Context, observe: Observer | None = None
) -> tuple[Program, list[Record]]:
    """Runs the passes in order. Raises CompileError naming the pass and the passes before it when one breaks the rules."""
    records: list[Record] = []
    before = digest(program)
    check(program, "the captured program", records)
    for step in passes:
        started = time.perf_counter()
        source = program.copy() if step.kind == "rewrite" else program
        outcome = step.run(source, context)
        seconds = time.perf_counter() - started
        check(outcome.program, step.name(), records)
        after = digest(outcome.program)
        if step.kind == "plan" and after != before:
            raise CompileError("a plan changed the graph", code="broken-pass", pass_name=step.name())
        record = Record(step.name(), step.kind, len(outcome.hits), outcome.misses, before, after, seconds)
        records.append(record)
        if observe is not None:
            observe(step, program, outcome.program, record)
        program, before = outcome.program, after
    return program, records


def check(program: Program, who: str, records: list[Record]) -> None:
    """Verifies, and turns a broken rule into a CompileError that names the pass at fault."""
    try:
        verify(program)
    except VerifyError as error:
        ran = ", ".join(record.name for record in records) or "none"
        node: fx.Node | None = error.node
        raise CompileError(
            str(error),
            code="broken-program",
            pass_name=who,
            node=node.name if node is not None else "",
            where=path_of(node) if node is not None else "",
            try_=f"XLLM_DEBUG=4 shows the program, --disable-pass {who} leaves the pass out (ran before: {ran})",
        ) from error


def parse_options(text: str) -> dict[str, Any]:
    """The options of a spelled pass: "name{k=2,best=True}" -> {"k": 2, "best": True}."""
    inside = text.partition("{")[2].removesuffix("}")
    pairs = (item.split("=", 1) for item in inside.split(",") if item)
    return {key: _scalar(value) for key, value in pairs}


def _scalar(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
