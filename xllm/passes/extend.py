"""Passes and kernels of others: where a pass takes its place in the list, and how a kernel is asked for.

A pass says `AFTER`, the name of the pass it follows. A rule of a kernel module is asked before the target's; its kernel
gets float32 arrays as the program shapes them, so it can take neither the KV state nor packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xllm.errors import CompileError
from xllm.extensions import Extension, owner_of, table
from xllm.passes.base import Pass
from xllm.targets.base import KVLayout, Layout, Lowering, Operation, Refusal, Tensor

PLAIN = Layout("plain", "float32")


def passes_of(extension: Extension) -> tuple[Pass, ...]:
    """One of each Pass subclass that the module defines, in source order. Raises CompileError when there is none."""
    kinds = [
        held
        for held in vars(extension.module).values()
        if isinstance(held, type) and issubclass(held, Pass) and owner_of(held) == extension.name
    ]
    if not kinds:
        raise _bad(f"module {extension.name} defines no Pass", "a frozen dataclass that inherits xllm.passes.Pass")
    for kind in kinds:
        if not isinstance(getattr(kind, "AFTER", None), str) or getattr(kind, "kind", "") not in ("rewrite", "plan"):
            raise _bad(f"pass {kind.name()} does not say its place and kind", 'AFTER = "fuse-qkv" and kind = "rewrite"')
    return tuple(kind() for kind in kinds)


def placed(passes: Sequence[Pass], added: Iterable[Pass]) -> tuple[Pass, ...]:
    """The list with each of `added` behind the last pass named by its AFTER; those that name no pass here stay out.

    A rewrite among plans is refused with CompileError: the graph is final by then.
    """
    placed = list(passes)
    for step in added:
        after = getattr(type(step), "AFTER", "")
        found = [index for index, other in enumerate(placed) if other.name() == after]
        if not found:
            continue
        if step.kind == "rewrite" and placed[found[-1]].kind == "plan":
            raise _bad(f"{step.name()} is a rewrite and goes after the plan {after}", 'a rewrite, or kind = "plan"')
        behind = found[-1] + 1
        while behind < len(placed) and getattr(type(placed[behind]), "AFTER", "") == after:
            behind += 1
        placed.insert(behind, step)
    return tuple(placed)


def check_places(rewrites: Sequence[Pass], plans: Sequence[Pass], added: Iterable[Pass]) -> None:
    """Raises CompileError for a pass whose AFTER is no pass known before it, or whose name is taken."""
    taken = {step.name() for step in (*rewrites, *plans)}
    for step in added:
        after = getattr(type(step), "AFTER", "")
        if after not in taken:
            raise _bad(f"{step.name()} goes after {after!r}, which is no pass", "`xllm passes` lists them all")
        if step.name() in taken:
            raise _bad(f"two passes are called {step.name()}", "another name for the class")
        taken.add(step.name())


@dataclass(frozen=True)
class Provider:
    """A kernel module as `choose-kernels` asks it."""

    name: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(extension: Extension) -> Provider:
        return Provider(extension.name, table(extension, "RULES"), table(extension, "KERNELS"))

    def lower(self, operation: Operation, kv: KVLayout, weights_dtype: str) -> Lowering | Refusal | None:
        """None where the module has no rule for the operator. Raises CompileError for an answer that can't be used."""
        rule = self.rules.get(operation.op)
        if rule is None:
            return None
        tensors = [value for value in operation.args.values() if isinstance(value, Tensor)]
        if any(tensor.kind == "state" for tensor in tensors):
            return Refusal("kernels of modules are not given the KV state")
        try:
            answer = rule(operation, kv, weights_dtype)
        except (Exception, SystemExit) as error:
            raise self._broken(operation, f"its rule failed with {type(error).__name__}: {error}") from error
        if isinstance(answer, Refusal):
            return answer
        if not isinstance(answer, Lowering):
            raise self._broken(operation, f"its rule gave {answer!r}, neither a Lowering nor a Refusal")
        if answer.kernel not in self.kernels:
            raise self._broken(operation, f"KERNELS has no {answer.kernel!r}")
        given = [tensor for tensor in answer.args.values() if tensor is not None]
        for result in operation.results:
            if result not in given:
                raise self._broken(operation, f"the kernel is not given the result {result.name} to write")
        if answer.scratch or any(layout != PLAIN for layout in answer.layouts.values()):
            raise self._broken(operation, "kernels of modules take plain float32 weights and no scratch")
        weights = {tensor.name: PLAIN for tensor in given if tensor.kind == "weight"}
        return replace(answer, kernel=f"{self.name}:{answer.kernel}", layouts=weights)

    def _broken(self, operation: Operation, why: str) -> CompileError:
        return CompileError(
            f"kernel module {self.name}: {why}",
            code="broken-kernel-module",
            pass_name="choose-kernels",
            node=operation.node,
            where=operation.path,
            try_="CONTRIBUTING.md shows a kernel module, or leave --kernel-module out",
        )


def _bad(why: str, advice: str) -> CompileError:
    return CompileError(why, code="bad-pass-module", try_=advice)
