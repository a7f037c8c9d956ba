"""What a pass is, and how a pipeline of them runs: verified in, verified out, every run on record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.fx as fx

from xllm.errors import CompileError
from xllm.extensions import owner_of
from xllm.ir import Program
from xllm.ir.program import path_of
from xllm.ir.show import digest
from xllm.ir.verify import VerifyError, verify
from xllm.targets.base import Target

if TYPE_CHECKING:
    from xllm.passes.extend import Provider


@dataclass(frozen=True)
class Context:
    """What passes may consult: the target, and the options of this compile (see `xllm.compiler.CompileOptions`)."""

    target: Target
    weights_dtype: str = "float32"
    head_dtype: str = ""  # of embeddings and of what is made of their logits; as the other weights where empty
    kv_dtype: str = "float32"
    activations: str = ""  # what rows are rounded to in products with weights that it fits; as they are where empty
    traffic: tuple[tuple[int, float], ...] = ()
    providers: tuple[Provider, ...] = ()  # kernel modules, asked before the target


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. Fields of a subclass are its options; its name is derived from the class name.

    kind "rewrite" changes the graph and returns the changed program; kind "plan" leaves the graph alone (checked by
    digest) and adds to `program.plans`.
    """

    kind: ClassVar[Literal["rewrite", "plan"]]

    @classmethod
    def name(cls) -> str:
        """FuseAddRmsNorm -> fuse-add-rms-norm."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def spelled(self) -> str:
        """The pass with its options, as the pipeline string records it: name or name{key=value,…}, behind "module:"
        where a module of others defines it."""
        options = ",".join(f"{item.name}={getattr(self, item.name)}" for item in fields(self))
        owner = owner_of(type(self))
        name = f"{owner}:{self.name()}" if owner else self.name()
        return f"{name}{{{options}}}" if options else name

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
    """Runs the passes in order. Raises CompileError naming the pass, and those before it, when one breaks a rule."""
    records: list[Record] = []
    before = digest(program)
    check(program, "the captured program", records)
    for step in passes:
        started = time.perf_counter()
        source = program.copy() if step.kind == "rewrite" else program
        outcome = _run(step, source, context, records)
        seconds = time.perf_counter() - started
        after = digest(outcome.program)
        if step.kind == "plan" and after != before:
            raise CompileError("a plan changed the graph", code="broken-pass", pass_name=step.name())
        if after != before:  # the same program was verified when it was made
            check(outcome.program, step.name(), records)
        record = Record(step.name(), step.kind, len(outcome.hits), outcome.misses, before, after, seconds)
        records.append(record)
        if observe is not None:
            observe(step, program, outcome.program, record)
        program, before = outcome.program, after
    return program, records


def _run(step: Pass, program: Program, context: Context, records: list[Record]) -> Outcome:
    """One pass; whatever it raises leaves as a CompileError with its name."""
    try:
        return step.run(program, context)
    except CompileError as error:
        error.pass_name = error.pass_name or step.name()
        raise
    except (Exception, SystemExit) as error:  # a fault of the pass: the user needs its name and a way around it
        raise CompileError(
            f"the pass failed with {type(error).__name__}: {error}",
            code="broken-pass",
            pass_name=step.name(),
            try_=f"--disable-pass {step.name()}, and report it (ran before: {_names(records)})",
        ) from error


def check(program: Program, who: str, records: list[Record]) -> None:
    """Verifies, and turns a broken rule into a CompileError that names the pass at fault."""
    try:
        verify(program)
    except VerifyError as error:
        node: fx.Node | None = error.node
        raise CompileError(
            str(error),
            code="broken-program",
            pass_name=who,
            node=node.name if node is not None else "",
            where=path_of(node) if node is not None else "",
            try_=f"XLLM_DEBUG=4 shows the program, --disable-pass {who} leaves it out (ran before: {_names(records)})",
        ) from error


def _names(records: list[Record]) -> str:
    return ", ".join(record.name for record in records) or "none"


def with_options(kind: type[Pass], spelled: str) -> Pass:
    """A pass from its spelling: "choose-buckets{count=2}". Raises CompileError for unknown options and wrong values."""
    given = {}
    known = {item.name: item.default for item in fields(kind)}
    for item in filter(None, spelled.partition("{")[2].removesuffix("}").split(",")):
        name, _, text = item.partition("=")
        if name not in known:
            raise _bad_option(kind, f"{name!r} is none of its options", ", ".join(known) or "it without options")
        given[name] = _value(kind, name, text, known[name])
    return kind(**given)


def _value(kind: type[Pass], name: str, text: str, default: Any) -> Any:
    """An option's value, of the type of its default."""
    try:
        return {"True": True, "False": False}[text] if isinstance(default, bool) else type(default)(text)
    except (ValueError, KeyError) as error:
        raise _bad_option(kind, f"{name} is {text!r}", f"{name}={default}") from error


def _bad_option(kind: type[Pass], why: str, advice: str) -> CompileError:
    return CompileError(why, code="bad-option", pass_name=kind.name(), try_=advice)
