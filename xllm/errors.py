"""How the compiler says no: what failed, where in the model, why, and what to try next, as one readable sentence."""

from __future__ import annotations


class CompileError(Exception):
    """A model, a checkpoint or a program that cannot be compiled as asked.

    why: the reason, a clause without a final stop. where: the place in the model or file, e.g.
    "model.layers.3.self_attn". node: the graph node or operator. pass_name: the stage that refused, e.g. "capture".
    try_: what to do about it. code: stable identifier for scripts and tests, e.g. "unsupported-model".
    """

    def __init__(
        self,
        why: str,
        *,
        code: str = "compile-error",
        pass_name: str = "",
        node: str = "",
        where: str = "",
        try_: str = "",
    ) -> None:
        super().__init__(why, code, pass_name, node, where, try_)
        self.why = why
        self.code = code
        self.pass_name = pass_name
        self.node = node
        self.where = where
        self.try_ = try_

    def __str__(self) -> str:
        head = f"{self.pass_name}: " if self.pass_name else ""
        place = f" at {self.where}" if self.where else ""
        node = f" ({self.node})" if self.node else ""
        advice = f"; try: {self.try_}" if self.try_ else ""
        return f"{head}{self.why}{place}{node}{advice} [{self.code}]"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, self.args


def _rebuild(why: str, code: str, pass_name: str, node: str, where: str, try_: str) -> CompileError:
    return CompileError(why, code=code, pass_name=pass_name, node=node, where=where, try_=try_)
